// Problems: what stands beside every sample and trace, samples of all arms side by side, and solve rates as a map.

// -- One problem -------------------------------------------------------------------------------------

// What a sample or trace was made from: the problem with the chat before it, the gold answer, the expert solutions and their
// waypoints. `only` is the index of the one solution to show.
function problemCard(set, id, gold, only) {
  const known = data.problems[set], row = known?.rows[id];
  if (!row) {
    const why = known?.missing ? `: ${known.missing}` : ": it is not in the data any more";
    return make("div", { class: "problem" }, make("p", { class: "note" }, `The problem cannot be shown${why}.`), gold ? facts([["gold answer", gold]]) : null);
  }
  const choices = row.choices.length ? make("ul", {}, ...row.choices.map((choice, i) => make("li", {}, choice + (i ? "" : " (right)")))) : null;
  const SAID = { system: "System message", user: "Earlier: the user", assistant: "Earlier: the assistant" };
  const before = row.before.flatMap(([role, text]) => [make("h4", {}, SAID[role]), make("pre", {}, text)]);
  const waypoints = (texts) => (texts.length ? [make("h4", {}, "Waypoints"), make("ul", { class: "waypoints" }, ...texts.map((text) => make("li", {}, text)))] : []);
  const title = (i) => (row.solutions.length > 1 ? `Expert solution ${i + 1} of ${row.solutions.length}` : "Expert solution");
  const solutions = row.solutions.flatMap((one, i) => ((only ?? i) === i ? [make("h4", {}, title(i)), make("pre", {}, one.text), ...waypoints(one.waypoints)] : []));
  return make("div", { class: "problem" },
    make("div", {}, ...before, make("h4", {}, "Problem"), make("pre", {}, row.problem), choices, make("h4", {}, "Gold answer"), make("pre", {}, gold || row.answer || "none")),
    solutions.length ? make("div", {}, ...solutions) : null);
}

// -- Samples, side by side ---------------------------------------------------------------------------

const verdict = (s) => (s.correct === null ? "not graded" : s.correct ? "right" : "wrong");
const sign = (s) => (s.correct === null ? "" : s.correct ? "better" : "worse");
const glyph = (s) => (!s || s.correct === null ? "·" : s.correct ? "✓" : "✗");

// The same problem and sample under each arm: {problem, benchmark, budget, sample, rows}, a row or nothing per arm.
function matchedSamples() {
  const found = new Map();
  for (const row of data.samples) {
    const key = JSON.stringify([row.benchmark, row.budget, row.problem_id, row.sample]);
    if (!found.has(key)) found.set(key, { benchmark: row.benchmark, budget: row.budget, problem: row.problem_id, sample: row.sample, rows: Array(data.runs.length).fill(null) });
    found.get(key).rows[row.arm] = row;
  }
  return [...found.values()];
}

const MOST_WORDS = 4e6; // pairs of words that are compared at most
const ALIKE = 0.2; // texts that share less of their words are not marked: everything would be

// The text in pieces [words, whether the other text lacks them], by a longest common subsequence; null if it has little in common.
function differing(text, other) {
  const a = text.split(/(?<=\s)(?=\S)/), b = other.split(/(?<=\s)(?=\S)/);
  if (a.length * b.length > MOST_WORDS) return null;
  const width = b.length + 1, longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) {
    longest[i * width + j] = a[i].trim() === b[j].trim() ? longest[(i + 1) * width + j + 1] + 1
      : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  }
  if (longest[0] < ALIKE * Math.min(a.length, b.length)) return null;
  const pieces = [];
  for (let i = 0, j = 0; i < a.length;) {
    const same = j < b.length && a[i].trim() === b[j].trim();
    if (!same && j < b.length && longest[i * width + j + 1] >= longest[(i + 1) * width + j]) { j++; continue; }
    if (pieces.length && pieces.at(-1)[1] !== same) pieces.at(-1)[0] += a[i];
    else pieces.push([a[i], !same]);
    i++;
    if (same) j++;
  }
  return pieces;
}

function sampleText(row, reference, query) {
  if (!reference || reference === row || query) return [marked(row.text, query)];
  const pieces = differing(row.text, reference.text);
  if (!pieces) return [marked(row.text, query), make("p", { class: "note" }, `Too different from ${data.runs[reference.arm]} to mark.`)];
  return [make("pre", {}, ...pieces.map(([text, lacks]) => (lacks ? make("mark", { class: "differs" }, text) : text)))];
}

let against = data.baseline; // the arm from which differences are marked, -1 for none

function sampleColumn(row, arm, reference, query) {
  const name = make("h4", {}, make("i", { class: `dot c${data.colours[arm]}` }), data.runs[arm]);
  if (!row) return make("article", {}, name, make("p", { class: "note" }, "This arm has no such sample."));
  return make("article", {}, name,
    make("p", { class: `verdict ${sign(row)}` }, `${glyph(row)} ${verdict(row)}`, make("small", {}, `: ${row.reason}`)),
    facts([["answer", row.answer ?? "none"], ["tokens", whole(row.tokens)], ["finish", row.finish],
      ["answer's tokens", row.answer_tokens || null], ["forced tokens", row.forced_tokens || null]]),
    ...sampleText(row, reference, query),
    ...(row.forced_text ? [make("h4", {}, "Forced answer"), marked(row.forced_text, query)] : []));
}

function showSample(item, query, redraw) {
  const rows = item.rows, first = rows.find(Boolean);
  const choice = make("select", { onchange: () => { against = Number(choice.value); redraw(); } },
    make("option", { value: -1 }, "nothing"), ...data.runs.map((name, i) => make("option", { value: i, selected: i === against }, name)));
  const link = sampleLink(item);
  return [
    make("h3", {}, `${item.benchmark}: ${item.problem}, sample ${item.sample}`, linkButton(link)),
    problemCard(first.set, item.problem, first.gold),
    data.runs.length > 1 ? make("label", { class: "inline" }, "mark what differs from ", choice) : null,
    make("div", { class: `columns of${Math.min(data.runs.length, 5)}` }, ...rows.map((row, arm) => sampleColumn(row, arm, rows[against], query)))].filter(Boolean);
}

const sampleLink = (item) => ({ problem: item.problem, sample: item.sample, benchmark: item.benchmark, budget: item.budget });
const outcome = (item) => {
  const verdicts = unique(item.rows.filter(Boolean).map(verdict));
  return verdicts.length > 1 ? "arms differ" : data.runs.length > 1 ? `all ${verdicts[0]}` : verdicts[0];
};

const samplesRoot = document.querySelector("#samples .browser");
if (samplesRoot) {
  const several = data.runs.length > 1 && data.runs.length <= 8;
  const ofArms = several ? Object.fromEntries(data.runs.map((name, i) => [`arm ${name}`, (item) => (item.rows[i] ? verdict(item.rows[i]) : "no sample")])) : {};
  const ofRows = (key) => (item) => unique(item.rows.filter(Boolean).map((row) => row[key]));
  openers.set("problem", ["samples", browser(samplesRoot, matchedSamples(), {
    filters: { benchmark: (item) => item.benchmark, budget: (item) => item.budget, verdict: outcome, ...ofArms, reason: ofRows("reason"), finish: ofRows("finish") },
    text: (item) => [item.problem, data.problems[item.rows.find(Boolean).set]?.rows[item.problem]?.problem,
      ...item.rows.filter(Boolean).map((row) => `${row.answer ?? ""}\n${row.text}\n${row.forced_text ?? ""}`)].join("\n"),
    label: (item) => [make("span", { class: "marks", role: "img", "aria-label": item.rows.map((row, i) => `${data.runs[i]} ${row ? verdict(row) : "without"}`).join(", ") },
      ...item.rows.map((row) => make("b", { class: row ? sign(row) : "" }, glyph(row)))),
      `${item.problem} · ${item.sample}`, make("small", {}, `${item.benchmark}, budget ${whole(item.budget)}`)],
    start: (item) => outcome(item) === "arms differ",
    show: showSample,
    link: sampleLink,
  })]);
}

// -- The map of solve rates --------------------------------------------------------------------------

const ROW = 24; // pixels
const rate = (cell) => (cell ? cell[0] / cell[1] : null);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const ratesOf = (cells) => cells.filter(Boolean).map(rate);
const ORDERS = {
  "hardest first": (cells) => mean(ratesOf(cells)),
  "arms differ most": (cells) => Math.min(...ratesOf(cells)) - Math.max(...ratesOf(cells)),
  "by name": () => 0,
};

// The map of one benchmark: a column per problem, in order, and a row per arm. `missing` is told what cannot be opened.
function solveMap(place, order, room, missing) {
  const columns = place.problems.map((problem, i) => ({ problem, cells: place.right[i], key: order(place.right[i]) })).sort((a, b) => a.key - b.key);
  const width = clamp(Math.floor(room / columns.length), 7, 30), height = ROW * data.runs.length;
  const svg = make("svg", { class: "map", width: width * columns.length, height, viewBox: `0 0 ${width * columns.length} ${height}`, preserveAspectRatio: "none", tabindex: 0, role: "img",
    "aria-label": `Solve rates of ${columns.length} problems. Arrow keys read them, Enter opens the problem.` });
  columns.forEach((column, x) => column.cells.forEach((cell, arm) => {
    const box = { x: x * width + 0.5, y: arm * ROW + 0.5, width: width - 1, height: ROW - 3, rx: 2 };
    svg.append(make("rect", { ...box, class: cell ? "under" : "none" }));
    if (cell && cell[0]) svg.append(make("rect", { ...box, class: "over", "fill-opacity": (0.12 + 0.88 * rate(cell)).toFixed(3) }));
  }));
  const cursor = make("rect", { class: "at", y: 0, width, height: height - 2, rx: 2, visibility: "hidden" });
  svg.append(cursor);
  let at = -1; // the column that is pointed at

  function point(x, clientX, clientY) {
    at = clamp(x, 0, columns.length - 1);
    cursor.setAttribute("x", at * width);
    cursor.setAttribute("visibility", "visible");
    const box = svg.getBoundingClientRect(), { problem, cells } = columns[at];
    showTip(clientX ?? box.left + at * width, clientY ?? box.bottom - 10, make("div", { class: "meta" }, problem),
      rowsOf(cells.map((cell, arm) => [data.runs[arm], cell ? `${(100 * rate(cell)).toFixed(1)}% (${cell[0]} of ${cell[1]})` : "–", data.colours[arm]])));
  }

  function open() {
    const { problem } = columns[at], parts = { problem, benchmark: place.benchmark, budget: String(place.budget) };
    hideTip();
    if (!openers.get("problem")?.[1](parts)) return missing(problem);
    setLink(parts);
    document.getElementById("samples").scrollIntoView();
  }

  const leave = () => { hideTip(); cursor.setAttribute("visibility", "hidden"); };
  const column = (event) => Math.floor((event.clientX - svg.getBoundingClientRect().left) / width);
  svg.addEventListener("pointermove", (event) => point(column(event), event.clientX, event.clientY));
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("click", (event) => { point(column(event), event.clientX, event.clientY); open(); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter" && at >= 0) open();
    if (!step) return;
    event.preventDefault();
    point(at + step);
  });
  const side = (of) => make("div", { class: "side" }, ...data.runs.map(of));
  const passed = (arm) => ratesOf(place.right.map((cells) => cells[arm]));
  return make("div", { class: "heat" },
    side((run, arm) => make("div", { title: run }, make("i", { class: `dot c${data.colours[arm]}` }), run)),
    make("div", { class: "across" }, svg),
    side((_, arm) => make("div", {}, passed(arm).length ? (100 * mean(passed(arm))).toFixed(1) : "–")));
}

function solveMaps(root) {
  const several = (place) => data.solved.some((other) => other !== place && other.benchmark === place.benchmark);
  const name = (place) => place.benchmark + (several(place) ? `, budget ${whole(place.budget)}` : "");
  const where = make("select", { "aria-label": "Benchmark", onchange: () => draw() }, ...data.solved.map((place, i) => make("option", { value: i }, name(place))));
  const order = make("select", { "aria-label": "Order of problems", onchange: () => draw() }, ...Object.keys(ORDERS).map((key) => make("option", { value: key }, key)));
  const frame = make("div"), said = make("p", { class: "note", role: "status" });
  const missing = (problem) => { said.textContent = `No sample of ${problem} is on the page: samples.jsonl of each arm has them.`; };
  const csv = csvButton("solve_rates", () => [["benchmark", "budget", "problem", "arm", "right", "samples"],
    ...data.solved.flatMap((place) => place.problems.flatMap((problem, i) => place.right[i].map((cell, arm) => [place.benchmark, place.budget, problem, data.runs[arm], ...(cell ?? ["", ""])])))]);
  let drawn = 0; // the width that it was drawn for
  let printing = false;

  const map = (place) => solveMap(place, ORDERS[order.value], drawn - 210, missing);
  function draw() {
    drawn = root.clientWidth;
    const titled = (place) => make("div", { class: "unbroken" }, make("h4", {}, name(place)), map(place));
    frame.replaceChildren(...(printing ? data.solved.map(titled) : [map(data.solved[where.value])]));
  }
  root.append(make("div", { class: "bar-row" }, data.solved.length > 1 ? where : null, order,
    make("span", { class: "key" }, "solved", make("i", { class: "ramp cool" }), "0% to 100% of the samples"), make("span", { class: "grow" }), csv), frame, said);
  new ResizeObserver(() => { if (root.clientWidth !== drawn) draw(); }).observe(root);
  for (const event of ["beforeprint", "afterprint"]) addEventListener(event, () => { printing = event === "beforeprint"; draw(); });
}

if (data.solved.length) solveMaps(document.querySelector("#problems .map-root"));
