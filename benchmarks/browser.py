"""Opens a report.html in a real headless Chromium: elements, interactions, screenshots in light, dark and phone size, PDF.

    python benchmarks/browser.py runs/demo/report.html --out /tmp/shots

Ends with exit status 1 if a check fails. It speaks the browser's debugging protocol over a pipe: no driver is needed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Expect = Callable[..., None]


class Browser:
    """One page of a headless Chromium; use it as a context manager."""

    def __init__(self, executable: str):
        self.executable, self.number, self.events = executable, 0, []

    def __enter__(self) -> Browser:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (theirs_in, self.send), (self.receive, theirs_out) = os.pipe(), os.pipe()
        # The browser reads commands from 3 and writes answers to 4.
        command = (
            f"exec 3<&{theirs_in} 4>&{theirs_out}; exec '{self.executable}' --headless=new --no-sandbox "
            f"--disable-gpu --hide-scrollbars --remote-debugging-pipe --user-data-dir='{self.profile.name}' "
            "about:blank"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.session = b"", None
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.read()
            if reply.get("id") == self.number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]
            self.events.append(reply)

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            piece = os.read(self.receive, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has gone")
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, path: Path, width: int, height: int, scheme: str) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 60
        while self.run("document.readyState + location.protocol") != "completefile:" and time.monotonic() < deadline:
            time.sleep(0.1)

    def run(self, script: str) -> Any:
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(f"{script}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def shot(self, path: Path, selector: str | None = None) -> None:
        if selector:
            self.run(f"document.querySelector({selector!r}).scrollIntoView()")
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


class Checks:
    """What was checked: (what, whether it holds, the value found)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bool, Any]] = []

    def expect(self, what: str, value: Any, good: Any = None) -> None:
        self.found.append((what, bool(value if good is None else good(value)), value))


def check(browser: Browser, page: Path, out: Path) -> list[tuple[str, bool, Any]]:
    """(what is checked, whether it holds, the value found) for everything that the page should do."""
    checks, run = Checks(), browser.run
    expect = checks.expect
    browser.open(page, 1280, 900, "light")
    data = run(
        "Object.fromEntries(['runs', 'charts', 'samples', 'traces', 'solved'].map(name => [name, data[name].length]))"
    )
    expect("data", data, lambda d: d["runs"] and d["charts"])
    sections = run("[...document.querySelectorAll('main section')].map(s => s.id)")
    expect("sections", sections, lambda s: {"results", "pass", "lengths", "run"} <= set(s))
    expect("a headline", run("[...document.querySelectorAll('.headline li')].map(s => s.textContent)"))
    expect("charts drawn", run("document.querySelectorAll('.charts svg.plot').length"))
    expect(
        "every chart has a curve",
        run("[...document.querySelectorAll('.charts svg.plot')].every(s => s.querySelector('path'))"),
    )
    expect("no sideways scrolling at 1280", run("document.documentElement.scrollWidth <= innerWidth"))
    browser.shot(out / "light.png")
    for name in sections:
        browser.shot(out / f"light_{name}.png", f"#{name}")
    drawings(browser, expect, "at 1280")
    schemes(browser, page, out, expect)
    charts_by_keyboard(browser, expect)
    tables(browser, expect)
    if data["samples"]:
        samples(browser, expect, data["runs"])
        differences(browser, expect)
    if data["solved"] and data["samples"]:
        heat_map(browser, page, out, expect)
    if data["traces"]:
        trace_viewer(browser, out, expect)
        permalink_of_a_trace(browser, page, expect)
    phone(browser, page, out, expect, sections)
    printed(browser, page, out, expect)
    kinds = [event for event in browser.events if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    expect("no errors", [e["params"] for e in kinds], lambda errors: not errors)
    asked = {
        e["params"]["request"]["url"].split(":")[0]
        for e in browser.events
        if e.get("method") == "Network.requestWillBeSent"
    }
    expect("nothing asked of a network", sorted(asked), lambda a: set(a) <= {"file", "data", "blob"})
    return checks.found


def schemes(browser: Browser, page: Path, out: Path, expect: Expect) -> None:
    """The colour scheme follows the system, and the button overrides it; the borders of controls stand out in both."""
    run, paper = browser.run, "getComputedStyle(document.documentElement).backgroundColor"
    light = run(paper)
    expect("borders of controls, light", run(CONTRAST), lambda least: least >= 3)
    run("themeButton.click(); themeButton.click()")
    expect("the button makes it dark", (light, run(paper)), lambda pair: pair[0] != pair[1])
    run("themeButton.click()")
    browser.open(page, 1280, 900, "dark")
    expect("the system's dark scheme", (light, run(paper)), lambda pair: pair[0] != pair[1])
    expect("borders of controls, dark", run(CONTRAST), lambda least: least >= 3)
    browser.shot(out / "dark.png")


# The least contrast (WCAG 2) of a control's border against the page and the cards.
CONTRAST = """(() => {
    const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const luminance = colour => {
        brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
        const parts = [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255);
        const linear = parts.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const grounds = [document.documentElement, document.querySelector('button')].map(e => luminance(getComputedStyle(e).backgroundColor));
    const shown = [...document.querySelectorAll('button, select, input')].filter(e => e.offsetWidth && parseFloat(getComputedStyle(e).borderTopWidth));
    return Math.min(...shown.flatMap(e => grounds.map(ground => {
        const edge = luminance(getComputedStyle(e).borderTopColor);
        return (Math.max(edge, ground) + 0.05) / (Math.min(edge, ground) + 0.05);
    })));
})()"""


def drawings(browser: Browser, expect: Expect, where: str) -> None:
    """The texts of charts are inside of them and apart, and an arm has the colour that it has in the tables."""
    run, texts = browser.run, "[...document.querySelectorAll('.charts svg.plot text')]"
    outside = f"""{texts}.filter(text => {{
        const own = text.getBoundingClientRect(), whole = text.ownerSVGElement.getBoundingClientRect();
        return own.left < whole.left - 1 || own.right > whole.right + 1 || own.bottom > whole.bottom + 1;
    }}).map(text => text.textContent)"""
    expect(f"texts of charts inside of them {where}", run(outside), lambda found: not found)
    touching = """[...document.querySelectorAll('.charts svg.plot')].filter(svg => {
        const heights = [...svg.querySelectorAll('.name')].map(name => Number(name.getAttribute('y'))).sort((a, b) => a - b);
        return heights.some((y, i) => i && y - heights[i - 1] < 12.9);
    }).length"""
    expect(f"names of curves apart {where}", run(touching), lambda count: count == 0)
    zeros = run(f"{texts}.map(text => text.textContent).filter(text => /^-0(\\.0+)?%?$/.test(text))")
    expect(f"no tick below 0 by its sign alone {where}", zeros, lambda found: not found)
    behind = """['raw', 'curve'].map(kind => document.querySelectorAll(`.charts[data-section=training] svg.plot .${kind}`).length)
        .concat(data.charts.filter(chart => chart.section === 'training').flatMap(chart => chart.series).filter(series => series.smooth.length).length)"""
    expect(f"raw curves behind the smooth ones {where}", run(behind), lambda n: n[0] == n[2] <= n[1])
    colours = """[...document.querySelectorAll('.arm')].filter(button => data.runs.includes(button.dataset.arm)).every(button =>
        button.querySelector('.swatch').classList.contains(`c${data.colours[data.runs.indexOf(button.dataset.arm)]}`))"""
    expect(f"one colour for each arm {where}", run(colours))


def charts_by_keyboard(browser: Browser, expect: Expect) -> None:
    browser.run("document.querySelector('.charts svg.plot').focus()")
    time.sleep(0.5)  # the page scrolls there, and scrolling hides tooltips
    browser.key("ArrowRight")
    expect("a chart's tip by keyboard", browser.run("!tip.hidden && tip.textContent"))
    browser.key("Escape")
    expect("Escape hides the tip", browser.run("tip.hidden"))


def tables(browser: Browser, expect: Expect) -> None:
    """The table of results is sorted by a column, and every CSV button saves a file with as many cells in each row."""
    run = browser.run
    values = "[...document.querySelector('table.results tbody').rows].slice(1).map(r => Number(r.cells[1].dataset.values.split(' ')[0]))"
    head = "document.querySelectorAll('table.results thead th')[1]"
    for order, sign in (("descending", -1), ("ascending", 1)):
        run(f"{head}.querySelector('button').click()")
        found = run(values)
        expect(f"rows {order}", found, lambda v, sign=sign: v == sorted(v, key=lambda x: sign * x))
        expect(f"aria-sort {order}", run(f"{head}.getAttribute('aria-sort')"), lambda v, order=order: v == order)
    files = run("""(async () => {
        const blobs = [], make = URL.createObjectURL;
        URL.createObjectURL = blob => { blobs.push(blob); return 'data:,'; };
        for (const button of document.querySelectorAll('button.csv')) button.click();
        URL.createObjectURL = make;
        return Promise.all(blobs.map(blob => blob.text()));
    })()""")
    rows = [[line.count(",") for line in csv.splitlines()] for csv in files]
    expect("CSV files", [len(lines) for lines in rows], lambda n: n and min(n) >= 2)
    plain = [lines for lines, csv in zip(rows, files, strict=True) if '"' not in csv]
    expect("rows of CSV files", [sorted(set(lines)) for lines in plain], lambda sets: all(len(s) == 1 for s in sets))
    buttons = run("document.querySelectorAll('button.csv').length")
    wanted = run("document.querySelectorAll('table[data-csv], figure').length")
    expect("a CSV file of every table and chart", (buttons, wanted), lambda pair: pair[0] >= pair[1])


def samples(browser: Browser, expect: Expect, arms: int) -> None:
    run = browser.run
    run("document.querySelector('#samples [role=listbox]').focus()")
    head = "document.querySelector('#samples .detail h3').textContent"
    first = run(head)
    browser.key("ArrowDown")
    expect("the next sample by keyboard", (first, run(head)), lambda pair: pair[0] != pair[1])
    expect("an arm beside the other", run("document.querySelectorAll('#samples article').length"), lambda n: n == arms)
    expect("the problem beside it", run("document.querySelector('#samples .detail .problem').textContent"))
    matched = run("(items => [items.filter(i => i.rows.every(Boolean)).length, items.length])(matchedSamples())")
    expect("the same samples of all arms", matched, lambda pair: pair[0] == pair[1])
    kinds = run("[...document.querySelectorAll('#samples select[data-filter]')].map(s => s.dataset.filter)")
    expect("filters of samples", kinds, lambda k: "verdict" in k)
    marks = run("""(() => { const s = document.querySelector('#samples select[data-filter=verdict]');
        const found = [...s.options].slice(1).filter(o => o.value.startsWith('all')).map(o => {
            s.value = o.value; s.dispatchEvent(new Event('change'));
            return new Set([...document.querySelectorAll('#samples [role=option] .marks b')].map(x => x.textContent)).size; });
        s.value = ''; s.dispatchEvent(new Event('change')); return found; })()""")
    expect("a verdict alone after filtering by it", marks, lambda m: all(n == 1 for n in m))
    listed = "document.querySelector('#samples [role=listbox]')"
    expect("options alone in the list", run(f"[...{listed}.children].every(entry => entry.role === 'option')"))
    active = f"{listed}.getAttribute('aria-activedescendant')"
    actives = [
        run(f"""(() => {{ const s = document.querySelector('#samples input[type=search]');
        s.value = '{text}'; s.dispatchEvent(new Event('input')); return {active}; }})()""")
        for text in ("no sample has this", "")
    ]
    expect("an active option where some match", actives, lambda pair: pair[1] and pair[0] is None)


def differences(browser: Browser, expect: Expect) -> None:
    """Words that the other text lacks are marked, and nothing where the texts have little in common."""
    pieces = browser.run("differing('a b c d e', 'a b x d e')")
    expect("a word that differs", pieces, lambda p: p == [["a b ", False], ["c ", True], ["d e", False]])
    expect("equal texts", browser.run("differing('a b', 'a b')"), lambda p: p == [["a b", False]])
    expect("other texts", browser.run("differing('a b c d e f g', 'h i j k l m n')"), lambda p: p is None)
    expect(
        "a text that was cut",
        browser.run("differing('a b', 'a b c')"),
        lambda p: p == [["a ", False], ["b", False]] or p == [["a b", False]],
    )


def heat_map(browser: Browser, page: Path, out: Path, expect: Expect) -> None:
    """The map opens a problem, whose address opens it again."""
    run, head = browser.run, "document.querySelector('#samples .detail h3').textContent"
    run("document.querySelector('#problems').scrollIntoView(); document.querySelector('#problems svg.map').focus()")
    time.sleep(0.5)  # scrolling hides tooltips
    for _ in range(3):
        browser.key("ArrowRight")
    name = run("tip.querySelector('.meta').textContent")
    expect("a problem's solve rates by keyboard", run("!tip.hidden && tip.textContent"), lambda t: t and "of" in t)
    browser.shot(out / "dark_map.png")
    browser.key("Enter")
    expect("the map opens the problem", (name, run(head)), lambda pair: pair[0] in pair[1])
    address, shown = run("location.hash"), run(head)
    expect("its address", address, lambda a: a.startswith("#problem="))
    browser.open(page, 1280, 900, "dark")
    run(f"location.hash = {address!r}")
    time.sleep(0.3)
    expect("the address opens it again", (shown, run(head)), lambda pair: pair[0] == pair[1])
    run("location.hash = '#constructor=1&x=y'")
    time.sleep(0.1)
    expect("an address of nothing changes nothing", run(head), lambda now: now == shown)


def trace_viewer(browser: Browser, out: Path, expect: Expect) -> None:
    run = browser.run
    run("document.querySelector('#viewer .split').scrollIntoView()")
    shares = run(
        "data.traces.filter(t => !t.drop && t.acceptance !== null).map(t => Math.min(t.acceptance, 1 - t.acceptance))"
    )
    expect("it opens on the most mixed trace", shares[:3], lambda s: not s or s[0] >= max(shares) - 1e-3)
    expect("the problem beside the trace", run("document.querySelector('#viewer .detail .problem').textContent"))
    buttons = "[...document.querySelectorAll('#viewer .bar-row button')].filter(b => !b.hidden)"
    expect("ways to colour a trace", run(f"{buttons}.map(b => b.textContent)"), lambda names: len(names) >= 3)
    expect("tokens of a trace", run("document.querySelectorAll('#viewer .tokens .t').length"))
    tokens = "[...document.querySelectorAll('#viewer .tokens .t')]"
    colours = f"JSON.stringify({tokens}.map(t => getComputedStyle(t).backgroundColor))"
    seen = set()
    for i in range(run(f"{buttons}.length")):
        run(f"{buttons}[{i}].click()")
        seen.add(run(colours))
        browser.shot(out / f"dark_viewer_{i}.png", "#viewer")
    expect("each way colours differently", len(seen), lambda n: n == run(f"{buttons}.length"))
    run("document.querySelector('#viewer .tokens .t').focus()")
    for _ in range(3):
        browser.key("ArrowRight")
    expect("a token's figures by keyboard", run("!tip.hidden && tip.textContent"), lambda t: t and "probability" in t)
    browser.shot(out / "dark_viewer_tip.png")


def permalink_of_a_trace(browser: Browser, page: Path, expect: Expect) -> None:
    run, head = browser.run, "document.querySelector('#viewer .detail h3').textContent"
    run("document.querySelector('#viewer [role=listbox]').focus()")
    browser.key("End")
    address, shown = run("location.hash"), run(head)
    browser.open(page, 1280, 900, "dark")
    run(f"location.hash = {address!r}")
    time.sleep(0.3)
    expect(
        "the address of a trace opens it", (address, shown, run(head)), lambda t: t[0][:7] == "#trace=" and t[1] == t[2]
    )


def phone(browser: Browser, page: Path, out: Path, expect: Expect, sections: list[str]) -> None:
    browser.open(page, 390, 844, "light")
    expect("no sideways scrolling on a phone", browser.run("document.documentElement.scrollWidth <= innerWidth"))
    drawings(browser, expect, "on a phone")
    browser.shot(out / "phone.png")
    for name in sections:
        browser.shot(out / f"phone_{name}.png", f"#{name}")


def printed(browser: Browser, page: Path, out: Path, expect: Expect) -> None:
    """On paper, from a dark screen: light, with keys, folds open, every variant of the charts, and nothing clipped."""
    run = browser.run
    browser.open(page, 1280, 900, "dark")
    run("themeButton.click(); themeButton.click()")  # dark, whatever the system says
    pdf = base64.b64decode(browser.call("Page.printToPDF", preferCSSPageSize=True)["data"])
    (out / "printed.pdf").write_bytes(pdf)
    expect("pages of the PDF", pdf.count(b"/Type /Page") - pdf.count(b"/Type /Pages"), lambda n: n > 3)
    browser.call("Emulation.setDeviceMetricsOverride", width=703, height=1032, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", media="print")
    run("dispatchEvent(new Event('beforeprint'))")
    time.sleep(0.3)
    paper = run("getComputedStyle(document.documentElement).colorScheme")
    expect("a light page on paper", paper, lambda scheme: scheme == "light")
    expect("folds are open", run("[...document.querySelectorAll('details:not(.text)')].every(d => d.open)"))
    hidden = """[...document.querySelectorAll('main *')].filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1
        && getComputedStyle(e).display !== 'inline' && !['visible'].includes(getComputedStyle(e).overflowX))
        .map(e => e.tagName + '.' + e.className)"""
    expect("nothing is clipped", run(hidden), lambda found: not found)
    wide = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && e.offsetWidth).map(e => e.tagName + '.' + e.className)"
    expect("nothing leaves the paper", run(wide), lambda found: not found)
    wanted = run("data.charts.length")
    expect(
        "all charts are printed",
        (run("document.querySelectorAll('.charts figure').length"), wanted),
        lambda p: p[0] == p[1],
    )
    maps = run("[document.querySelectorAll('svg.map').length, data.solved.length]")
    expect("all maps are printed", maps, lambda pair: pair[0] == pair[1])
    keys = """[...document.querySelectorAll('.charts')].filter(c => c.querySelectorAll('.arm').length)
        .every(c => [...c.querySelectorAll('.arm')].every(b => b.offsetWidth))"""
    expect("the keys are printed", run(keys))
    run("dispatchEvent(new Event('afterprint'))")
    expect("and folded again", run("[...document.querySelectorAll('details')].some(d => !d.open)"))
    browser.call("Emulation.setEmulatedMedia", media="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("shots"))
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome") or "chromium")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with Browser(args.browser) as browser:
        found = check(browser, args.page, args.out)
    for what, good, value in found:
        print(f"{'ok  ' if good else 'FAIL'} {what}: {str(value)[:300]}")
    return 0 if all(good for _, good, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
