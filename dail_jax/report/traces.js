// The trace viewer: every token coloured by who wrote it, or by what the roles think of it.

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
  const head = [make("h3", {}, `${trace.problem_id}, sample ${trace.sample}`, linkButton(traceLink(trace))),
    problemCard(trace.set, trace.problem_id, null, trace.solution),
    make("p", { class: `verdict ${trace.drop ? "worse" : "better"}` }, trace.drop ? "✗ dropped" : "✓ kept", make("small", {}, trace.drop ? `: ${trace.drop}` : "")),
    facts([["tokens", whole(trace.tokens)], ["written by the student", trace.acceptance === null ? null : `${(100 * trace.acceptance).toFixed(1)}%`],
      ["finish", trace.finish]])];
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

const traceLink = (t) => ({ trace: t.problem_id, sample: t.sample, traces: t.file });
const tracesRoot = document.querySelector("#viewer .browser");
if (tracesRoot) {
  openers.set("trace", ["viewer", browser(tracesRoot, data.traces, {
    filters: { traces: (t) => t.file, state: (t) => (t.drop ? t.drop.split(":")[0] : "kept"), finish: (t) => t.finish },
    text: (t) => `${t.problem_id}\n${data.problems[t.set]?.rows[t.problem_id]?.problem ?? ""}\n${t.text}`,
    label: (t) => [`${t.problem_id} · ${t.sample}`, make("small", {}, `${whole(t.tokens)} tokens${t.acceptance === null ? "" : `, ${(100 * t.acceptance).toFixed(0)}% the student's`}`,
      t.drop ? make("span", { class: "worse" }, " dropped") : null)],
    show: showTrace,
    link: traceLink,
  })]);
}
