// Search: an example stays when it holds every word, in its text or its metadata.
let examples = null; // read when first needed
let opened = null; // which folded lists were open before the search, which opens and closes them

function search() {
  examples ??= all(".hit").map((element) => ({ element, text: element.textContent.toLowerCase() }));
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const { element, text } of examples) {
    element.hidden = !words.every((word) => text.includes(word));
    found += !element.hidden;
  }
  const holds = (part) => part.querySelector(".hit:not([hidden])") !== null;
  for (const query of all(".query")) query.hidden = words.length > 0 && !holds(query);
  const lists = all("details");
  if (words.length) {
    opened ??= new Map(lists.map((list) => [list, list.open]));
    for (const list of lists) list.open = holds(list);
  } else if (opened) {
    for (const list of lists) list.open = opened.get(list);
    opened = null;
  }
  $("count").textContent = words.length ? `${found} of ${examples.length}` : "";
  $("nothing").hidden = found > 0 || !words.length;
  highlight(words);
}

// Words run across the tokens' elements, so they are marked by ranges, in browsers that can; so many that a screen is full.
const MOST_MARKS = 4000;

function highlight(words) {
  if (!CSS.highlights) return;
  const ranges = [];
  for (const text of words.length ? all(".hit:not([hidden]) .text") : []) {
    if (ranges.length >= MOST_MARKS) break;
    const { nodes, starts, lower } = letters(text);
    for (const word of words) {
      for (let at = lower.indexOf(word); at >= 0; at = lower.indexOf(word, at + word.length)) {
        const range = new Range();
        range.setStart(...place(nodes, starts, at));
        const [last, end] = place(nodes, starts, at + word.length - 1);
        range.setEnd(last, end + 1);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// A text's nodes, where each begins, and all letters in lower case, as many as there are.
function letters(text) {
  const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
  const nodes = [], starts = [];
  let lower = "";
  while (walker.nextNode()) {
    const { data } = walker.currentNode;
    nodes.push(walker.currentNode);
    starts.push(lower.length);
    const small = data.toLowerCase();
    lower += small.length === data.length ? small : data.replace(/[^]/g, (letter) => letter.toLowerCase()[0] ?? letter);
  }
  return { nodes, starts, lower };
}

function place(nodes, starts, at) {
  let low = 0, high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= at) low = middle; else high = middle - 1;
  }
  return [nodes[low], at - starts[low]];
}

let waiting;
addEventListener("input", ({ target }) => {
  if (target.id === "search") { clearTimeout(waiting); waiting = setTimeout(search, 120); }
});
addEventListener("submit", (event) => event.preventDefault());
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("search")) { event.preventDefault(); $("search").focus(); }
  if (event.key === "Escape" && $("search").value) { $("search").value = ""; search(); }
});

// Paper has no lists to open.
let closed = [];
addEventListener("beforeprint", () => {
  closed = all("details:not([open])");
  for (const list of closed) list.open = true;
});
addEventListener("afterprint", () => { for (const list of closed) list.open = false; });

addEventListener("DOMContentLoaded", () => {
  readable();
  requestAnimationFrame(() => requestAnimationFrame(() => root.classList.add("measured")));
});
