"use strict";
const $ = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Search: an example stays when it holds every word, in its text or its metadata.
const examples = all(".hit").map((element) => ({ element, text: element.textContent.toLowerCase() }));

function search() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const { element, text } of examples) {
    element.hidden = !words.every((word) => text.includes(word));
    found += !element.hidden;
  }
  for (const query of all(".query")) query.hidden = words.length > 0 && !query.querySelector(".hit:not([hidden])");
  for (const list of all("details")) list.open = words.length > 0 ? !!list.querySelector(".hit:not([hidden])") : false;
  $("count").textContent = words.length ? `${found} of ${examples.length}` : "";
  $("nothing").hidden = found > 0 || !words.length;
  highlight(words);
}

// Words run across the tokens' elements, so they are marked by ranges, in browsers that can.
function highlight(words) {
  if (!CSS.highlights) return;
  const ranges = [];
  for (const text of words.length ? all(".hit:not([hidden]) .text") : []) {
    const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
    const places = [];
    while (walker.nextNode()) for (let i = 0; i < walker.currentNode.length; i++) places.push([walker.currentNode, i]);
    const lower = places.map(([node, i]) => node.data[i].toLowerCase()[0] ?? " ").join("");
    for (const word of words) {
      for (let at = lower.indexOf(word); at >= 0; at = lower.indexOf(word, at + word.length)) {
        const range = new Range();
        const [last, end] = places[at + word.length - 1];
        range.setStart(...places[at]);
        range.setEnd(last, end + 1);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

$("search").addEventListener("input", search);
$("search").form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("search")) { event.preventDefault(); $("search").focus(); }
  if (event.key === "Escape") { $("search").value = ""; search(); }
});

// Long texts are folded to six lines.
for (const text of all(".text")) {
  text.classList.add("long");
  if (text.scrollHeight <= text.clientHeight + 4) { text.classList.remove("long"); continue; }
  const button = Object.assign(document.createElement("button"), { className: "more", textContent: "Show all" });
  button.addEventListener("click", () => { button.textContent = text.classList.toggle("open") ? "Show less" : "Show all"; });
  text.after(button);
}

// A token's number, where there is no pointer to hover with.
document.addEventListener("click", ({ target }) => {
  const token = target.closest?.(".text span[title]");
  $("value").textContent = token ? `${token.textContent.trim()}  ${token.title}` : "";
});

// Light or dark: the system's choice until the button is pressed.
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
