// One conversation, or two beside each other, down to the tokens.

// -- one conversation ----------------------------------------------------------------------------------------

const unpacked = new Map(); // number -> conversation; the last few

async function conversation(number) {
  if (!unpacked.has(number)) {
    const bytes = Uint8Array.from(atob($(`episode-${number}`).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(number, await new Response(stream).json());
    if (unpacked.size > 16) unpacked.delete(unpacked.keys().next().value);
  }
  return unpacked.get(number);
}

function open(number, beside = 0) {
  state.open = byNumber.has(number) ? number : 0;
  state.beside = byNumber.has(beside) && beside !== number ? beside : 0;
  drawRows();
  return read(false);
}

// Show what `state` says. `stay`: the same conversations as before, so that the eye finds its place again.
async function read(stay) {
  remember();
  const numbers = [state.open, state.beside].filter(Boolean);
  const asked = numbers.join();
  const all = await Promise.all(numbers.map(conversation));
  if (asked !== [state.open, state.beside].filter(Boolean).join()) return; // another one was opened meanwhile
  const box = $("panes");
  const place = stay ? placeIn(box) : null;
  const apart = all.length > 1 ? firstDifference(all[0].messages, all[1].messages) : -1;
  box.replaceChildren(...all.map((talk, i) => pane(byNumber.get(numbers[i]), talk, apart)));
  if (place) box.scrollTop += box.querySelectorAll(".said")[place.index].getBoundingClientRect().top - place.top;
  else box.scrollTop = 0;
  document.body.classList.toggle("comparing", numbers.length > 1);
  document.body.classList.toggle("reading", numbers.length > 0);
  if (numbers.length > 1) box.focus(); // the list is out of sight: the keys that moved in it scroll here
  $("policy").setAttribute("aria-pressed", String(state.policy));
  $("tokens").setAttribute("aria-pressed", String(state.tokens));
  $("measure").value = state.measure;
  $("measure").hidden = !state.tokens;
  point(null);
}

function placeIn(box) {
  const edge = box.getBoundingClientRect().top;
  const all = [...box.querySelectorAll(".said")];
  const index = all.findIndex((element) => element.getBoundingClientRect().bottom > edge);
  return index < 0 || !box.scrollTop ? null : { index, top: all[index].getBoundingClientRect().top };
}

function firstDifference(a, b) {
  let i = 0;
  while (i < a.length && i < b.length && JSON.stringify(a[i]) === JSON.stringify(b[i])) i++;
  return i;
}

function pane(row, talk, apart) {
  const element = make("article", "pane", make("h2", "", `${row.number}: ${keyOf(row)}, attempt ${row.attempt}`));
  element.append(facts(row, talk), checks(talk), attempts(row), policy(talk));
  const replies = talk.messages.flatMap(([role], i) => (role === "assistant" ? [i] : []));
  const turnOf = new Map(replies.slice(replies.length - talk.turns.length).map((at, i) => [at, talk.turns[i]]));
  talk.messages.forEach((message, i) => {
    if (i === apart) element.append(make("div", "apart", "from here on they differ"));
    element.append(...spoken(message, turnOf.get(i), row));
  });
  if (talk.detail) element.append(said("malformed", "broken", talk.detail));
  return element;
}

function facts(row, talk) {
  const list = make("div", "facts");
  const add = (name, value, className) => list.append(make("span", "", `${name} `, make("b", className || "", value)));
  if (row.step !== null) add("step", String(row.step));
  add("reward", fixed(row.reward, 2), hue(row.reward));
  add("advantage", fixed(row.advantage, 3, true));
  add("ended by", row.stop);
  add("turns", String(row.turns));
  add("tokens", `${row.tokens}, ${talk.said} said`);
  const seconds = Object.entries(talk.seconds).map(([name, value]) => `${name} ${fixed(value, 1)}`);
  if (seconds.length) add("seconds", seconds.join(", "));
  return list;
}

function checks(talk) {
  const list = make("ul", "checks");
  for (const [kind, name, passed] of talk.checks || []) {
    const mark = make("b", passed ? "good" : "bad", passed ? "✓ passed" : "✗ failed");
    list.append(make("li", "", mark, make("i", "", ` ${kind} `), cut(name)));
  }
  if (talk.note) list.append(make("li", "bad", talk.note));
  if (!list.children.length) list.append(make("li", "", talk.checks ? "nothing was checked" : "no verdict"));
  return list;
}

function attempts(row) {
  const list = make("div", "attempts");
  const others = rows.filter((other) => other !== row && keyOf(other) === keyOf(row)).slice(0, 40);
  if (!others.length) return list;
  list.append("beside another attempt:");
  for (const other of others) {
    const step = other.step === null ? "" : ` step ${other.step},`;
    const button = make("button", hue(other.reward), `${other.number}:${step} ${fixed(other.reward, 2)}`);
    button.addEventListener("click", () => open(row.number === state.beside ? state.open : row.number, other.number));
    if ([state.open, state.beside].includes(other.number)) button.setAttribute("aria-pressed", "true");
    list.append(button);
  }
  return list;
}

function policy(talk) {
  if (!talk.given_tokens) return "";
  if (!state.policy) {
    const button = make("button", "", `policy and tools, ${talk.given_tokens} tokens`);
    button.addEventListener("click", () => toggle("policy"));
    const element = said("policy", "given", "");
    element.lastChild.replaceWith(make("div", "", button));
    return element;
  }
  return said("policy", "given", talk.given ?? "This page was written without the run's tokenizer: see --tokenizer.");
}

// A message as one block for each thing that was said or done in it; a reply also with its tokens.
function spoken([role, content, calls], turn, row) {
  const blocks = [];
  if (role === "user") blocks.push(said("customer", "customer", content));
  else if (role === "tool") blocks.push(said("result", "result", content));
  else if (role === "assistant") {
    if (content || !calls.length) {
      const kind = calls.length ? "thought" : "agent";
      blocks.push(said(turn && turn.error ? `${kind} malformed` : kind, kind, content || "(no words)"));
    }
    for (const [name, args] of calls) {
      const block = said("call", "call", args);
      block.lastChild.prepend(make("b", "", cut(name)), " ");
      blocks.push(block);
    }
  }
  const last = blocks.at(-1);
  if (turn && last) {
    if (turn.error) last.append(make("span"), make("div", "error", `could not be parsed: ${turn.error.slice(0, LONG)}`));
    if (state.tokens) last.append(make("span"), tokens(turn, row));
  }
  return blocks;
}

function said(className, label, text) {
  return make("div", `said ${className}`, make("span", "", label), make("div", "text", cut(text)));
}

// The text itself, or its beginning with a button that gives more, in parts that a browser can set without a pause.
function cut(text) {
  if (text.length <= LONG) return document.createTextNode(text);
  const part = make("span", "", text.slice(0, LONG));
  const button = make("button", "more");
  let shown = LONG;
  const label = () => {
    const next = Math.min(MORE, text.length - shown);
    button.textContent = `show ${next.toLocaleString("en")} of ${(text.length - shown).toLocaleString("en")} more letters`;
  };
  button.addEventListener("click", () => {
    button.before(text.slice(shown, (shown += MORE)));
    if (shown >= text.length) button.remove();
    else label();
  });
  label();
  part.append(button);
  return part;
}

// -- every token -----------------------------------------------------------------------------------------------

// How much of its colour a token gets, from 0 to 1, and the number under it.
const HEAT = {
  logprob: (value) => -value / 4,
  advantage: (value) => Math.abs(value) / 2,
  weight: (value) => Math.abs(value - 1) * 2,
  drift: (value) => Math.abs(value) * 4,
};
const FORM = {
  logprob: (value) => (value !== null && value > -0.005 ? "0" : fixed(value, 2)),
  advantage: (value) => fixed(value, 2, true),
  weight: (value) => fixed(value, 3),
  drift: (value) => (value === null ? "-" : value === 0 ? "0" : value.toExponential(0)),
};

function tokens(turn, row) {
  const element = make("div", "tokens");
  const [ids, words, logprobs, weights, drifts] = turn.tokens;
  ids.forEach((id, i) => {
    const values = { logprob: logprobs[i], advantage: row.advantage, weight: weights[i], drift: drifts[i] };
    const value = values[state.measure];
    const visible = words[i].replaceAll("\n", "↵").replaceAll(" ", "·").replaceAll("\t", "⇥");
    const token = make("span", "token", visible.slice(0, 60) || "∅");
    token.dataset.number = FORM[state.measure](value);
    if (value !== null) {
      token.style.setProperty("--heat", Math.max(0, Math.min(1, HEAT[state.measure](value))).toFixed(3));
      token.classList.toggle("positive", state.measure !== "logprob" && (state.measure === "weight" ? value > 1 : value > 0));
    }
    token.about = { id, word: words[i], version: turn.version, ...values };
    element.append(token);
  });
  return element;
}

// Say all of one token at the foot of the page.
function point(token) {
  document.querySelector(".token[aria-current]")?.removeAttribute("aria-current");
  $("readout").hidden = !token;
  if (!token) return;
  token.setAttribute("aria-current", "true");
  const about = token.about;
  const add = (name, value) => make("span", "", `${name} `, make("b", "", value));
  const percent = about.logprob === null ? "-" : `${(100 * Math.exp(about.logprob)).toPrecision(3)}%`;
  const known = about.logprob !== null && about.drift !== null;
  $("readout").replaceChildren(
    make("code", "", JSON.stringify(about.word)),
    add("id", String(about.id)),
    add("log-probability", `${fixed(about.logprob, 4)} (${percent})`),
    add("trainer's", known ? fixed(about.logprob + about.drift, 4) : "-"),
    add("drift", about.drift === null ? "-" : about.drift.toExponential(2)),
    add("importance weight", fixed(about.weight, 4)),
    add("advantage", fixed(about.advantage, 3, true)),
    add("weights of step", String(about.version)),
  );
}

function nextToken(by) {
  const all = [...document.querySelectorAll(".token")];
  if (!all.length) return;
  const at = all.findIndex((token) => token.hasAttribute("aria-current"));
  const token = all[Math.max(0, Math.min(all.length - 1, at < 0 ? 0 : at + by))];
  point(token);
  token.scrollIntoView({ block: "nearest" });
}

start();
