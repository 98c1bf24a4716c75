// The charts, in the same script as page.js and after it: drawn from the data of charts.py, redrawn when their size or
// the arms that are shown change.

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
