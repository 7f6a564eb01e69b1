"use strict";
// The list, its filters, and all keys; reader.js follows. Whatever anybody said is put in as text (textContent), never as markup.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const COLUMNS = ["number", "split", ...data.columns];
const SHOWN = ["number", ...data.columns];
const TITLES = { number: "#", attempt: "att.", advantage: "adv." };
const TEXTS = new Set(data.texts);
const MEASURES = ["logprob", "advantage", "weight", "drift"];
const ROW = 28; // pixels, as page.css has it
const LONG = 3000; // letters of a message that are shown at first
const MORE = 30000; // and at each further wish
const rows = data.rows.map((values) => Object.fromEntries(COLUMNS.map((name, i) => [name, values[i]])));
const byNumber = new Map(rows.map((row) => [row.number, row]));
const keyOf = (row) => `${row.domain}/${row.split}/${row.task}`;

// What is looked at. It also stands in the address, so that a view can be kept and sent.
const state = { filters: {}, sort: "", down: false, open: 0, beside: 0, tokens: false, policy: false, measure: "logprob" };
let found = rows;
let whole = false; // not before the page is there can it be said what is looked at

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const fixed = (value, digits, sign = false) =>
  value === null ? "-" : (sign && value >= 0 ? "+" : "") + value.toFixed(digits);
const hue = (reward) => (reward === null ? "quiet" : reward >= 1 ? "good" : reward <= 0 ? "bad" : "middling");

// -- which episodes ----------------------------------------------------------------------------------------

const NUMBER = "[-+]?(?:\\d+\\.?\\d*|\\.\\d+)";
const COMPARISON = new RegExp(`^(<=|>=|<|>|=)?\\s*(${NUMBER})$`);
const RANGE = new RegExp(`^(${NUMBER})?\\s*\\.\\.\\s*(${NUMBER})?$`);
const COMPARE = {
  "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
};

// What a value of the column must be, as catalogue.condition reads the same words; null if they say nothing.
function condition(column, words) {
  const text = words.trim();
  if (TEXTS.has(column)) {
    const negated = text.startsWith("!");
    const wanted = (negated ? text.slice(1) : text).trim().toLowerCase();
    return (value) => value.toLowerCase().includes(wanted) !== negated;
  }
  const range = RANGE.exec(text);
  if (range && (range[1] || range[2])) {
    const low = range[1] ? Number(range[1]) : -Infinity;
    const high = range[2] ? Number(range[2]) : Infinity;
    return (value) => value !== null && low <= value && value <= high;
  }
  const comparison = COMPARISON.exec(text);
  if (!comparison) return null;
  const test = COMPARE[comparison[1] || "="];
  return (value) => value !== null && test(value, Number(comparison[2]));
}

function choose() {
  const tests = [];
  for (const input of $("filters").querySelectorAll("input")) {
    const words = state.filters[input.name] || "";
    if (input.value !== words) input.value = words;
    const test = words.trim() ? condition(input.name, words) : () => true;
    input.setAttribute("aria-invalid", String(!test));
    if (words.trim() && test) tests.push([input.name, test]);
  }
  found = rows.filter((row) => tests.every(([name, test]) => test(row[name])));
  if (state.sort) {
    const name = state.sort;
    const way = state.down ? -1 : 1;
    const compare = (a, b) => (a[name] < b[name] ? -way : a[name] > b[name] ? way : 0);
    const having = found.filter((row) => row[name] !== null).sort(compare);
    found = having.concat(found.filter((row) => row[name] === null));
  }
  const graded = found.filter((row) => row.reward !== null);
  const share = graded.length ? `, ${Math.round((100 * graded.filter((row) => row.reward >= 1).length) / graded.length)}% succeeded` : "";
  $("count").textContent = `${found.length} of ${rows.length} episodes${share}`;
  $("none").hidden = found.length > 0;
  for (const button of $("columns").children) {
    const chosen = button.name === state.sort;
    button.textContent = (TITLES[button.name] || button.name) + (chosen ? (state.down ? " ↓" : " ↑") : "");
    if (chosen) button.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    else button.removeAttribute("aria-sort");
  }
  drawRows();
  remember();
}

// -- the list: only the rows that can be seen are in the page ----------------------------------------------

const drawn = new Map(); // number -> its row in the page

function drawRows() {
  const box = $("rows");
  $("space").style.height = `${found.length * ROW}px`;
  $("list").style.setProperty("--bar", `${box.offsetWidth - box.clientWidth}px`); // the heads stand above their columns
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 8);
  const last = Math.min(found.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 8);
  const wanted = new Map();
  for (let i = first; i < last; i++) wanted.set(found[i].number, i);
  for (const [number, element] of drawn) {
    if (!wanted.has(number)) {
      element.remove();
      drawn.delete(number);
    }
  }
  for (const [number, i] of wanted) {
    if (!drawn.has(number)) {
      drawn.set(number, rowElement(byNumber.get(number)));
      $("space").append(drawn.get(number));
    }
    const element = drawn.get(number);
    element.style.transform = `translateY(${i * ROW}px)`;
    element.setAttribute("aria-selected", String(number === state.open));
  }
  if (drawn.has(state.open)) box.setAttribute("aria-activedescendant", `row-${state.open}`);
  else box.removeAttribute("aria-activedescendant");
}

function rowElement(row) {
  const element = make("div", "row");
  element.id = `row-${row.number}`;
  element.setAttribute("role", "option");
  for (const name of SHOWN) {
    const value = row[name];
    const text =
      name === "reward" ? fixed(value, 2) : name === "advantage" ? fixed(value, 2, true) : value === null ? "-" : String(value);
    const cell = make("span", TEXTS.has(name) ? "" : "number", text);
    if (name === "reward") cell.classList.add(hue(value));
    if (TEXTS.has(name)) cell.title = text;
    element.append(cell);
  }
  element.addEventListener("click", () => open(row.number));
  return element;
}

function move(by) {
  const at = found.findIndex((row) => row.number === state.open);
  const to = Math.max(0, Math.min(found.length - 1, at < 0 && by === -1 ? 0 : at + by));
  if (!found.length) return;
  const box = $("rows");
  if (to * ROW < box.scrollTop) box.scrollTop = to * ROW;
  if ((to + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (to + 1) * ROW - box.clientHeight;
  open(found[to].number);
}

// -- mouse, keys, address ------------------------------------------------------------------------------------

function toggle(name) {
  state[name] = !state[name];
  return read(true);
}

function back() {
  if (state.beside) return open(state.open);
  document.body.classList.remove("reading");
  $("rows").focus();
}

function besideNext() {
  const all = rows.filter((row) => state.open && keyOf(row) === keyOf(byNumber.get(state.open)));
  const at = all.findIndex((row) => row.number === (state.beside || state.open));
  const next = all.slice(at + 1).concat(all.slice(0, at + 1)).find((row) => row.number !== state.open);
  if (next) open(state.open, next.number);
}

function theme() {
  const root = document.documentElement;
  const next = { "": "dark", dark: "light", light: "" }[root.dataset.theme || ""];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  $("theme").textContent = next || "light / dark";
}

const KEYS = {
  ArrowDown: () => move(1), j: () => move(1), ArrowUp: () => move(-1), k: () => move(-1),
  PageDown: () => move(20), PageUp: () => move(-20), Home: () => move(-rows.length), End: () => move(rows.length),
  ArrowLeft: () => nextToken(-1), ArrowRight: () => nextToken(1),
  t: () => toggle("tokens"), p: () => toggle("policy"), c: besideNext, d: theme, Escape: back,
  m: () => setMeasure(MEASURES[(MEASURES.indexOf(state.measure) + 1) % MEASURES.length]),
  "/": () => $("filters").querySelector("input[name=task]").focus(),
  Enter: () => (state.open ? $("panes").focus() : move(0)),
};

function setMeasure(name) {
  state.measure = name;
  state.tokens = true;
  return read(true);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const tag = event.target.tagName;
  if (tag === "INPUT") {
    if (event.key === "Escape" || event.key === "Enter") $("rows").focus();
    return;
  }
  if (tag === "SELECT" && event.key !== "Escape") return;
  if (tag === "BUTTON" && event.key === "Enter") return;
  // With the reader in focus, the keys that scroll do scroll.
  const scrolls = ["ArrowDown", "ArrowUp", "PageDown", "PageUp", "Home", "End", "Enter"].includes(event.key);
  if (scrolls && $("panes").contains(event.target)) return;
  if (Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    KEYS[event.key]();
  }
}

let due = 0;

function remember() {
  if (!whole) return;
  clearTimeout(due);
  due = setTimeout(writeAddress, 200); // browsers refuse an address that changes with every key held down
}

function writeAddress() {
  const kept = new URLSearchParams();
  for (const [name, words] of Object.entries(state.filters)) if (words.trim()) kept.set(`only-${name}`, words);
  if (state.sort) kept.set("sort", (state.down ? "-" : "") + state.sort);
  for (const name of ["open", "beside"]) if (state[name]) kept.set(name, state[name]);
  for (const name of ["tokens", "policy"]) if (state[name]) kept.set(name, "1");
  if (state.measure !== "logprob") kept.set("measure", state.measure);
  history.replaceState(null, "", `#${kept}`);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const name of data.columns) state.filters[name] = kept.get(`only-${name}`) || "";
  const sort = kept.get("sort") || "";
  state.down = sort.startsWith("-");
  state.sort = SHOWN.includes(sort.replace("-", "")) ? sort.replace("-", "") : "";
  for (const name of ["tokens", "policy"]) state[name] = kept.has(name);
  state.measure = MEASURES.includes(kept.get("measure")) ? kept.get("measure") : "logprob";
  const [number, beside] = ["open", "beside"].map((name) => Number(kept.get(name)));
  choose();
  if (number) open(number, beside);
}

function start() {
  for (const name of SHOWN) {
    const button = make("button", TEXTS.has(name) ? "" : "number");
    button.name = name;
    button.title = `sort by ${name}`;
    button.addEventListener("click", () => {
      if (state.sort !== name) Object.assign(state, { sort: name, down: false });
      else if (!state.down) state.down = true;
      else Object.assign(state, { sort: "", down: false });
      choose();
    });
    $("columns").append(button);
    if (name === "number") {
      $("filters").append(make("span"));
      continue;
    }
    const input = make("input");
    input.name = name;
    input.autocomplete = "off";
    input.placeholder = TEXTS.has(name) ? "text" : name === "reward" ? "<1" : "";
    input.title = TEXTS.has(name) ? "a part of it, or !part for all others" : "a number, <1, >=2, or 2..5";
    input.setAttribute("aria-label", `only with this ${name}`);
    input.addEventListener("input", () => {
      state.filters[name] = input.value;
      $("rows").scrollTop = 0;
      choose();
    });
    $("filters").append(input);
  }
  $("rows").addEventListener("scroll", drawRows, { passive: true });
  new ResizeObserver(drawRows).observe($("rows"));
  $("clear").addEventListener("click", () => {
    state.filters = {};
    choose();
  });
  $("back").addEventListener("click", back);
  $("policy").addEventListener("click", () => toggle("policy"));
  $("tokens").addEventListener("click", () => toggle("tokens"));
  $("measure").addEventListener("change", (event) => setMeasure(event.target.value));
  $("theme").addEventListener("click", theme);
  $("panes").tabIndex = -1;
  for (const what of ["mouseover", "click"]) {
    $("panes").addEventListener(what, (event) => {
      if (event.target.classList.contains("token")) point(event.target);
    });
  }
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", recall);
  choose();
  requestAnimationFrame(() => setTimeout(() => performance.mark("listed")));
  // The conversations stand behind this script: only when the page is whole can one be opened.
  document.addEventListener("DOMContentLoaded", () => {
    whole = true;
    recall();
    requestAnimationFrame(() => setTimeout(() => performance.mark("whole")));
  });
}


