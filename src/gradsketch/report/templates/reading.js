"use strict";
const $ = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Light or dark: the system's choice until the button is pressed, and then the reader's, where a browser may remember.
const root = document.documentElement;
const remembered = (theme) => {
  try {
    if (theme) localStorage.setItem("gradsketch-theme", theme);
    return localStorage.getItem("gradsketch-theme");
  } catch { return null; }
};
if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();

function switchTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  remembered(root.dataset.theme);
}

// Long texts are folded to six lines: all are marked, then all are measured, then all are changed, for one layout.
function fold(root = document) {
  const texts = all(".text", root);
  for (const text of texts) text.classList.add("long");
  const long = texts.map((text) => text.scrollHeight > text.clientHeight + 4);
  texts.forEach((text, i) => {
    if (!long[i]) { text.classList.remove("long"); return; }
    const button = Object.assign(document.createElement("button"), { type: "button", className: "more", textContent: "Show all" });
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      const open = text.classList.toggle("open");
      button.textContent = open ? "Show less" : "Show all";
      button.setAttribute("aria-expanded", String(open));
    });
    text.after(button);
  });
}

// A token's number: where there is no pointer to hover with, a touch shows it, and so do the arrow keys in a text.
let current = null;

function show(token) {
  current?.classList.remove("at");
  current = token ?? null;
  current?.classList.add("at");
  $("value").textContent = token ? `${token.textContent.trim() || "space"}  ${token.title}` : "";
}

function step(event) {
  const text = event.target.closest?.(".text[tabindex]");
  const keys = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  if (!text || !(event.key in keys)) return;
  event.preventDefault();
  const tokens = all("span[title]", text), at = tokens.indexOf(current);
  const forward = getComputedStyle(text).direction === "rtl" && event.key.startsWith("Arrow") ? -1 : 1;
  const to = at < 0 && keys[event.key] === 1 ? 0 : at + forward * keys[event.key];
  show(tokens[Math.min(Math.max(to, 0), tokens.length - 1)]);
  current.scrollIntoView({ block: "nearest" });
}

// Texts with numbers can be stepped through; those that are long are folded.
function readable(root = document) {
  for (const text of all(".text:has(span[title])", root)) {
    text.tabIndex = 0;
    text.setAttribute("aria-describedby", "keys");
  }
  fold(root);
}

addEventListener("click", ({ target }) => {
  if (target.closest?.("#theme")) switchTheme();
  show(target.closest?.(".text span[title]"));
});
addEventListener("focusout", () => show(null));
addEventListener("keydown", (event) => {
  if (event.key === "Escape") show(null);
  step(event);
});
