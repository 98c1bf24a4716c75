"use strict";
// The page's data are JSON in the element #data: runs (names), their colours, charts, samples, traces. Texts only ever become text
// nodes or attributes, so that nothing in a sample can act as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const SHAPES = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["svg", "g", "line", "path", "circle", "text", "rect"]);
const tip = document.getElementById("tip");

function make(tag, attributes = {}, ...children) {
  const node = DRAWN.has(tag) ? document.createElementNS(SHAPES, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const unique = (values) => [...new Set(values)];
const whole = (value) => Number(value).toLocaleString("en", { maximumFractionDigits: 0 });
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// -- The colour scheme -------------------------------------------------------------------------------

const SCHEMES = { auto: "light dark", light: "light", dark: "dark" };
const themeButton = document.getElementById("theme");

function setTheme(name) {
  document.documentElement.style.colorScheme = SCHEMES[name];
  themeButton.textContent = name;
  themeButton.setAttribute("aria-label", `Colour scheme: ${name}`);
  try { localStorage.setItem("dail_jax theme", name); } catch { /* a page from a file may have no storage */ }
}

let stored = null;
try { stored = localStorage.getItem("dail_jax theme"); } catch { /* as above */ }
setTheme(stored in SCHEMES ? stored : "auto");
themeButton.addEventListener("click", () => {
  const names = Object.keys(SCHEMES);
  setTheme(names[(names.indexOf(themeButton.textContent) + 1) % names.length]);
});

// -- The tip -----------------------------------------------------------------------------------------

function showTip(x, y, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - box.width - 16 : x + 16;
  tip.style.left = `${clamp(left, 6, Math.max(6, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 22 + box.height > innerHeight ? Math.max(6, y - box.height - 14) : y + 22}px`;
}

function hideTip() { tip.hidden = true; }
addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

function rowsOf(pairs) {
  return make("table", {}, ...pairs.map(([name, value, colour]) => make("tr", {},
    make("th", {}, colour === undefined ? null : make("i", { class: `dot c${colour}` }), name), make("td", {}, value))));
}

// -- A list with filters and one item in full --------------------------------------------------------

const LISTED = 300; // entries of the list at one time

function browser(root, items, filters, textOf, label, show) {
  const chosen = {};
  const detail = make("div", { class: "detail", tabindex: 0, role: "region", "aria-label": "The chosen one" });
  const list = make("ul", { class: "list", role: "listbox", tabindex: 0, "aria-label": "To choose from" });
  const count = make("p", { class: "note", role: "status" });
  const search = make("input", { type: "search", placeholder: "text, answer or problem", oninput: () => refill() });
  let found = [], place = 0;

  function refill() {
    const query = search.value.toLowerCase();
    found = items.filter((item) => Object.entries(chosen).every(([name, value]) => value === "" || String(filters[name](item)) === value)
      && (!query || textOf(item).toLowerCase().includes(query)));
    const more = found.length > LISTED ? `, the first ${whole(LISTED)} listed: narrow the filters` : "";
    count.textContent = `${whole(found.length)} of ${whole(items.length)}${more}`;
    list.replaceChildren(...found.slice(0, LISTED).map((item, i) => make("li", { role: "option", id: `${root.parentNode.id}-${i}`, onclick: () => choose(i) }, ...label(item))));
    list.removeAttribute("aria-activedescendant");
    if (found.length) choose(0);
    else detail.replaceChildren(make("p", { class: "note" }, "Nothing matches these filters."));
  }

  function choose(i) {
    place = clamp(i, 0, Math.min(found.length, LISTED) - 1);
    for (const old of list.querySelectorAll("[aria-selected]")) old.removeAttribute("aria-selected");
    const entry = list.children[place];
    entry.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", entry.id);
    const above = entry.offsetTop - list.offsetTop; // scrollIntoView would move the page, too
    if (above < list.scrollTop || above + entry.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = above - 40;
    detail.replaceChildren(...show(found[place], search.value));
    detail.scrollTop = 0;
  }

  list.addEventListener("keydown", (event) => {
    const to = { ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + 10, PageUp: place - 10, Home: 0, End: Infinity }[event.key];
    if (to === undefined || !found.length) return;
    event.preventDefault();
    choose(to);
  });
  const selects = Object.entries(filters).map(([name, of]) => {
    const values = unique(items.map((item) => String(of(item)))).sort(new Intl.Collator("en", { numeric: true }).compare);
    if (values.length < 2) return null;
    const select = make("select", { "data-filter": name, onchange: () => { chosen[name] = select.value; refill(); } },
      make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, value)));
    return make("label", {}, name, select);
  });
  root.append(make("div", { class: "filters" }, ...selects, make("label", {}, "search", search)), count, make("div", { class: "split" }, list, detail));
  refill();
}

function facts(pairs) {
  return make("dl", {}, ...pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}

function marked(text, query) {
  const parts = [], lower = text.toLowerCase(), wanted = query.toLowerCase();
  let from = 0;
  for (let at; wanted && lower.length === text.length && (at = lower.indexOf(wanted, from)) >= 0; from = at + wanted.length) {
    parts.push(text.slice(from, at), make("mark", {}, text.slice(at, at + wanted.length)));
  }
  return make("pre", {}, ...parts, text.slice(from));
}

// -- Samples -----------------------------------------------------------------------------------------

const samplesRoot = document.querySelector("#samples .browser");
const verdict = (s) => (s.correct === null ? "not graded" : s.correct ? "right" : "wrong");
const sign = (s) => (s.correct === null ? "" : s.correct ? "better" : "worse");
if (samplesRoot) {
  browser(samplesRoot, data.samples,
    { arm: (s) => data.runs[s.arm], benchmark: (s) => s.benchmark, budget: (s) => s.budget, verdict, reason: (s) => s.reason,
      finish: (s) => s.finish, problem: (s) => s.problem_id },
    (s) => `${s.problem_id}\n${s.answer ?? ""}\n${s.text}\n${s.forced_text ?? ""}`,
    (s) => [make("span", { class: sign(s) }, { true: "✓ ", false: "✗ " }[s.correct] ?? ""), `${s.problem_id} · ${s.sample}`,
      make("small", {}, make("i", { class: `dot c${data.colours[s.arm]}` }), `${data.runs[s.arm]}, ${s.benchmark}, ${whole(s.tokens)} tokens`)],
    (s, query) => [
      make("h3", {}, `${s.benchmark}: ${s.problem_id}, sample ${s.sample} `, make("span", { class: sign(s) }, verdict(s))),
      facts([["arm", data.runs[s.arm]], ["answer", s.answer ?? "none"], ["gold", s.gold], ["verdict's reason", s.reason], ["finish", s.finish],
        ["tokens", `${whole(s.tokens)} of ${whole(s.budget)}`], ["answer's tokens", s.answer_tokens || null], ["forced tokens", s.forced_tokens || null]]),
      marked(s.text, query),
      ...(s.forced_text ? [make("h4", {}, "Forced answer"), marked(s.forced_text, query)] : [])]);
}

// -- Traces ------------------------------------------------------------------------------------------

const PUSH_END = 3; // nats at which the colour is full
const chance = (log) => (log === null || log === undefined ? null : Math.exp(log));
const share = (p) => (p === null ? "–" : p > 0.9995 ? "100%" : p < 1e-4 ? "< 0.01%" : `${(100 * p).toPrecision(3)}%`);
// A colouring: its name, whether a trace has it, (variable of the hue, strength 0-100) of token i, and its key.
const COLOURINGS = [
  ["who wrote it", () => true, (t, i) => (t.writer[i] === "p" ? ["--hot", 38] : ["--cool", 10]),
    () => [make("span", {}, sampleToken("the student", "s", "--cool", 10)), make("span", {}, sampleToken("the privileged student", "p", "--hot", 38))]],
  ["student's probability", (t) => t.log_student, (t, i) => ["--hot", faint(t.log_student[i])], () => [ramp("one", "0", "1")]],
  ["privileged student's probability", (t) => t.log_privileged, (t, i) => ["--hot", faint(t.log_privileged[i])], () => [ramp("one", "0", "1")]],
  ["log p_PS − log p_NR", (t) => t.push, (t, i) => [t.push[i] < 0 ? "--bad" : "--cool", 60 * Math.min(Math.abs(t.push[i] ?? 0) / PUSH_END, 1)],
    () => [ramp("two", `−${PUSH_END}: the negative reference's, pushed away`, `+${PUSH_END}: the privileged student's`)]],
];
let colouring = 0;
const faint = (log) => (log === null || log === undefined ? 0 : 60 * (1 - Math.exp(log)));
const ramp = (kind, low, high) => make("span", {}, low, make("i", { class: `ramp ${kind}` }), high);

function sampleToken(text, writer, hue, strength) {
  const node = make("span", { class: `t ${writer}` }, text);
  node.style.setProperty("--h", `var(${hue})`);
  node.style.setProperty("--a", strength);
  return node;
}

function tokensOf(trace) {
  const spans = trace.pieces.map((piece, i) => {
    const span = make("span", { class: `t ${trace.writer[i] === "p" ? "p" : "s"}`, tabindex: i ? -1 : 0, "data-i": i });
    for (const part of piece.split(/(\n)/)) {
      if (part === "\n") span.append(make("span", { class: "nl", "aria-hidden": "true" }, "↵"), "\n");
      else if (part) span.append(part);
    }
    return span;
  });
  const box = make("div", { class: "tokens", role: "group", "aria-label": "Tokens: arrow keys move" }, ...spans);

  function paint() {
    const [, has, colour] = COLOURINGS[colouring];
    spans.forEach((span, i) => {
      const [hue, strength] = has(trace) ? colour(trace, i) : ["--cool", 0];
      span.style.setProperty("--h", `var(${hue})`);
      span.style.setProperty("--a", strength.toFixed(0));
    });
  }
  function tell(span, x, y) {
    const i = Number(span.dataset.i), of = (key) => (trace[key] ? trace[key][i] : null);
    const rows = [["position", whole(i + 1)], ["written by", trace.writer[i] === "p" ? "privileged student" : "student"],
      ["student's probability", share(chance(of("log_student")))], ["the privileged student's", share(chance(of("log_privileged")))],
      ["drawn with probability", share(chance(of("logq")))]];
    if (trace.push) rows.push(["log p_PS − log p_NR", of("push") === null || of("push") === undefined ? "–" : of("push").toFixed(2)]);
    const box = span.getBoundingClientRect();
    showTip(x ?? box.left, y ?? box.bottom - 16, make("b", {}, JSON.stringify(trace.pieces[i])), rowsOf(rows));
  }
  const at = (event) => event.target.closest(".t");
  box.addEventListener("pointerover", (event) => { const span = at(event); if (span) tell(span, event.clientX, event.clientY); });
  box.addEventListener("pointerleave", hideTip);
  box.addEventListener("click", (event) => at(event)?.focus({ preventScroll: true }));
  box.addEventListener("focusin", (event) => {
    const span = at(event);
    if (!span) return;
    box.querySelector('[tabindex="0"]')?.setAttribute("tabindex", -1);
    span.setAttribute("tabindex", 0);
    tell(span);
  });
  box.addEventListener("focusout", hideTip);
  box.addEventListener("keydown", (event) => {
    const span = at(event), i = span ? Number(span.dataset.i) : 0;
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (!span || to === undefined) return;
    event.preventDefault();
    spans[clamp(to, 0, spans.length - 1)].focus();
  });
  paint();
  return [box, paint];
}

function showTrace(trace, query) {
  const head = [make("h3", {}, `${trace.problem_id}, sample ${trace.sample}`),
    facts([["tokens", whole(trace.tokens)], ["written by the student", trace.acceptance === null ? null : `${(100 * trace.acceptance).toFixed(1)}%`],
      ["finish", trace.finish], ["dropped for", trace.drop]])];
  if (!trace.pieces) return [...head, marked(trace.text, query), make("p", { class: "note" }, "The tokenizer was not found, so tokens cannot be told apart and coloured.")];
  const [box, paint] = tokensOf(trace), key = make("div", { class: "key" });
  const buttons = COLOURINGS.map(([name, has], i) => make("button", { type: "button", disabled: !has(trace), hidden: !has(trace),
    onclick: () => { colouring = i; update(); } }, name));
  function update() {
    const shown = COLOURINGS[colouring][1](trace) ? colouring : 0;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === shown)));
    key.replaceChildren(...COLOURINGS[shown][3]());
    const wanted = colouring;
    colouring = shown; paint(); colouring = wanted;
  }
  update();
  const cut = trace.tokens > trace.pieces.length ? [make("p", { class: "note" }, `The first ${whole(trace.pieces.length)} of ${whole(trace.tokens)} tokens.`)] : [];
  return [...head, make("div", { class: "bar-row", role: "group", "aria-label": "Colour by" }, ...buttons), key, box, ...cut];
}

const tracesRoot = document.querySelector("#viewer .browser");
if (tracesRoot) {
  browser(tracesRoot, data.traces,
    { traces: (t) => t.file, state: (t) => (t.drop ? t.drop.split(":")[0] : "kept"), finish: (t) => t.finish },
    (t) => `${t.problem_id}\n${t.text}`,
    (t) => [`${t.problem_id} · ${t.sample}`, make("small", {}, `${whole(t.tokens)} tokens${t.acceptance === null ? "" : `, ${(100 * t.acceptance).toFixed(0)}% the student's`}`,
      t.drop ? make("span", { class: "worse" }, " dropped") : null)],
    showTrace);
}
