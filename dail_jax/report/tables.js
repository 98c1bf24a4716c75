// CSV files of tables and charts, and tables whose rows can be sorted.

function csvText(rows) {
  const cell = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  return rows.map((row) => row.map((value) => cell(String(value ?? ""))).join(",")).join("\r\n") + "\r\n";
}

// A button that saves rows, the header first, as a file; `rowsOf` makes them when it is pressed.
function csvButton(name, rowsOf) {
  return make("button", { type: "button", class: "csv", title: `Save as ${name}.csv`, "aria-label": `Save ${name} as CSV`, onclick: () => {
    const address = URL.createObjectURL(new Blob([csvText(rowsOf())], { type: "text/csv" }));
    make("a", { href: address, download: `${name.replace(/[^\w@.-]+/g, "_")}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  } }, "CSV");
}

// The values of a cell: page.py gives those that a number with an interval was made from.
const valuesOf = (cell) => cell.dataset.values?.split(" ") ?? [(cell.dataset.text ?? cell.textContent).trim()];
const ENDS = ["", " low", " high"];

function tableRows(table) {
  const names = table.tHead ? [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim()) : ["", "count", "share"];
  const rows = []; // the cells' values, below the label of their group
  for (const body of table.tBodies) {
    const group = body.querySelector(".group");
    for (const row of body.rows) {
      if (row.contains(group)) continue;
      const cells = [...row.cells].flatMap((cell) => Array(cell.colSpan).fill(valuesOf(cell))).slice(0, names.length);
      rows.push([...(group ? [[group.textContent.trim()]] : []), ...cells]);
    }
  }
  const header = table.querySelector(".group") ? ["benchmark", ...names] : names;
  const widths = header.map((_, i) => Math.max(1, ...rows.map((cells) => cells[i]?.length ?? 1)));
  return [header.flatMap((name, i) => ENDS.slice(0, widths[i]).map((end) => name + end)),
    ...rows.map((cells) => cells.flatMap((values, i) => [...values, ...Array(widths[i] - values.length).fill("")]))];
}

for (const table of document.querySelectorAll("table[data-csv]")) {
  const button = csvButton(table.dataset.csv, () => tableRows(table));
  if (table.caption) table.caption.append(button);
  else table.closest(".scroll").before(button);
}

// Rows are sorted within their group: numbers from the largest at first, texts from A, and back at the second press.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const name = head.textContent.trim();
    head.replaceChildren(make("button", { type: "button", class: "sort", title: `Sort by ${name}`, onclick: () => {
      const numeric = [...table.tBodies].some((body) => [...body.rows].some((row) => row.cells[column]?.dataset.values));
      const up = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : !numeric;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => row.cells.length === heads.length);
        const key = (row) => (numeric ? parseFloat(row.cells[column].dataset.values ?? "NaN") : row.cells[column].textContent.trim());
        rows.sort((a, b) => {
          const [x, y] = up ? [key(a), key(b)] : [key(b), key(a)];
          if (!numeric) return x.localeCompare(y, "en", { numeric: true });
          return Number.isNaN(key(a)) - Number.isNaN(key(b)) || x - y; // rows without a number stay last
        });
        body.append(...rows);
      }
    } }, name));
  });
}
