"use strict";
// The page's data are JSON in the element #data: runs (names), charts, samples, traces. Texts only ever become text
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

// -- Charts ------------------------------------------------------------------------------------------

const hidden = new Set(); // arms that the reader switched off, by name
const redraws = []; // one function a chart
const colourOf = (series) => Math.max(series.colour, 0) % 8;
const dashOf = (series) => ["none", "6 3", "8 3 2 3", "2 3"][Math.floor(Math.max(series.colour, 0) / 8) % 4];

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) found.push(i * step);
  return found;
}

function number(value, percent) {
  if (percent) return `${parseFloat((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(1);
  return parseFloat(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

function plot(chart) {
  const svg = make("svg", { class: "plot", tabindex: 0, role: "img" });
  let state = null; // what the last drawing needs to answer the pointer
  let cursor = null; // the x that is pointed at

  function draw() {
    const width = svg.clientWidth, height = svg.clientHeight;
    const shown = chart.series.filter((series) => !hidden.has(series.name));
    const points = shown.flatMap((series) => series.points);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", `${chart.title}: ${chart.y} by ${chart.x}. ${shown.map((s) => s.name).join(", ")}. Arrow keys read values.`);
    if (!width || !points.length) { state = null; return; }
    const xs = unique(points.map((p) => p[0])).sort((a, b) => a - b);
    const scale = chart.log_x ? Math.log2 : (v) => v;
    let [x0, x1] = [scale(xs[0]), scale(xs.at(-1))];
    if (x0 === x1) [x0, x1] = [x0 - (chart.log_x ? 1 : Math.abs(x0) * 0.1 || 1), x1 + (chart.log_x ? 1 : Math.abs(x1) * 0.1 || 1)];
    if (chart.x === "mean tokens") { const room = (x1 - x0) * 0.06; x0 -= room; x1 += room; }
    let y0 = chart.percent ? 0 : Math.min(...points.map((p) => p[2])), y1 = Math.max(...points.map((p) => p[3]));
    if (y0 === y1) [y0, y1] = [y0 - (Math.abs(y0) * 0.1 || (chart.percent ? 0 : 1)), y1 + (Math.abs(y1) * 0.1 || 1)];
    if (chart.percent && y1 > 0.9 && y1 <= 1) y1 = 1;
    const yTicks = ticks(y0, y1, 4);
    if (yTicks.length > 1 && y1 > yTicks.at(-1) + 1e-12 && y1 !== 1) y1 += (y1 - y0) * 0.04;
    const labels = yTicks.map((v) => number(v, chart.percent));
    const left = 16 + 6.6 * Math.max(...labels.map((l) => l.length)), right = width - 12, top = 22, bottom = height - 36;
    const X = (v) => left + (scale(v) - x0) / (x1 - x0) * (right - left);
    const Y = (v) => bottom - (v - y0) / (y1 - y0) * (bottom - top);
    const P = (x, y) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`;

    yTicks.forEach((v, i) => svg.append(make("line", { class: "rule", x1: left, x2: right, y1: Y(v), y2: Y(v) }),
      make("text", { x: left - 6, y: Y(v) + 4, "text-anchor": "end" }, labels[i])));
    const marks = chart.log_x ? xs : ticks(x0, x1, Math.max(2, Math.floor((right - left) / 70)));
    const every = chart.log_x ? Math.ceil(marks.length / Math.max(2, Math.floor((right - left) / 44))) : 1;
    marks.forEach((v, i) => { if (i % every === 0) svg.append(make("line", { class: "base", x1: X(v), x2: X(v), y1: bottom, y2: bottom + 4 }),
      make("text", { x: X(v), y: bottom + 16, "text-anchor": "middle" }, number(v))); });
    svg.append(make("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }),
      make("text", { class: "axis", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, chart.x),
      make("text", { class: "axis", x: 4, y: 12 }, chart.y));

    for (const series of shown) {
      const group = make("g", { class: `c${colourOf(series)}` }), p = series.points, dash = dashOf(series);
      if (chart.kind === "step") {
        const d = p.map(([x, y], i) => (i ? `H${X(x).toFixed(1)}V${Y(y).toFixed(1)}` : `M${P(x, 0)}V${Y(y).toFixed(1)}`)).join("");
        group.append(make("path", { class: "band", d }), make("path", { class: "curve", d, "stroke-dasharray": dash }));
      } else {
        const band = [...p.map((q) => P(q[0], q[3])), ...p.map((q) => P(q[0], q[2])).reverse()].join("L");
        group.append(make("path", { class: "band", d: `M${band}Z` }),
          make("path", { class: "curve", d: `M${p.map((q) => P(q[0], q[1])).join("L")}`, "stroke-dasharray": dash }));
        if (chart.kind === "marked") {
          for (const q of p) group.append(make("line", { class: "whisker", x1: X(q[0]), x2: X(q[0]), y1: Y(q[2]), y2: Y(q[3]) }),
            make("circle", { class: "point", cx: X(q[0]), cy: Y(q[1]), r: 3.4 }));
        }
      }
      svg.append(group);
    }
    const line = make("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    svg.append(line);
    state = { shown, X, line, xs: chart.kind === "step" ? xs.slice(0, -1) : xs, width };
  }

  function read(index, clientX, clientY) {
    cursor = clamp(index, 0, state.xs.length - 1);
    const x = state.xs[cursor], at = state.X(x), next = state.xs[cursor + 1];
    for (const end of ["x1", "x2"]) state.line.setAttribute(end, at);
    state.line.setAttribute("visibility", "visible");
    const rows = state.shown.map((series) => {
      let q = series.points.find((point) => point[0] === x);
      if (!q && chart.kind === "line") q = series.points.find((point) => point[0] > x);
      const range = q && q[2] !== q[3] ? ` [${number(q[2], chart.percent)}, ${number(q[3], chart.percent)}]` : "";
      return q && [series.name, number(q[1], chart.percent) + range, colourOf(series)];
    }).filter(Boolean);
    const to = chart.kind === "step" && next !== undefined && next - x > 1 && !Number.isInteger(x) ? ` to ${number(next)}` : "";
    const label = chart.kind === "step" && x % 1 === 0.5 && !to ? number(x + 0.5) : number(x) + to;
    const box = svg.getBoundingClientRect();
    showTip(clientX ?? box.left + at, clientY ?? box.top + box.height / 2, make("div", { class: "meta" }, `${chart.x} ${label}`), rowsOf(rows));
  }

  function leave() { hideTip(); if (state) state.line.setAttribute("visibility", "hidden"); }

  svg.addEventListener("pointermove", (event) => {
    if (!state) return;
    const at = event.clientX - svg.getBoundingClientRect().left;
    const far = state.xs.map((x) => Math.abs(state.X(x) - at));
    read(far.indexOf(Math.min(...far)), event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !state) return;
    event.preventDefault();
    read(cursor === null ? 0 : cursor + step);
  });
  new ResizeObserver(draw).observe(svg);
  redraws.push(draw);
  return make("figure", {}, make("figcaption", {}, chart.title), svg);
}

for (const root of document.querySelectorAll(".charts")) {
  const charts = data.charts.filter((chart) => chart.section === root.dataset.section);
  const variants = unique(charts.map((chart) => chart.variant));
  const names = unique(charts.flatMap((chart) => chart.series.map((series) => series.name)));
  const grid = make("div", { class: "grid" });
  const choice = make("select", { "aria-label": "What to show", onchange: () => fill(choice.value) },
    ...variants.map((variant) => make("option", { value: variant }, variant)));
  const fill = (variant) => grid.replaceChildren(...charts.filter((c) => c.variant === variant).map(plot));
  const legend = names.length < 2 ? [] : names.map((name) => {
    const series = charts.flatMap((chart) => chart.series).find((s) => s.name === name);
    const button = make("button", { type: "button", class: "arm", "data-arm": name, "aria-pressed": "true", title: "Show or hide" },
      make("i", { class: `dot c${colourOf(series)}` }), name);
    button.addEventListener("click", () => {
      if (!hidden.delete(name)) hidden.add(name);
      for (const other of document.querySelectorAll(".arm")) other.setAttribute("aria-pressed", String(!hidden.has(other.dataset.arm)));
      redraws.forEach((draw) => draw());
    });
    return button;
  });
  if (variants.length > 1 || legend.length) root.append(make("div", { class: "bar-row" }, variants.length > 1 ? choice : null, ...legend));
  root.append(grid);
  fill(variants[0]);
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
      make("small", {}, make("i", { class: `dot c${s.arm % 8}` }), `${data.runs[s.arm]}, ${s.benchmark}, ${whole(s.tokens)} tokens`)],
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
