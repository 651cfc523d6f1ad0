"use strict";
// The page of gradsketch explore. Texts of data become text nodes and nothing else; the state stands in the address.
// $, all, readable and the rest of how texts are read come from reading.js, which the report shares.

// ---- elements ----

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false && child !== ""));
  return element;
}

function button(text, act, attributes = {}) {
  const element = make("button", { type: "button", class: "quiet", ...attributes }, text);
  element.addEventListener("click", act);
  return element;
}

function options(select, choices, chosen) {
  select.replaceChildren(...choices.map(([value, text]) => make("option", { value, selected: value === chosen }, text)));
}

function bar(width, kind = "bar") {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg"), rect = document.createElementNS(space, "rect");
  for (const [key, value] of Object.entries({ class: kind, viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" })) svg.setAttribute(key, value);
  rect.setAttribute("width", String(Math.max(0, Math.min(100, width))));
  rect.setAttribute("height", "1");
  svg.append(rect);
  return svg;
}

const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const count = (number, one, many = `${one}s`) => `${Number(number).toLocaleString("en")} ${number === 1 ? one : many}`;
const named = (value) => (value === null ? "(none)" : typeof value === "string" ? value || "(empty)" : JSON.stringify(value));
const number = (value) => (typeof value === "number" ? (value === 0 ? "0" : `${value > 0 ? "+" : "−"}${Math.abs(value).toPrecision(3)}`) : String(value));

// ---- state: the part of the address behind # ----

const DEFAULTS = { view: "ask", q: [], score: "", damping: "1", k: 10, opponents: 5, tokens: 32, where: {}, together: false,
  checkpoint: "", against: "", words: "", order: "row", offset: 0, row: 0, by: "" };
const TITLES = { ask: "Which training examples made the model say this?", rows: "What is in the training data?",
  outliers: "Which training examples stand alone?", row: "Which training examples are like this one?" };
let about = null;
let state = { ...DEFAULTS };

function read(hash) {
  const found = { ...DEFAULTS };
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (!(key in DEFAULTS)) continue;
    const usual = DEFAULTS[key];
    try {
      const value = typeof usual === "string" ? text : JSON.parse(text);
      if (typeof value === typeof usual && Array.isArray(value) === Array.isArray(usual) && value !== null) found[key] = value;
    } catch { /* a mangled link: the default stands */ }
  }
  if (!(found.view in TITLES)) found.view = "ask";
  found.q = found.q.filter((q) => Array.isArray(q) && typeof q[0] === "string").map(([prompt, answer, whole]) => [prompt, typeof answer === "string" ? answer : null, whole === true]);
  for (const values of Object.values(found.where)) if (!Array.isArray(values)) found.where = {};
  return found;
}

function written(changes) {
  const next = { ...state, ...changes }, parts = new URLSearchParams({ view: next.view });
  for (const [key, usual] of Object.entries(DEFAULTS)) {
    const text = typeof usual === "string" ? next[key] : JSON.stringify(next[key]);
    if (key !== "view" && text !== (typeof usual === "string" ? usual : JSON.stringify(usual))) parts.set(key, text);
  }
  return `#${parts}`;
}

function go(changes) {
  const to = written(changes);
  if (to === location.hash) draw(); else location.hash = to;
}

// ---- asking the server ----

let latest = 0;
let submitted = false; // by a person, whose eyes then follow to the answer where it stands below

async function call(path, body) {
  const answer = await fetch(path, body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  let found;
  try { found = await answer.json(); } catch { throw new Error(answer.status === 403 ? "This page is no longer open: use the link that gradsketch explore printed last." : `The server answered ${answer.status}.`); }
  if (found.error) throw new Error([found.error.came, found.error.wanted && `wanted: ${found.error.wanted}`, found.error.fix].filter(Boolean).join(". "));
  return found;
}

// Runs what draws a view; of two that overlap, the one that began last is shown.
async function busy(text, work) {
  const turn = (latest += 1), still = () => turn === latest;
  $("status").textContent = text;
  document.body.classList.add("busy");
  try {
    await work(still);
    if (still()) $("status").textContent = "";
    if (still() && submitted && matchMedia("(max-width: 60rem)").matches) $("main").scrollIntoView();
    submitted = false;
  } catch (error) {
    if (!still()) return;
    $("status").textContent = "";
    const told = error instanceof TypeError ? "gradsketch explore has ended, or cannot be reached." : error.message;
    $("out").replaceChildren(make("p", { class: "error", role: "alert" }, told));
  } finally {
    if (still()) document.body.classList.remove("busy");
  }
}

// ---- the form ----

function questionField(place, [prompt, answer, whole], many) {
  const id = `q${place}`, group = make("fieldset", { class: "question" });
  const label = many ? `Question ${place + 1}` : "Question";
  const asked = make("textarea", { id: `${id}-prompt`, rows: "2", required: true });
  asked.value = prompt;
  group.append(make("legend", { class: many ? null : "heard" }, label), make("label", { for: asked.id }, about.prompt), asked);
  if (about.answer !== null) {
    const said = make("textarea", { id: `${id}-answer`, rows: "1", placeholder: "empty: the model answers" });
    said.value = answer ?? "";
    const field = make("div", { hidden: whole }, make("label", { for: said.id }, about.answer), said);
    // What the model answered goes with its question; what a person typed stays.
    asked.addEventListener("input", () => { if (said.dataset.own) { said.value = ""; delete said.dataset.own; } });
    said.addEventListener("input", () => { delete said.dataset.own; });
    group.append(field);
    if (about.takes_whole) {
      const all = make("input", { type: "checkbox", id: `${id}-whole` });
      all.checked = whole;
      all.addEventListener("change", () => { field.hidden = all.checked; });
      group.append(make("label", { class: "check" }, all, " A whole text, without an answer"));
    }
  }
  if (many) group.append(button("Remove", () => { const q = typed(); q.splice(place, 1); questions(q); $("q0-prompt").focus(); }, { "aria-label": `Remove question ${place + 1}` }));
  return group;
}

function questions(q) {
  const shown = q.length ? q : [["", null, false]];
  $("questions").replaceChildren(...shown.map((one, place) => questionField(place, one, shown.length > 1)));
  $("together-label").hidden = shown.length < 2;
}

function typed() {
  return all(".question").map((_, place) => [$(`q${place}-prompt`).value, $(`q${place}-answer`)?.value || null, $(`q${place}-whole`)?.checked ?? false]);
}

function chips() {
  const items = Object.entries(state.where).flatMap(([column, values]) => values.map((value) => {
    const text = `${column} = ${cut(named(value), 40)}`;
    return make("li", {}, make("bdi", {}, text), button("×", () => {
      const rest = values.filter((other) => other !== value), where = { ...state.where, [column]: rest };
      if (!rest.length) delete where[column];
      go({ ...fromForm(), where, offset: 0 });
    }, { "aria-label": `Without the condition ${text}` }));
  }));
  $("chips").replaceChildren(...items);
  $("chips").hidden = !items.length;
}

function narrow(column, value) {
  const values = state.where[column] ?? [];
  go({ ...fromForm(), where: { ...state.where, [column]: values.includes(value) ? values : [...values, value] }, offset: 0 });
}

function values() {
  const facet = about.facets.find((one) => one.column === $("column").value);
  options($("facet"), (facet?.values ?? []).map(({ value, rows }) => [JSON.stringify(value), `${cut(named(value), 60)} (${rows.toLocaleString("en")})`]));
}

function scoreNamed(name) { return about.scores.find((one) => one.name === name) ?? about.scores.find((one) => one.name === "ridge"); }
const usualScore = () => (state.view === "row" ? "cosine" : "ridge");

function describeScore() {
  const score = scoreNamed($("score").value);
  $("formula").replaceChildren(make("code", {}, score.formula), `: ${score.units}`);
  $("chosen").textContent = `${score.name}${["ridge", "influence"].includes(score.name) ? `, λ = ${$("damping").value}` : ""}`;
}

function toForm() {
  questions(state.q);
  for (const name of ["damping", "k", "opponents", "tokens", "words", "order", "row", "checkpoint", "against"]) $(name).value = state[name];
  $("score").value = scoreNamed(state.score || usualScore()).name;
  $("together").checked = state.together;
  for (const part of all("[data-in]")) part.hidden = !part.dataset.in.split(" ").includes(state.view);
  for (const field of all("#form input, #form textarea, #form select")) field.disabled = field.closest("[data-in][hidden]") !== null;
  for (const link of all("#views a")) {
    link.setAttribute("href", written({ view: link.dataset.view, offset: 0 }));
    if (link.dataset.view === state.view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  $("title").textContent = TITLES[state.view];
  $("submit").textContent = { ask: "Ask", rows: "Show", outliers: "Find outliers", row: "Find neighbours" }[state.view];
  $("submit").disabled = state.view === "ask" && !about.loaded;
  $("filter").hidden = !about.facets.length;
  $("tokens-field").hidden = state.view !== "ask" || about.answer === null;
  $("checkpoints").hidden = about.checkpoints.length < 2 || !["ask", "row"].includes(state.view);
  chips();
  describeScore();
}

function fromForm() {
  const form = { k: $("k").valueAsNumber || 10, opponents: $("opponents").valueAsNumber || 0, tokens: $("tokens").valueAsNumber || 32,
    damping: $("damping").value.trim() || "1", score: $("score").value === usualScore() ? "" : $("score").value, words: $("words").value,
    order: $("order").value, row: $("row").valueAsNumber || 0, checkpoint: $("checkpoint").value, against: $("against").value, together: $("together").checked };
  return state.view === "ask" ? { ...form, q: typed() } : form;
}

// ---- hits ----

function picture([name, source]) { return source.startsWith("data:image/") && make("img", { src: source, alt: name }); }
const pictures = (images) => images.length > 0 && make("p", { class: "images" }, images.map(picture));

function pieces(hit) {
  return hit.pieces.flatMap(({ space, word, shade, value, role }) => [
    role && make("b", { class: "role" }, make("bdi", {}, role)), space,
    value ? make("span", { class: shade || null, title: value }, word) : word]);
}

function textOf(hit) {
  if (hit.images.length && !hit.pieces.some(({ word }) => word)) return null;
  return make("blockquote", { class: "text", dir: "auto" },
    hit.before > 0 && make("small", {}, `${hit.before.toLocaleString("en")} characters before … `), pieces(hit),
    hit.after > 0 && make("small", {}, ` … ${hit.after.toLocaleString("en")} characters after`));
}

function flagsAndFacts(hit) {
  const told = [...hit.facts, ...(hit.beyond ? [["beyond the words", hit.beyond]] : [])];
  return [hit.flags.map((name) => make("b", { class: "flag" }, make("bdi", {}, cut(name, 40)))),
    make("dl", { class: "facts" }, told.map(([name, value]) =>
      make("div", {}, make("dt", {}, make("bdi", {}, cut(name, 40))), make("dd", {}, make("bdi", {}, cut(value, 160))))))];
}

function facts(hit) {
  return make("div", { class: "marks" }, flagsAndFacts(hit),
    make("a", { class: "near", href: written({ view: "row", row: hit.row, score: "", offset: 0 }), "aria-label": `Neighbours of row ${hit.row}` }, "Neighbours"));
}

function hitItem(hit, { shared = new Set(), measured = true } = {}) {
  return make("li", { class: `hit ${hit.sign}${measured ? "" : " plain"}` },
    make("span", { class: "rank" }, make("span", { class: "heard" }, "rank "), String(hit.rank)),
    make("div", { class: "body" }, pictures(hit.images), textOf(hit),
      hit.words && make("p", { class: "heard" }, `Strongest words: ${hit.words}.`),
      shared.has(hit.row) && make("b", { class: "flag both" }, "in both"), facts(hit)),
    measured && make("p", { class: "measure" }, bar(hit.width), make("b", { class: "score" }, hit.score)));
}

function list(hits, extra) {
  return hits.length ? make("ol", { class: "hits" }, hits.map((hit) => hitItem(hit, extra))) : make("p", { class: "none" }, "No example matches.");
}

function questionText(query, generated) {
  const text = query.turns.length ? query.turns.flatMap(([role, said]) => [make("b", { class: "role" }, make("bdi", {}, role)), cut(said, 1200)]) : cut(query.text, 1200);
  return make("h3", { class: "asked", dir: "auto" }, text, query.answer && [" ", make("mark", {}, make("bdi", {}, cut(query.answer, 1200)))], generated && make("small", {}, " answered by the model"));
}

function querySection(answer, place, { note = "", generated = false, shared } = {}) {
  const query = answer.queries[place];
  const told = [note, query.members > 1 && `mean of ${query.members} questions`, query.row ? null : `loss ${query.loss}`].filter(Boolean).join(" · ");
  const section = make("section", { class: "query" }, pictures(query.images), questionText(query, generated), told && make("p", { class: "about" }, told),
    query.row && make("div", { class: "marks" }, flagsAndFacts(query.row)),
    make("h4", { class: "for" }, state.view === "row" ? "Most like it" : "Made it more likely"),
    query.explained && make("p", { class: "legend" }, make("span", { class: "p6" }, "these words"), " raise the example's score, ", make("span", { class: "n6" }, "these"), " lower it"),
    list(query.proponents, { shared }));
  if (query.opponents.length) {
    section.append(make("details", { class: "opponents", "data-part": `opponents ${answer.id} ${place}` },
      make("summary", {}, make("h4", { class: "against" }, state.view === "row" ? "Most unlike it" : "Made it less likely"), make("small", {}, String(query.opponents.length))),
      list(query.opponents, { shared })));
  }
  if (about.columns.length) section.append(sourcesOf(answer, place));
  return section;
}

// ---- sources ----

function sourcesOf(answer, place) {
  const id = `by-${answer.id}-${place}`, out = make("div", {});
  const offered = about.facets.map(({ column }) => column), columns = offered.length ? offered : about.columns;
  const select = make("select", { id });
  options(select, columns.map((column) => [column, column]), columns.includes(state.by) ? state.by : columns[0]);
  const part = make("details", { class: "sources", "data-part": id }, make("summary", {}, make("h4", {}, "Which source did it?"), make("small", {}, "scores of all rows, summed")),
    make("p", { class: "row" }, make("label", { for: id }, "Sum by"), select), out);
  const fill = async () => {
    out.replaceChildren(make("p", { class: "none" }, "Adding up …"));
    try { out.replaceChildren(...sourceRows(await call("api/sources", { answer: answer.id, question: place, column: select.value }))); }
    catch (error) { out.replaceChildren(make("p", { class: "error", role: "alert" }, error.message)); }
  };
  part.addEventListener("toggle", () => { if (part.open && !out.hasChildNodes()) fill(); });
  select.addEventListener("change", fill);
  return part;
}

function sourceRows(found) {
  const most = Math.max(...found.sources.map(({ total }) => Math.abs(total)), 0), shown = found.sources.slice(0, 30);
  const item = ({ value, rows, total, positive, negative }) => make("tr", { class: total < 0 ? "against" : null },
    make("th", { scope: "row" }, button(cut(named(value), 60), () => narrow(found.column, value), { class: "link", title: "Only rows with this value" })),
    make("td", {}, rows.toLocaleString("en")),
    make("td", { class: "measure" }, bar(most ? (100 * Math.abs(total)) / most : 0), make("b", { class: "score" }, number(total))),
    make("td", { class: "apart" }, `${number(positive)} ${number(negative)}`));
  const head = ["", "rows", "sum of scores", "for and against"].map((name, i) => make(i ? "th" : "td", i ? { scope: "col" } : {}, name));
  const left = found.distinct - shown.length;
  return [make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, shown.map(item))), left > 0 && make("p", { class: "none" }, `and ${count(left, "value")} of smaller sums`)].filter(Boolean);
}

// ---- views ----

function downloads(answer, name) {
  return make("p", { class: "downloads" }, "Save ", name && [make("bdi", {}, name), " "], "as ", ["html", "json", "csv"].map((kind) => [make("a", { href: `answers/${answer.id}.${kind}`, download: true }, kind.toUpperCase()), " "]));
}

const damping = (text) => (text !== "auto" && Number.isFinite(Number(text)) ? Number(text) : text);
const checkpoint = (text) => (text === "" ? null : Number(text));
const scoring = () => ({ score: state.score || usualScore(), damping: damping(state.damping), k: state.k, opponents: state.opponents, where: state.where });

async function asked(path, body) {
  const answers = [await call(path, { ...body, checkpoint: checkpoint(state.checkpoint) })];
  const same = path === "api/ask" ? { ...body, questions: answers[0].asked.questions } : body;
  if (state.against !== "" && about.checkpoints.length > 1) answers.push(await call(path, { ...same, checkpoint: checkpoint(state.against) }));
  return answers;
}

// What is shown beside what: two checkpoints' answers to the first question, or two questions of one answer.
function pairOf(answers) {
  if (answers.length === 2) return [[answers[0], 0], [answers[1], 0]];
  return answers[0].queries.length === 2 ? [[answers[0], 0], [answers[0], 1]] : null;
}

function alike(comparison) {
  const { shared, hits, correlation, rows } = comparison;
  const likeness = correlation === null ? "" : ` Over all ${rows.toLocaleString("en")} rows their scores correlate by r = ${correlation.toFixed(2).replace("-", "−")}.`;
  return make("p", { class: "alike" }, make("b", {}, `${shared.length} of ${Math.min(...hits)}`), ` proponents are in both.${likeness}`);
}

function showAnswers(answers, { comparison = null, generated = [] } = {}) {
  const open = new Set(all("details[data-part][open]").map((part) => part.dataset.part));
  const kept = new Map(all("details.sources[open]").map((part) => [part.dataset.part, part]));
  const shared = new Set(comparison?.shared ?? []), checkpoints = answers.length === 2;
  const names = checkpoints && [state.checkpoint, state.against].map((text) => (text === "" ? "all checkpoints" : about.checkpoints[Number(text)]));
  const sections = answers.flatMap((answer, side) => answer.queries.map((_, place) =>
    querySection(answer, place, { note: names ? names[side] : "", generated: generated[place], shared })));
  const paired = comparison !== null && (sections.length === 2);
  if (checkpoints && !paired) { // several questions at two checkpoints: each question's answers side by side
    const half = sections.length / 2;
    sections.splice(0, sections.length, ...Array.from({ length: half }, (_, i) => make("div", { class: "pair" }, sections[i], sections[half + i])));
  }
  $("out").replaceChildren(make("div", { class: "heading" }, make("p", { class: "about" }, summaryOf(answers[0])), answers.map((answer, side) => downloads(answer, names && names[side]))),
    ...(comparison ? [alike(comparison)] : []), paired ? make("div", { class: "pair" }, sections) : make("div", {}, sections));
  for (const part of all("details[data-part]")) {
    if (kept.has(part.dataset.part)) part.replaceWith(kept.get(part.dataset.part));
    else part.open = open.has(part.dataset.part);
  }
  document.body.classList.toggle("wide", checkpoints || paired);
  readable($("out"));
}

function summaryOf({ score, cost }) {
  const lambda = typeof score.damping === "number" ? `, damping ${Number(score.damping.toPrecision(3))}` : "";
  const seconds = cost.gradients + cost.precondition + cost.scan;
  return `by ${score.name}${lambda}, ${count(cost.rows, "row")} in ${seconds.toFixed(2)} s`;
}

async function compared(answers) {
  const pair = pairOf(answers);
  return pair && call("api/compare", { first: [pair[0][0].id, pair[0][1]], second: [pair[1][0].id, pair[1][1]] });
}

async function drawAsk() {
  if (!about.loaded || !state.q.some(([prompt]) => prompt.trim())) return drawWelcome();
  const questions = state.q.map(([prompt, answer, whole]) => ({ prompt, answer, whole }));
  const generated = questions.map(({ answer, whole }) => about.answer !== null && !whole && !answer);
  const wanted = { ...scoring(), questions, together: state.together, tokens: state.tokens };
  await busy(generated.some(Boolean) ? "The model answers …" : "Searching …", async (still) => {
    const answers = await asked("api/ask", wanted);
    if (!still()) return;
    fillIn(answers[0].asked.questions, generated);
    const comparison = await compared(answers);
    if (!still()) return;
    await showColoured(answers, { comparison, generated }, still);
  });
}

// Hits are shown at once; which words matter takes a pass of the model for each, and comes after.
async function showColoured(answers, more, still) {
  showAnswers(answers, more);
  if (!about.loaded) return;
  $("status").textContent = "Colouring the words …";
  try {
    const coloured = await Promise.all(answers.map(({ id }) => call("api/colours", { answer: id })));
    if (still()) showAnswers(coloured, more);
  } catch (error) {
    if (still()) $("out").prepend(make("p", { class: "none" }, `Words have no colours: ${error.message}`));
  }
}

// The model's answers go into the form, and are dropped there when their question changes.
function fillIn(questions, generated) {
  questions.forEach(({ answer }, place) => {
    const field = $(`q${place}-answer`);
    if (field && generated[place]) { field.value = answer; field.dataset.own = "1"; }
  });
}

function drawWelcome() {
  latest += 1;
  document.body.classList.remove("wide", "busy");
  $("status").textContent = "";
  const ask = about.loaded ? `Type what was asked${about.answer === null ? "" : ", and what the model said, or let it answer"}. You get the examples that taught it that, and those that taught it otherwise.`
    : "Questions need the model. Without it you can read the rows, and find their neighbours and outliers.";
  const samples = about.samples.map(({ prompt, answer, whole }) =>
    make("li", {}, button(cut(prompt, 90), () => go({ ...fromForm(), q: [[prompt, answer, whole]] }))));
  $("out").replaceChildren(make("div", { class: "welcome" }, make("p", { class: "lede" }, ask),
    samples.length > 0 && [make("p", { class: "none" }, "From the training data:"), make("ul", {}, samples)],
    make("p", {}, make("a", { href: written({ view: "rows" }) }, "Read the rows"), " · ", make("a", { href: written({ view: "outliers" }) }, "Find outliers"))));
}

async function drawRow() {
  await busy("Searching …", async (still) => {
    const answers = await asked("api/neighbours", { ...scoring(), row: state.row });
    const comparison = await compared(answers);
    if (still()) await showColoured(answers, { comparison }, still);
  });
}

function pager({ total, offset, rows }, name = "Pages") {
  const last = offset + rows.length;
  const turn = (to, text, there) => button(text, () => { go({ ...fromForm(), offset: to }); $("main").focus(); }, { disabled: !there });
  return make("nav", { class: "pager", "aria-label": name }, turn(Math.max(0, offset - 20), "← Before", offset > 0),
    make("span", {}, total ? `${(offset + 1).toLocaleString("en")}–${last.toLocaleString("en")} of ${total.toLocaleString("en")}` : "No row matches."),
    turn(offset + 20, "Next →", last < total));
}

async function drawRows() {
  await busy("Reading …", async (still) => {
    const page = await call("api/rows", { where: state.where, words: state.words, order: state.order, offset: state.offset });
    if (still()) drawList(page, { measured: false });
  });
}

async function drawOutliers() {
  await busy("Every row is scored for itself …", async (still) => {
    const page = await call("api/outliers", { where: state.where, score: state.score || "ridge", damping: damping(state.damping), offset: state.offset });
    const lead = make("p", { class: "about" }, `Each row's score for itself, by ${page.score.name}: large for examples that no other resembles, such as wrong labels. The median over all rows is ${page.median}.`);
    if (still()) drawList(page, { lead });
  });
}

function drawList(page, { measured = true, lead = null }) {
  document.body.classList.remove("wide");
  const first = page.offset + 1;
  $("out").replaceChildren(make("section", { class: "query" }, lead, pager(page),
    page.rows.length > 0 && make("ol", { class: "hits", start: first }, page.rows.map((hit) => hitItem(hit, { measured }))), page.rows.length > 10 && pager(page, "Pages, again")));
  readable($("out"));
}

function draw() {
  toForm();
  const { view } = state;
  return { ask: drawAsk, rows: drawRows, outliers: drawOutliers, row: drawRow }[view]();
}

// ---- events ----

$("form").addEventListener("submit", (event) => { event.preventDefault(); submitted = true; go({ ...fromForm(), offset: 0 }); });
$("add").addEventListener("click", () => { const q = typed(); questions([...q, ["", null, false]]); $(`q${q.length}-prompt`).focus(); });
$("narrow").addEventListener("click", () => { if ($("facet").value) narrow($("column").value, JSON.parse($("facet").value)); });
$("column").addEventListener("change", values);
for (const name of ["score", "damping"]) $(name).addEventListener("input", describeScore);
// Enter asks; with the shift key it begins a line.
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && event.target.localName === "textarea" && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
});
addEventListener("invalid", ({ target }) => { target.closest("details")?.setAttribute("open", ""); }, true);
$("skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
addEventListener("hashchange", () => { state = read(location.hash); draw(); });

async function start() {
  try { about = await call("api/about"); } catch (error) {
    $("out").replaceChildren(make("p", { class: "error", role: "alert" }, error.message));
    return;
  }
  const held = about.there < about.rows ? `, of which ${about.there.toLocaleString("en")} are there yet` : "";
  $("open").replaceChildren(`${count(about.rows, "training example")}${held} in `, make("bdi", {}, about.index), ...(about.loaded ? [" · ", make("bdi", {}, about.loaded)] : []));
  $("missing").hidden = Boolean(about.loaded);
  if (!about.loaded) $("missing").replaceChildren(make("b", {}, "No model is loaded. "), about.missing);
  $("sign").textContent = "A positive score: training on the example lowers the question's loss. A negative one: it raises it. Bars share one scale where scores of different questions compare, else within a question.";
  options($("score"), about.scores.map(({ name }) => [name, name]), "ridge");
  options($("column"), about.facets.map(({ column }) => [column, cut(column, 40)]));
  const checkpoints = about.checkpoints.map((name, at) => [String(at), name]);
  options($("checkpoint"), [["", "all, summed"], ...checkpoints], "");
  options($("against"), [["", "nothing"], ...checkpoints], "");
  values();
  state = read(location.hash);
  document.documentElement.classList.add("ready");
  draw();
}

start();
