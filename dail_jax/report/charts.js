// The charts, in the same script as page.js and after it: drawn from the data of charts.py, redrawn when their size or
// the arms that are shown change.

const hidden = new Set(); // arms that the reader switched off, by name
const redraws = []; // one function a chart
const PALETTE = 8;
const UNTRAINED = 3; // the place of the untrained model, whose markers are rings around what it coincides with
const DASHES = ["none", "6 3", "8 3 2 3", "2 3", "11 3", "4 4", "5 2 1 2 1 2", "10 2 4 2"];
const colourOf = (series) => (series.colour < 0 ? "x" : series.colour % PALETTE);
const dashOf = (series) => { const place = Math.max(series.colour, 0); return DASHES[(place + Math.floor(place / PALETTE)) % DASHES.length]; };
const polygon = (...corners) => (x, y, r) => `M${corners.map(([dx, dy]) => `${(x + r * dx).toFixed(1)},${(y + r * dy).toFixed(1)}`).join("L")}Z`;
const disc = (x, y, r) => `M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0Z`;
const up = polygon([0, -1.2], [1.1, 0.8], [-1.1, 0.8]), down = polygon([0, 1.2], [1.1, -0.8], [-1.1, -0.8]);
const MARKERS = [disc, polygon([-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]), up, disc, polygon([0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]), down,
  polygon([0, -1.1], [1.1, -0.3], [0.7, 1], [-0.7, 1], [-1.1, -0.3]), polygon([-1, -1], [0, -0.4], [1, -1], [0.4, 0], [1, 1], [0, 0.4], [-1, 1], [-0.4, 0])];

function marker(series, x, y) {
  const ring = series.colour === UNTRAINED;
  return make("path", { class: ring ? "ring" : "point", d: MARKERS[Math.max(series.colour, 0) % PALETTE](x, y, ring ? 5 : 3.6) });
}

function swatch(series, kind) {
  return make("svg", { class: `swatch c${colourOf(series)}`, "aria-hidden": "true" },
    make("path", { class: "curve", d: "M0,6H30", "stroke-dasharray": dashOf(series) }), kind === "marked" ? marker(series, 15, 6) : null);
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) found.push(i * step + 0); // not -0
  return found;
}

function powers(low, high) {
  const factors = high < 50 * low ? [1, 2, 5] : [1], found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) found.push(...factors.map((f) => f * 10 ** power));
  return found.filter((v) => v >= low && v <= high);
}

// The same digits at every tick of an axis, and in every value that is read from it.
function digits(values) {
  const exact = (d) => values.every((v) => Math.abs(Number(v.toFixed(d)) - v) <= 1e-6 * Math.max(Math.abs(v), 1e-6));
  return [0, 1, 2, 3, 4, 5, 6].find(exact) ?? 6;
}
const fixed = (value, decimals) => value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });

function valueOf(chart, value) {
  if (chart.percent) return `${fixed(100 * value, 1)}%`;
  const [low, high] = chart.span;
  if (chart.log_y || high - low < 1e-5) return value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4) ? String(Number(value.toPrecision(3))) : value.toExponential(2);
  return fixed(value, clamp(3 - Math.floor(Math.log10(high - low)), 0, 6));
}

// Heights for labels, as near to the wanted ones as the gap between any two allows (as in charts.py).
function spread(wanted, gap, low, high) {
  const groups = [];
  const middle = (group) => {
    const half = gap * (group.length - 1) / 2, mean = group.reduce((sum, i) => sum + wanted[i], 0) / group.length;
    return Math.max(Math.min(mean, high - half), low + half);
  };
  groups.push(...[...wanted.keys()].sort((a, b) => wanted[a] - wanted[b]).map((i) => [i]));
  for (let i = 1; i < groups.length;) {
    if (middle(groups[i]) - middle(groups[i - 1]) < gap * (groups[i].length + groups[i - 1].length) / 2 - 1e-9) {
      groups.splice(i - 1, 2, groups[i - 1].concat(groups[i]));
      i = Math.max(1, i - 1);
    } else i++;
  }
  const found = [];
  for (const group of groups) group.forEach((i, k) => { found[i] = middle(group) + gap * (k - (group.length - 1) / 2); });
  return found;
}

const LETTER = 6.1; // the width of one in a label
const shortened = (name, room) => (name.length * LETTER <= room ? name : `${name.slice(0, Math.max(1, Math.floor(room / LETTER) - 1))}…`);

function plot(chart) {
  const svg = make("svg", { class: "plot", tabindex: 0, role: "img" });
  let state = null; // what the last drawing needs to answer the pointer
  let cursor = null; // the x that is pointed at

  function draw() {
    const width = svg.clientWidth, height = svg.clientHeight;
    const shown = chart.series.filter((series) => !hidden.has(series.name));
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", `${chart.title}: ${chart.y} by ${chart.x}. ${shown.map((s) => s.name).join(", ")}. Arrow keys read values.`);
    if (!width || !shown.length) { state = null; return; }
    const xs = unique(shown.flatMap((series) => series.points.map((p) => p[0]))).sort((a, b) => a - b);
    const scale = chart.log_x ? Math.log2 : (v) => v, heights = chart.log_y ? Math.log10 : (v) => v;
    let [x0, x1] = [scale(xs[0]), scale(xs.at(-1))];
    if (x0 === x1) [x0, x1] = [x0 - (chart.log_x ? 1 : Math.abs(x0) * 0.1 || 1), x1 + (chart.log_x ? 1 : Math.abs(x1) * 0.1 || 1)];
    if (chart.kind === "marked") { const room = (x1 - x0) * 0.03; x0 -= room; x1 += room; } // markers are not cut in half
    const [low, high] = chart.span, y0 = heights(low), y1 = heights(high);
    const yTicks = chart.log_y ? powers(low, high) : ticks(Math.max(low, chart.percent ? 0 : low), high, chart.percent ? 5 : 4);
    const decimals = digits(yTicks.map((v) => (chart.percent ? 100 * v : v)));
    const labels = yTicks.map((v) => (chart.log_y ? String(Number(v.toPrecision(3))) : chart.percent ? `${fixed(100 * v, decimals)}%` : fixed(v, decimals)));
    const named = chart.named && shown[0].colour >= 0 && !chart.title.endsWith(`: ${shown[0].name}`);
    const names = named ? Math.min(12 + LETTER * Math.max(...shown.map((s) => s.name.length)), 0.3 * width) : 0;
    const left = 16 + 6.6 * Math.max(...labels.map((l) => l.length)), right = width - 12 - names, top = 22, bottom = height - 36;
    const X = (v) => left + (scale(v) - x0) / (x1 - x0) * (right - left);
    const Y = (v) => bottom - (heights(clamp(v, low, high)) - y0) / (y1 - y0) * (bottom - top);
    const P = (x, y) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`;

    yTicks.forEach((v, i) => svg.append(make("line", { class: "rule", x1: left, x2: right, y1: Y(v), y2: Y(v) }),
      make("text", { x: left - 6, y: Y(v) + 4, "text-anchor": "end" }, labels[i])));
    const marks = chart.log_x ? xs : ticks(scale(xs[0]), scale(xs.at(-1)), Math.max(2, Math.floor((right - left) / 70)));
    const every = chart.log_x ? Math.ceil(marks.length / Math.max(2, Math.floor((right - left) / 44))) : 1;
    const places = digits(marks);
    marks.forEach((v, i) => { if (i % every === 0) svg.append(make("line", { class: "base", x1: X(v), x2: X(v), y1: bottom, y2: bottom + 4 }),
      make("text", { x: X(v), y: bottom + 16, "text-anchor": "middle" }, fixed(v, places))); });
    svg.append(make("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }),
      make("text", { class: "axis", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, chart.x),
      make("text", { class: "axis", x: 4, y: 12 }, chart.y));

    // Of curves that coincide the more broken one is above, and a ring is above what it is around.
    const order = (series) => DASHES.indexOf(dashOf(series)) + PALETTE * (series.colour === UNTRAINED);
    for (const series of [...shown].sort((a, b) => order(a) - order(b))) {
      const group = make("g", { class: `c${colourOf(series)}` }), p = series.points, dash = dashOf(series);
      if (chart.kind === "step") {
        const d = p.map(([x, y], i) => `${i ? `H${X(x).toFixed(1)}` : `M${P(x, 0)}`}V${Y(y).toFixed(1)}`).join("");
        group.append(make("path", { class: "curve", d, "stroke-dasharray": dash }));
      } else {
        const band = [...p.map((q) => P(q[0], q[3])), ...p.map((q) => P(q[0], q[2])).reverse()].join("L");
        group.append(make("path", { class: "band", d: `M${band}Z` }));
        const line = (of) => `M${p.map((q, i) => P(q[0], of(q, i))).join("L")}`;
        if (series.smooth.length) group.append(make("path", { class: "raw", d: line((q) => q[1]) }));
        group.append(make("path", { class: "curve", d: line((q, i) => series.smooth[i] ?? q[1]), "stroke-dasharray": dash }));
        for (const q of p) { // what the axis leaves out
          if (q[3] > high) group.append(make("path", { class: "point", d: up(X(q[0]), top + 3, 3) }));
          if (q[2] < low) group.append(make("path", { class: "point", d: down(X(q[0]), bottom - 3, 3) }));
        }
        if (chart.kind === "marked") {
          for (const q of p) group.append(make("line", { class: "whisker", x1: X(q[0]), x2: X(q[0]), y1: Y(q[2]), y2: Y(q[3]) }), marker(series, X(q[0]), Y(q[1])));
        }
      }
      svg.append(group);
    }
    if (named) {
      const ends = shown.map((s) => [X(s.points.at(-1)[0]), Y(s.smooth.length ? s.smooth.at(-1) : s.points.at(-1)[1])]);
      const at = spread(ends.map(([, y]) => y), 13, top, bottom);
      shown.forEach((series, i) => svg.append(make("g", { class: `c${colourOf(series)}` },
        make("line", { class: "leader", x1: ends[i][0] + 4, y1: ends[i][1], x2: right + 8, y2: at[i] }),
        make("text", { class: "name", x: right + 10, y: at[i] + 4 }, shortened(series.name, names - 10)))));
    }
    const line = make("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    svg.append(line);
    state = { shown, X, line, xs, width };
  }

  function read(index, clientX, clientY) {
    cursor = clamp(index, 0, state.xs.length - 1);
    const x = state.xs[cursor], at = state.X(x);
    for (const end of ["x1", "x2"]) state.line.setAttribute(end, at);
    state.line.setAttribute("visibility", "visible");
    const rows = state.shown.map((series) => {
      const after = series.points.findIndex((point) => point[0] >= x), exact = after >= 0 && series.points[after][0] === x;
      const place = exact || chart.kind === "line" ? after : chart.kind === "step" ? (after < 0 ? series.points.length : after) - 1 : -1;
      const q = series.points[place], of = (value) => valueOf(chart, value);
      if (!q) return null;
      const range = q[2] !== q[3] ? ` [${of(q[2])}, ${of(q[3])}]` : "";
      return [series.name, series.smooth.length ? `${of(series.smooth[place])}, here ${of(q[1])}${range}` : of(q[1]) + range, colourOf(series)];
    }).filter(Boolean);
    const label = fixed(x, digits([x]));
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
  const rows = () => [["series", chart.x, chart.y || "value", "low", "high"], ...chart.series.flatMap((series) => series.points.map((point) => [series.name, ...point]))];
  return make("figure", {}, make("figcaption", {}, chart.title, make("small", {}, chart.note), csvButton([chart.section, chart.variant, chart.title].filter(Boolean).join(" "), rows)), svg);
}

for (const root of document.querySelectorAll(".charts")) {
  const charts = data.charts.filter((chart) => chart.section === root.dataset.section);
  const variants = unique(charts.map((chart) => chart.variant));
  const names = unique(charts.flatMap((chart) => chart.series.map((series) => series.name)));
  const grid = make("div", { class: "grid" });
  const choice = make("select", { "aria-label": "What to show", onchange: () => fill(choice.value) },
    ...variants.map((variant) => make("option", { value: variant }, variant)));
  const fill = (variant) => grid.replaceChildren(...charts.filter((c) => c.variant === variant).map(plot));
  if (variants.length > 1) { // paper has all of them
    addEventListener("beforeprint", () => {
      grid.replaceChildren(...charts.map((chart) => plot({ ...chart, title: `${chart.title}: ${chart.variant}` })));
      redraws.forEach((draw) => draw());
    });
    addEventListener("afterprint", () => fill(choice.value));
  }
  const legend = names.length < 2 ? [] : names.map((name) => {
    const chart = charts.find((c) => c.series.some((s) => s.name === name)), series = chart.series.find((s) => s.name === name);
    const button = make("button", { type: "button", class: "arm", "data-arm": name, "aria-pressed": "true", title: "Show or hide" },
      swatch(series, chart.kind), name);
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
