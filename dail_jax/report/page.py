"""report.html: one page for a run or a comparison of runs, which needs no network and no server.

Tables are written here; charts, samples and traces are embedded as JSON, which the page's own script draws. Every text
from a model or a dataset is escaped by the template or as JSON, and a content security policy with the hashes of the
page's own script and style keeps the browser from running or fetching anything else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from dail_jax.evaluate import protocol
from dail_jax.report import charts, collect, diagnosis, headline
from dail_jax.report.collect import Run, TraceFile, setting
from dail_jax.report.problems import Problems
from dail_jax.rundir import read_manifest, write_atomic

# The files that the page's style and its script are joined from, in this order.
STYLES = ("page", "charts", "browse")
SCRIPTS = ("page", "tables", "charts", "browse", "problems", "traces", "links")

# The first rows of the table that says what was run; the settings in which runs differ follow.
SETTINGS = (
    "model.path",
    "data.path",
    "seed",
    "train.objective",
    "train.gamma",
    "train.kl",
    "train.epochs",
    "train.batch_size",
    "train.lora.rank",
    "train.optimizer.learning_rate",
    "generate.tau",
    "generate.sampling.temperature",
    "evaluate.samples",
    "evaluate.budget",
    "evaluate.sampling.temperature",
)
SECTIONS = {"pass": "pass@k", "budget": "Accuracy and tokens", "lengths": "Token lengths", "training": "Training"}


def write(
    runs: Mapping[str, Path],
    out: Path,
    title: str,
    traces: Path | None = None,
    decode: Callable[[list[int]], list[str]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the page for run directories by name (arm), and returns its path; any file of a run may be missing.

    `traces` is the traces.jsonl (or its folder) that the arms share; without it each run's own is shown. `decode` gives
    the text of each token id; without it the trace viewer cannot colour tokens. `config` is the configuration in force,
    whose titles stand above those that the runs have recorded. Raises UserError if a directory is missing or a file is
    damaged.
    """
    found, shown = collect.read(runs, traces)
    if config is not None:
        found = [replace(run, config=collect.relabelled(run.config, config, run.name)) for run in found]
    for trace in (row for file in shown for row in file.rows):
        ids = trace.pop("ids")
        trace["pieces"] = decode(ids) if decode is not None else None
    folders = [*([Path(traces).parent] if traces else []), *map(Path, runs.values())]
    html = render(
        found,
        shown,
        title,
        about=(config or {}).get("about") or "",
        legend=((config or {}).get("data") or {}).get("about") or "",
        left_out=collect.left_out(runs, traces),
        took=_took([read_manifest(folder) for folder in dict.fromkeys(folders)]),
    )
    write_atomic(out, html.encode("utf-8", "replace"))
    return out


def render(
    runs: Sequence[Run],
    traces: Sequence[TraceFile],
    title: str,
    about: str = "",
    legend: str = "",
    left_out: Sequence[str] = (),
    took: str = "",
) -> str:
    """The page's HTML; equal runs give equal bytes."""
    html, css, js = joined("page", "html"), joined(*STYLES, "css"), joined(*SCRIPTS, "js")
    css += "".join(f".c{i} {{ --c: light-dark({a}, {b}); }}\n" for i, (a, b) in enumerate(charts.COLOURS))
    found, problems = charts.build(runs, traces), Problems(runs, traces)
    solved, colours = _solved(runs), [place % len(charts.COLOURS) for place in charts.colours(runs)]
    data = {
        "runs": [run.name for run in runs],
        "colours": colours,
        "baseline": diagnosis.baseline(runs),
        "charts": [{**asdict(chart), "named": charts.ends_together(chart)} for chart in found],
        "samples": [{"arm": i, **row} for i, run in enumerate(runs) for row in run.samples],
        "traces": [{"file": t.name, **row} for t in traces for row in t.rows],
        "problems": [asdict(one) for one in problems.sets],
        "solved": solved,
    }
    present, settings = {chart.section for chart in found}, _settings(runs)
    return (
        jinja2.Environment(autoescape=True, trim_blocks=True)
        .from_string(html)
        .render(
            title=title,
            css=css,
            js=js,
            css_hash=_hash(css),
            js_hash=_hash(js),
            data=_json(data),
            runs=runs,
            colours=colours,
            traces=traces,
            settings=settings,
            about=about,
            legend=legend,
            headline=headline.compose(headline.outcome(runs, problems.solutions)),
            took=took,
            arms=[(run.name, run.title, setting(run.config, "about") or "", run.objective) for run in runs],
            benchmarks=_benchmarks(runs),
            summary=_summary(settings),
            solved=solved,
            tau=setting(runs[0].config, "generate.tau"),
            header=_header(runs),
            results=_results(runs),
            findings=diagnosis.find(runs, traces),
            left_out=left_out,
            captions=charts.CAPTIONS,
            sections={key: name for key, name in SECTIONS.items() if key in present},
            samples=(len(data["samples"]), sum(run.total for run in runs)),
            shown=(len(data["traces"]), sum(t.total for t in traces)),
            limits=collect,
        )
    )


def joined(*names: str) -> str:
    """The page's source files of the kind that is named last, one after the other."""
    *parts, kind = names
    room = resources.files("dail_jax.report")
    return "\n".join(room.joinpath(f"{part}.{kind}").read_text("utf-8") for part in parts)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: Any) -> str:
    """JSON that can neither end the script element that holds it nor open a comment in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------------------------------------------
# What was run
# ---------------------------------------------------------------------------------------------------


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(name, value in each run, whether these differ) of everything that identifies runs."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    named = ("run_dir", "title", "about")  # what differs between arms by nature
    differing = [
        key
        for key in keys
        if key not in named and not key.startswith("arms.") and len({tree.get(key, "") for tree in flat}) > 1
    ]
    rows = [
        (key, [tree.get(key, "") for tree in flat]) for key in dict.fromkeys([*SETTINGS, *differing]) if key in keys
    ]
    for key in ("platform", "device_kind", "devices", "processes", "python", "source", "xla_flags"):
        rows.append((key.replace("_", " "), [str(run.manifest.get(key, "")) for run in runs]))
    versions = dict.fromkeys(name for run in runs for name in run.manifest.get("versions", {}))
    rows += [(name, [run.manifest.get("versions", {}).get(name, "") for run in runs]) for name in versions]
    stages = dict.fromkeys(name for run in runs for name in run.manifest.get("stages", {}))
    rows += [
        (f"stage {name}", [_duration(run.manifest.get("stages", {}).get(name)) for run in runs]) for name in stages
    ]
    return [(key, values, len(set(values)) > 1) for key, values in rows if any(values)]


def _summary(settings: Sequence[tuple[str, list[str], bool]]) -> str:
    """The line below the title: what all runs have in common."""
    known = {key: values[0] for key, values, differ in settings if not differ}
    parts = [
        Path(path).name if (path := known.get("data.path")) and not path.startswith("[") else None,
        f"seed {known['seed']}" if "seed" in known else None,
        " x ".join(known[key] for key in ("devices", "device kind") if key in known),
    ]
    return " · ".join(part for part in parts if part)


def _flatten(tree: Any, path: str = "") -> dict[str, str]:
    if isinstance(tree, dict) and tree:
        return {
            k: v for key, node in tree.items() for k, v in _flatten(node, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: tree if isinstance(tree, str) else json.dumps(tree)}


def _duration(stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return ""
    if "finished" not in stage:
        return "not finished"
    taken = _seconds(stage)
    if taken is None:
        return "unknown"
    return _time(taken) if taken >= 0 else "unknown: the clock was set back"


def _seconds(stage: Mapping[str, Any]) -> int | None:
    """How long a stage took since it was last started; None if that is not known."""
    try:
        start, end = (datetime.fromisoformat(stage[key]) for key in ("started", "finished"))
        return int((end - start).total_seconds())
    except (KeyError, TypeError, ValueError):
        return None


def _took(manifests: Sequence[Mapping[str, Any]]) -> str:
    """How long the stages of some run directories took, as a sentence."""
    spent: dict[str, int] = {}
    for manifest in manifests:
        for name, stage in manifest["stages"].items():
            spent[name] = spent.get(name, 0) + max(_seconds(stage) or 0, 0)
    order = {name: i for i, name in enumerate(("generate", "train", "export", "evaluate"))}
    done = sorted((name for name, taken in spent.items() if taken), key=lambda name: order.get(name, -1))
    each = ", ".join(f"{name} {_time(spent[name])}" for name in done)
    return f"Took {_time(sum(spent.values()))}: {each}." if each else ""


def _time(taken: int) -> str:
    minutes, seconds = divmod(taken, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ---------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------


def _benchmarks(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """(name, title, about, size) of each benchmark with results."""
    listed = {one["name"]: one for run in runs for one in setting(run.config, "evaluate.benchmarks") or ()}
    rows = []
    for name, budgets in charts.places(runs).items():
        cell = next(run.benchmarks[name][b] for run in runs for b in budgets if b in run.benchmarks.get(name, {}))
        size = f"{cell['problems']:,} problems x {cell['samples']:,} samples"
        about = listed.get(name, {}).get("about") or ("" if name in listed else "the pooled problems")
        rows.append((name, headline.benchmark_title(runs, name), about, size))
    return rows


def _solved(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each benchmark and budget, [right samples, samples] of each problem in each run; null where a run has none."""
    found = []
    pools = {one.get("pool") for run in runs for one in setting(run.config, "evaluate.benchmarks") or ()}
    for name, budgets in charts.places(runs).items():
        for budget in reversed(budgets if name not in pools else ()):  # a pool's problems are in its benchmarks
            cells = [run.benchmarks.get(name, {}).get(budget, {}).get("per_problem", {}) for run in runs]
            problems = sorted({problem for cell in cells for problem in cell})
            rows = [[cell.get(problem) for cell in cells] for problem in problems]
            if problems:
                found.append({"benchmark": name, "budget": int(budget), "problems": problems, "right": rows})
    return found


def _header(runs: Sequence[Run]) -> list[str]:
    scores = [f"{metric}@{k}" for metric, k in protocol.columns(run.benchmarks for run in runs)]
    against = [f"pass@1 against {runs[diagnosis.baseline(runs)].name}"] if len(runs) > 1 else []
    return [*scores, *against, "mean tokens", "median", "forced", "answered"]


def _results(runs: Sequence[Run]) -> list[tuple[str, list[tuple[int, str, list[dict[str, Any]]]]]]:
    """A table for each benchmark and budget: its caption, and (index, name, cells) of each run.

    A cell has a `text`, and it may have a `note`, the `figures` that these were made from (the first one sorts rows, and
    all of them are in the CSV file), an `interval` to draw and a `sign` (better or worse).
    """
    scores, first, sections = protocol.columns(run.benchmarks for run in runs), diagnosis.baseline(runs), []
    for name, budgets in charts.places(runs).items():
        for budget in budgets:
            rows, label = [], name
            for i, run in enumerate(runs):
                found = run.benchmarks.get(name, {}).get(budget)
                if found is None:
                    continue
                label = (
                    f"{name} · budget {int(budget):,} · {found['problems']:,} problems x {found['samples']:,} samples"
                )
                cells = [_share(found[f"{metric}@k"].get(k), drawn=metric == "pass") for metric, k in scores]
                if len(runs) > 1:
                    cells.append(_against(diagnosis.difference(runs[first], run, name, budget) if i != first else None))
                forms = {"mean_tokens": ",.1f", "median_tokens": ",.0f", "forced": ".1%", "answered": ".1%"}
                cells += [
                    {"text": f"{found[key]:{form}}", "figures": [found[key]]} if key in found else {"text": "-"}
                    for key, form in forms.items()
                ]
                rows.append((i, run.name, cells))
            sections.append((label, rows))
    return sections


def _share(found: Mapping[str, float] | None, drawn: bool = False) -> dict[str, Any]:
    if found is None:
        return {"text": "-"}
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    interval = drawn and (round(mean, 2), round(low, 2), round(high, 2))
    figures = [found[key] for key in ("mean", "low", "high")]
    return {"text": f"{mean:.1f}", "note": f"{low:.1f} to {high:.1f}", "interval": interval, "figures": figures}


def _against(found: Any) -> dict[str, Any]:
    if found is None:
        return {"text": "-"}
    sign = ("", "better", "worse")[found.sign]
    mean, low, high = (f"{100 * value:+.1f}".replace("-", "\u2212") for value in found[:3])
    note = f"{low} to {high}, {protocol.p_value(found.p, diagnosis.RESAMPLES)}"
    return {"text": mean, "note": note, "sign": sign, "figures": [round(value, 6) for value in found[:3]]}
