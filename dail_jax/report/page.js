"use strict";
// What all parts of the script share. The page's data are JSON in the element #data: page.py lists their fields. Texts
// only ever become text nodes or attributes, so that nothing in a sample can act as HTML.
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
