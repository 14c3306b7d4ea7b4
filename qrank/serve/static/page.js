// The page of `qrank serve`. It uses the server's own API, by relative addresses. Texts become part
// of the page as text nodes; the Content-Security-Policy rules out markup made from strings.

const SAMPLE = {
  query: "how do plants make food?",
  documents: [
    "The mitochondria of a cell release energy from sugar; plants and animals both have them.",
    "To make fresh pasta, mix flour and eggs, knead the dough for ten minutes and let it rest.",
    "A power plant burns gas, coal or biomass to boil water and drive a turbine.",
    "Plants make their own food by photosynthesis: with the energy of sunlight, leaves turn " +
      "carbon dioxide and water into sugar and oxygen.",
    "Roots take up water and minerals from the soil and carry them to the stem.",
    "Chlorophyll, the green pigment of leaves, absorbs red and blue light.",
  ],
};

const CHOSEN_AT_FIRST = 3; // Models; each one takes its time.
const SHOWN_AT_FIRST = 100; // Documents; laying out thousands takes seconds.

const $ = (id) => document.getElementById(id);
const formats = {}; // Digits -> format; making one takes as long as hundreds of numbers.
const number = (value, digits = 0) => (formats[digits] ??= new Intl.NumberFormat("en", {
  minimumFractionDigits: digits, maximumFractionDigits: digits,
})).format(value);
const counted = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

/** An element; strings among the children become text, never markup. */
function element(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

// The server.

/** Ask the server. Throws an Error with the server's own words, and its status. */
async function ask(path, body, signal) {
  const headers = {};
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Error(`The server cannot be reached: ${error.message}`);
  }
  const content = await response.json().catch(() => null);
  if (response.ok && content) return content;
  const said = content?.detail ?? `The server answered with status ${response.status}.`;
  throw Object.assign(new Error(said), { status: response.status });
}

let served = null; // A promise of the models: name -> what /info says about it.

/** The served models. The first call that succeeds lists them to choose from. */
function servedModels() {
  served ??= ask("info").then(listModels).catch((error) => {
    served = null;
    throw error;
  });
  return served;
}

function listModels({ models }) {
  const names = Object.keys(models);
  $("models").hidden = names.length === 1;
  for (const [place, name] of names.entries()) {
    const box = Object.assign(element("input", ""), { type: "checkbox", value: name });
    box.checked = place < CHOSEN_AT_FIRST;
    const target = element("code", "hint", models[name].target ?? "");
    $("models").append(element("label", "", box, element("span", "", name), target));
  }
  return models;
}

/** Rank texts with one model; `scores`, `places` and `cut` are in the order of the texts. */
async function rankWith(model, query, texts, signal) {
  const request = { model, query, documents: texts, return_documents: false };
  const started = performance.now();
  const { results } = await ask("v1/rerank", request, signal);
  const milliseconds = performance.now() - started;
  const run = { model, milliseconds, order: [], scores: [], places: [], cut: [] };
  for (const [place, { index, relevance_score, truncated }] of results.entries()) {
    run.order.push(index);
    run.scores[index] = relevance_score;
    run.places[index] = place;
    run.cut[index] = truncated;
  }
  return run;
}

// The documents.

let loaded = null; // Documents of a file, used instead of the text area.

function documents() {
  if (loaded) return loaded;
  const text = $("documents").value.trim(), blank = /\n[^\S\n]*\n/, way = $("split").value;
  const blocks = way === "blocks" || (way === "auto" && blank.test(text));
  return text.split(blocks ? blank : "\n").map((part) => part.trim()).filter(Boolean);
}

function showCount() {
  const found = documents();
  const blocks = $("split").value === "auto" && !loaded && found.some((part) => part.includes("\n"));
  const said = counted(found.length, "document") + (blocks ? ", split at blank lines" : "");
  $("count").textContent = found.length ? said : "No documents yet";
}

/** Use the documents of a file instead of the text area; null: the text area again. */
function load(found, name = "") {
  loaded = found;
  $("name").textContent = name;
  $("loaded").hidden = !found;
  $("documents").hidden = $("split").hidden = Boolean(found);
  showCount();
}

/** The text of a string, or of an object as `qrank score --jsonl` reads it. */
function textOf(record, where) {
  if (typeof record === "string") return record;
  const { text, title = "", _id } = record ?? {};
  if (typeof text !== "string") throw new Error(`${where}: give a string, or an object with "text".`);
  const apart = title && (_id !== undefined || !text.startsWith(title));
  return apart ? `${title} ${text}` : text;
}

function parseJson(text, where) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${where} is not JSON: ${error.message}`);
  }
}

/** The rows of a CSV text. A field in quotes may hold separators, line ends, and "" for a quote. */
function csvRows(text, separator) {
  const rows = [[""]];
  let quoted = false;
  for (let i = 0; i < text.length; i++) {
    const character = text[i], row = rows.at(-1), last = row.length - 1;
    if (quoted) {
      if (character !== '"') row[last] += character;
      else if (text[i + 1] === '"') row[last] += text[i++];
      else quoted = false;
    } else if (character === '"' && !row[last]) quoted = true;
    else if (character === separator) row.push("");
    else if (character === "\n") rows.push([""]);
    else if (character !== "\r") row[last] += character;
  }
  return rows.filter((row) => row.join(""));
}

function parseCsv(text, name) {
  const [head] = text.split("\n", 1);
  const often = (separator) => head.split(separator).length;
  const [separator] = [",", ";", "\t"].sort((a, b) => often(b) - often(a));
  const [columns = [], ...rows] = csvRows(text, separator);
  const column = columns.findIndex((title) => title.trim().toLowerCase() === "text");
  if (column >= 0) return rows.map((row) => row[column] ?? "");
  throw new Error(`${name} has no column "text"; its columns are: ${columns.join(", ")}`);
}

async function readFile(file) {
  const { name } = file, bytes = new Uint8Array(await file.arrayBuffer());
  // Spreadsheets save "Unicode text" as UTF-16, with this mark.
  const encoding = bytes[0] === 0xff && bytes[1] === 0xfe ? "utf-16le" : "utf-8";
  let text;
  try {
    text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
  } catch {
    throw new Error(`${name} is not text in UTF-8.`);
  }
  const kind = name.toLowerCase().split(".").at(-1);
  if (kind === "json") {
    const found = parseJson(text, name);
    if (!Array.isArray(found)) throw new Error(`${name} is not an array of documents.`);
    load(found.map((record, place) => textOf(record, `${name}, item ${place + 1}`)), name);
  } else if (kind === "jsonl") {
    const lines = text.split("\n").map((line, place) => [line, `${name}, line ${place + 1}`]);
    const filled = lines.filter(([line]) => line.trim());
    load(filled.map(([line, where]) => textOf(parseJson(line, where), where)), name);
  } else if (kind === "csv") {
    load(parseCsv(text, name), name);
  } else {
    $("documents").value = text;
    load(null);
  }
}

async function take(files) {
  $("alert").hidden = true;
  try {
    if (files.length !== 1) throw new Error(`${files.length} files; choose one.`);
    await readFile(files[0]);
  } catch (error) {
    fail(error);
  }
}

// What is shown.

function fail(error) {
  $("alert").textContent = error.message;
  $("alert").hidden = false;
  if (error.status === 401) {
    $("access").hidden = false;
    $("api").hidden = true; // A link sends no key.
    $("key").focus();
  } else {
    $("alert").scrollIntoView({ block: "nearest" });
    $(error.field)?.focus();
  }
}

/** Kendall's tau-b of two models' scores; null if a model gave all documents the same score. */
function kendall(a, b) {
  let agreement = 0, ofA = 0, ofB = 0;
  for (let i = 0; i < a.length; i++) {
    for (let j = 0; j < i; j++) {
      const x = Math.sign(a[i] - a[j]), y = Math.sign(b[i] - b[j]);
      agreement += x * y;
      ofA += x * x;
      ofB += y * y;
    }
  }
  return ofA && ofB ? agreement / Math.sqrt(ofA * ofB) : null;
}

function agreement(a, b) {
  const tau = kendall(a.scores, b.scores);
  const moved = a.places.filter((place, index) => place !== b.places[index]).length;
  const value = element("strong", "", tau === null ? "undefined" : number(tau, 3));
  const rest = `; ${number(moved)} of ${counted(a.order.length, "document")} moved`;
  return element("li", "", `${a.model} and ${b.model}: Kendall’s τ `, value, rest);
}

/** Score -> length of its bar, 0 to 1: the score itself, or its place between lowest and highest. */
function scale(low, high) {
  return low >= 0 && high <= 1 ? (score) => score : (score) => (score - low) / (high - low || 1);
}

function shownScore(score) {
  return score && Math.abs(score) < 0.0001 ? score.toExponential(1) : number(score, 4);
}

function move(before, after) {
  const up = before - after, far = number(Math.abs(up));
  if (!up) return element("span", "move", "=");
  const arrow = element("span", up > 0 ? "up" : "down", `${up > 0 ? "▲" : "▼"} ${far}`);
  arrow.ariaHidden = "true";
  const aloud = element("span", "unseen", `${up > 0 ? "up" : "down"} ${far},`);
  return element("span", "move", arrow, aloud, ` from ${number(before + 1)}`);
}

function row(index, place, before, text, score, length, cut) {
  const bar = element("span", "bar");
  bar.style.setProperty("--length", `${100 * length}%`);
  const made = element(
    "li", "document", element("span", "rank", number(place + 1)), element("p", "text short", text),
    element("span", "score", shownScore(score)), bar, move(before, place),
  );
  if (cut) made.append(element("span", "more", "Too long: only its beginning was read"));
  made.dataset.index = index;
  return made;
}

/** One model's ranking; moves are counted from the first model's, or from the order of the texts. */
function column(run, target, first, texts, limit) {
  const pairs = texts.length / (run.milliseconds / 1000);
  const facts = element(
    "p", "facts", element("code", "", target),
    ` · ${number(run.milliseconds)} ms · ${number(pairs, pairs < 10 ? 1 : 0)} pairs/s`, element("br", ""),
    `▲▼ against ${first ? first.model : "the order you gave"}`,
  );
  facts.title = "Time from the request to the answer, in this browser";
  const length = scale(run.scores[run.order.at(-1)], run.scores[run.order[0]]);
  const rows = run.order.slice(0, limit).map((index, place) => {
    const score = run.scores[index], before = first ? first.places[index] : index;
    return row(index, place, before, texts[index], score, length(score), run.cut[index]);
  });
  const head = element("div", "", element("h2", "", run.model), facts);
  return element("article", "", head, element("ol", "", ...rows));
}

function show(runs, models, texts, limit = SHOWN_AT_FIRST) {
  const [first] = runs;
  $("results").style.setProperty("--documents", Math.min(texts.length, limit));
  $("results").replaceChildren(...runs.map((run) =>
    column(run, models[run.model].target ?? "", run === first ? null : first, texts, limit)));
  $("rest").hidden = texts.length <= limit;
  $("rest").textContent = `Show all ${counted(texts.length, "document")}`;
  $("rest").onclick = () => show(runs, models, texts, Infinity);
  const pairs = runs.flatMap((a, place) => runs.slice(place + 1).map((b) => agreement(a, b)));
  $("agreement").replaceChildren(...pairs);
  $("agreement").hidden = !pairs.length;
  offerWholeTexts();
}

/** Give each text that is cut short a button that shows the whole. */
function offerWholeTexts() {
  const texts = [...document.querySelectorAll(".short")];
  const cut = texts.filter((text) => text.scrollHeight > text.clientHeight + 1);
  for (const text of cut) {
    if (text.parentElement.querySelector("button")) continue;
    const button = element("button", "more", "Show all");
    button.ariaExpanded = "false";
    button.addEventListener("click", () => {
      const whole = !text.classList.toggle("short");
      button.textContent = whole ? "Show less" : "Show all";
      button.ariaExpanded = String(whole);
    });
    text.parentElement.append(button);
  }
}

// What happens.

/** Learn which models there are. */
async function start() {
  $("alert").hidden = true;
  await servedModels().catch(fail);
}

let running = null; // The AbortController of the ranking under way.

async function rank() {
  running?.abort();
  const { signal } = (running = new AbortController());
  const query = $("query").value, texts = documents(), runs = [];
  $("alert").hidden = true;
  $("results").ariaBusy = "true";
  try {
    if (!query.trim()) throw Object.assign(new Error("Write a query."), { field: "query" });
    if (!texts.length) throw Object.assign(new Error("Add documents."), { field: "documents" });
    $("status").textContent = `Ranking ${counted(texts.length, "document")} …`;
    const models = await servedModels();
    const chosen = [...$("models").querySelectorAll(":checked")].map((box) => box.value);
    if (!chosen.length) throw new Error("Choose a model.");
    // One after the other, so that none slows another down.
    for (const model of chosen) {
      runs.push(await rankWith(model, query, texts, signal).catch((error) => {
        if (chosen.length > 1) error.message = `${model}: ${error.message}`;
        throw error;
      }));
      show(runs, models, texts);
    }
    const [{ model }] = runs, milliseconds = runs.reduce((sum, run) => sum + run.milliseconds, 0);
    $("status").textContent = `Ranked ${counted(texts.length, "document")} with ` +
      `${runs.length > 1 ? counted(runs.length, "model") : model} in ${number(milliseconds)} ms.`;
    if (matchMedia("(max-width: 60rem)").matches) $("ranking").scrollIntoView();
  } catch (error) {
    if (signal.aborted) return;
    if (!runs.length) show([], {}, []);
    $("status").textContent = "";
    fail(error);
  }
  $("results").ariaBusy = "false";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (document.activeElement !== $("key")) rank();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  rank();
});
$("sample").addEventListener("click", () => {
  $("query").value = SAMPLE.query;
  $("documents").value = SAMPLE.documents.join("\n");
  load(null);
  rank();
});
$("documents").addEventListener("input", showCount);
$("split").addEventListener("change", showCount);
$("unload").addEventListener("click", () => {
  load(null);
  $("documents").focus();
});
$("file").addEventListener("change", async () => {
  await take($("file").files);
  $("file").value = ""; // So that the same file can be chosen again.
});
for (const name of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("form").classList.toggle("dropping", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files);
  });
}
// The document under the pointer, in all columns.
$("results").addEventListener("pointerover", (event) => {
  const index = event.target.closest(".document")?.dataset.index;
  for (const made of $("results").querySelectorAll(".same")) made.classList.remove("same");
  if (index === undefined || !$("results").querySelector("article + article")) return;
  const same = $("results").querySelectorAll(`[data-index="${index}"]`);
  for (const made of same) made.classList.add("same");
});
window.addEventListener("resize", offerWholeTexts);

$("key").value = sessionStorage.getItem("qrank-key") ?? "";
$("access").hidden = !$("key").value;
$("key").addEventListener("input", () => sessionStorage.setItem("qrank-key", $("key").value));
$("key").addEventListener("change", start);

const dark = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  const chosen = localStorage.getItem("qrank-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
  $("theme").ariaPressed = String(chosen ? chosen === "dark" : dark.matches);
}

$("theme").addEventListener("click", () => {
  localStorage.setItem("qrank-theme", $("theme").ariaPressed === "true" ? "light" : "dark");
  showTheme();
});
dark.addEventListener("change", showTheme);
showTheme();
showCount(); // Browsers keep what was typed across a reload.
start();
