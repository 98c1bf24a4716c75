// A list with filters, and one of its items in full.

const LISTED = 500; // entries of the list at one time

// `view` has functions of an item: `filters` (name -> its value, or values), `text` (what is searched), `label` and
// `show` (what the list and the detail hold), `link` (its permanent address, as an object) and perhaps `start` (whether
// to start with it). Returns a function that shows the first item whose address has the given parts, and says whether
// there is one.
function browser(root, items, view) {
  const chosen = {};
  const detail = make("div", { class: "detail", tabindex: 0, role: "region", "aria-label": "The chosen one" });
  const list = make("ul", { class: "list", role: "listbox", tabindex: 0, "aria-label": "To choose from" });
  const count = make("p", { class: "note", role: "status" });
  const search = make("input", { type: "search", placeholder: "in all texts", oninput: () => refill() });
  let found = [], place = 0;

  const valuesFor = (name, item) => [view.filters[name](item)].flat().map(String);

  function refill() {
    const query = search.value.toLowerCase();
    found = items.filter((item) => Object.entries(chosen).every(([name, value]) => value === "" || valuesFor(name, item).includes(value))
      && (!query || view.text(item).toLowerCase().includes(query)));
    const more = found.length > LISTED ? `, the first ${whole(LISTED)} listed: narrow the filters` : "";
    count.textContent = `${whole(found.length)} of ${whole(items.length)}${more}`;
    list.replaceChildren(...found.slice(0, LISTED).map((item, i) => make("li", { role: "option", id: `${root.parentNode.id}-${i}`, onclick: () => choose(i, true) }, ...view.label(item))));
    list.removeAttribute("aria-activedescendant");
    if (found.length) choose(Math.max(0, found.findIndex(view.start ?? (() => true))));
    else detail.replaceChildren(make("p", { class: "note" }, "Nothing matches these filters."));
  }

  function choose(i, byReader = false) {
    place = clamp(i, 0, Math.min(found.length, LISTED) - 1);
    for (const old of list.querySelectorAll("[aria-selected]")) old.removeAttribute("aria-selected");
    const entry = list.children[place];
    entry.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", entry.id);
    const above = entry.offsetTop - list.offsetTop; // scrollIntoView would move the page, too
    if (above < list.scrollTop || above + entry.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = above - 40;
    redraw();
    detail.scrollTop = 0;
    if (byReader) setLink(view.link(found[place]));
  }

  function redraw() {
    if (found.length) detail.replaceChildren(...view.show(found[place], search.value, redraw));
  }

  function open(parts) {
    const here = (item) => Object.entries(view.link(item)).every(([name, value]) => parts[name] === undefined || parts[name] === String(value));
    const item = items.find(here);
    if (!item) return false;
    for (const select of selects) if (select) { select.lastChild.value = ""; chosen[select.lastChild.dataset.filter] = ""; }
    search.value = items.indexOf(item) < LISTED ? "" : view.link(item)[Object.keys(view.link(item))[0]];
    refill();
    choose(found.indexOf(item));
    return true;
  }

  list.addEventListener("keydown", (event) => {
    const to = { ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + 10, PageUp: place - 10, Home: 0, End: Infinity }[event.key];
    if (to === undefined || !found.length) return;
    event.preventDefault();
    choose(to, true);
  });
  const selects = Object.keys(view.filters).map((name) => {
    const values = unique(items.flatMap((item) => valuesFor(name, item))).sort(new Intl.Collator("en", { numeric: true }).compare);
    if (values.length < 2) return null;
    const select = make("select", { "data-filter": name, onchange: () => { chosen[name] = select.value; refill(); } },
      make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, value)));
    return make("label", {}, name, select);
  });
  root.append(make("div", { class: "filters" }, ...selects, make("label", { class: "wide" }, "search", search)), count, make("div", { class: "split" }, list, detail));
  refill();
  return open;
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

// -- Permanent addresses -----------------------------------------------------------------------------

const openers = new Map(); // from the first part of an address to its section and to a function that shows what it names

function setLink(parts) {
  try { history.replaceState(null, "", `#${new URLSearchParams(parts)}`); } catch { /* some browsers forbid it to files */ }
}

function linkButton(parts) {
  const button = make("button", { type: "button", class: "link", title: "Copy the address of this entry", onclick: async () => {
    setLink(parts);
    try { await navigator.clipboard.writeText(location.href); button.textContent = "copied"; } catch { button.textContent = "see the address bar"; }
  } }, "link");
  return button;
}

function followLink() {
  const parts = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const [section, open] = openers.get(Object.keys(parts)[0]) ?? [];
  if (open?.(parts)) document.getElementById(section).scrollIntoView();
}
