"""Opens a report.html in a real headless Chromium: elements, interactions, screenshots in light, dark and phone size.

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
from pathlib import Path
from typing import Any


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


def check(browser: Browser, page: Path, out: Path) -> list[tuple[str, bool, Any]]:
    """(what is checked, whether it holds, the value found) for everything that the page should do."""
    found: list[tuple[str, bool, Any]] = []

    def expect(what: str, value: Any, good: Any = None) -> None:
        found.append((what, bool(value if good is None else good(value)), value))

    run = browser.run
    browser.open(page, 1280, 900, "light")
    data = run("Object.fromEntries(['runs', 'charts', 'samples', 'traces'].map(name => [name, data[name].length]))")
    expect("data", data, lambda d: d["runs"] and d["charts"])
    sections = run("[...document.querySelectorAll('main section')].map(s => s.id)")
    expect("sections", sections, lambda s: {"results", "pass", "lengths", "run"} <= set(s))
    expect("charts drawn", run("document.querySelectorAll('.charts svg.plot').length"))
    expect(
        "every chart has a curve",
        run("[...document.querySelectorAll('.charts svg.plot')].every(s => s.querySelector('path'))"),
    )
    expect("no sideways scrolling at 1280", run("document.documentElement.scrollWidth <= innerWidth"))
    browser.shot(out / "light.png")
    for name in sections:
        browser.shot(out / f"light_{name}.png", f"#{name}")

    # The colour scheme follows the system, and the button overrides it.
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = run(paper)
    run("themeButton.click(); themeButton.click()")
    expect("the button makes it dark", (light, run(paper)), lambda pair: pair[0] != pair[1])
    run("themeButton.click()")
    browser.open(page, 1280, 900, "dark")
    expect("the system's dark scheme", (light, run(paper)), lambda pair: pair[0] != pair[1])
    browser.shot(out / "dark.png")

    # A chart's tooltip, by keyboard.
    run("document.querySelector('.charts svg.plot').focus()")
    time.sleep(0.5)  # the page scrolls there, and scrolling hides tooltips
    browser.key("ArrowRight")
    expect("a chart's tip by keyboard", run("!tip.hidden && tip.textContent"))
    browser.key("Escape")
    expect("Escape hides the tip", run("tip.hidden"))

    if data["samples"]:
        run("document.querySelector('#samples [role=listbox]').focus()")
        reply = "document.querySelector('#samples .split > :last-child').textContent.slice(0, 200)"
        first = run(reply)
        browser.key("ArrowDown")
        expect("the next sample by keyboard", (first, run(reply)), lambda pair: pair[0] != pair[1])
        kinds = run("[...document.querySelectorAll('#samples select')].map(s => [s.dataset.filter, s.options.length])")
        expect("filters of samples", kinds, lambda k: "verdict" in dict(k))
        marks = run("""(() => { const s = document.querySelector('#samples select[data-filter=verdict]');
            return [...s.options].slice(1).map(o => { s.value = o.value; s.dispatchEvent(new Event('change'));
                const shown = [...document.querySelectorAll('#samples [role=option] span')].map(x => x.textContent);
                return [o.value, new Set(shown).size]; }); })()""")
        expect("a verdict alone after filtering by it", marks, lambda m: all(n == 1 for _, n in m))
        listed = "document.querySelector('#samples [role=listbox]')"
        expect("options alone in the list", run(f"[...{listed}.children].every(entry => entry.role === 'option')"))
        active = f"{listed}.getAttribute('aria-activedescendant')"
        actives = [
            run(f"""(() => {{ const s = document.querySelector('#samples input[type=search]');
            s.value = '{text}'; s.dispatchEvent(new Event('input')); return {active}; }})()""")
            for text in ("", "no sample has this")
        ]
        expect("an active option where some match", actives, lambda pair: pair[0] and pair[1] is None)
    if data["traces"]:
        run("document.querySelector('#viewer .split').scrollIntoView()")
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
        expect(
            "a token's figures by keyboard", run("!tip.hidden && tip.textContent"), lambda t: t and "probability" in t
        )
        browser.shot(out / "dark_viewer_tip.png")

    browser.open(page, 390, 844, "light")
    expect("no sideways scrolling on a phone", run("document.documentElement.scrollWidth <= innerWidth"))
    browser.shot(out / "phone.png")
    for name in set(sections) & {"pass", "viewer", "samples"}:
        browser.shot(out / f"phone_{name}.png", f"#{name}")

    kinds = [event for event in browser.events if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    expect("no errors", [e["params"] for e in kinds], lambda errors: not errors)
    asked = {
        e["params"]["request"]["url"].split(":")[0]
        for e in browser.events
        if e.get("method") == "Network.requestWillBeSent"
    }
    expect("nothing asked of a network", sorted(asked), lambda a: set(a) <= {"file", "data"})
    return found


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
