"""Reads run directories and reduces them to what the page and the plots show.

Every file may be missing, and one that is still being written may end in an incomplete line. Files are read in one pass
that keeps no texts, so that millions of long samples fit; the few rows to show are read a second time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dail_jax import config as config_lib
from dail_jax import shapes, strict_json
from dail_jax.data import traces as traces_lib
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError
from dail_jax.evaluate import files
from dail_jax.metrics import LEFT_OUT
from dail_jax.rundir import read_manifest
from dail_jax.text import mention

# What the page shows at most.
MAX_SAMPLES = 400  # per run
MAX_TRACES = 200  # per file
MAX_TEXT = 8000  # characters per text; its middle is left out
MAX_ANSWER = 400  # characters per answer or other short field
MAX_TOKENS = 1024  # per trace
PHRASES = config_lib.Filters().artefacts

MetricTable = dict[str, dict[int, float]]  # metric -> step -> value
Place = tuple[str, int]  # a benchmark and a budget
Drawn = dict[str, dict[int, tuple[int, bool | None]]]  # problem_id -> sample -> (offset in bytes, verdict)


class MetricRow(shapes.Shape):
    """A row of metrics.jsonl; its other keys are the metrics."""

    stage: str
    step: int


class LeftOutRow(shapes.Shape):
    """A row of metrics.jsonl that counts what a stage cut, skipped or dropped."""

    by: str
    what: shapes.Text
    count: int
    of: int


class ScoreRow(shapes.Shape):
    """A row of token_scores.jsonl: what the contrast thinks of each token of a trace."""

    problem_id: str
    sample: int
    log_ratio: list[float | None]


@dataclass(frozen=True)
class Run:
    """One run directory. `lengths` has the tokens of all samples by benchmark and budget; `samples` has a few rows."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    results: dict[str, Any]
    metrics: dict[str, MetricTable]  # by stage
    lengths: dict[Place, list[int]]
    samples: list[dict[str, Any]]
    total: int

    @property
    def benchmarks(self) -> dict[str, dict[str, dict[str, Any]]]:
        return self.results.get("benchmarks", {})

    @property
    def objective(self) -> str:
        return self.results.get("objective") or setting(self.config, "train.objective") or ""

    @property
    def title(self) -> str:
        return setting(self.config, "title") or self.name


@dataclass
class TraceFile:
    """One traces.jsonl: counts over all rows, and the rows to show. `owner` is its run's index, or None if shared."""

    name: str
    owner: int | None
    total: int = 0
    lengths: list[int] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    by_student: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # tokens at each position
    by_anyone: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    problems: set[str] = field(default_factory=set)
    finish: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)  # reasons, without their details
    mentions: int = 0  # of the reference solution, whether dropped for it or not
    rows: list[dict[str, Any]] = field(default_factory=list)  # those that are kept come first, and the most mixed ones
    scored: bool = False  # whether token scores were found for some rows


def read(runs: Mapping[str, Path], traces: Path | None = None) -> tuple[list[Run], list[TraceFile]]:
    """All runs, and the traces: one file that they share, or each run's own; raises UserError for damaged files."""
    folders = [Path(folder) for folder in runs.values()]
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None or not folders:
        raise UserError(
            "no such run directory" if missing else "got no run directories, want at least one", file=missing
        )
    found = [_run(name, Path(folder)) for name, folder in runs.items()]
    chosen = matched([drawn for _, drawn in found])
    read_runs = [dataclasses.replace(run, samples=_samples(run, drawn, chosen)) for run, drawn in found]
    paths: dict[Path, tuple[str, int | None, list[Path]]] = {}
    if traces is not None:
        path = Path(traces)
        name = "all arms" if len(runs) > 1 else next(iter(runs))
        paths[path / "traces.jsonl" if path.is_dir() else path] = (name, None, folders)
    else:
        for i, run in enumerate(read_runs):
            path = Path(setting(run.config, "traces") or run.folder / "traces.jsonl").resolve()
            paths.setdefault(path, (run.name, i, []))[2].append(run.folder)
    shown = [
        _trace_file(path, name, owner, [*theirs, path.parent])
        for path, (name, owner, theirs) in paths.items()
        if path.is_file()
    ]
    return read_runs, shown


def left_out(runs: Mapping[str, Path], traces: Path | None = None) -> list[str]:
    """What the stages of these runs cut, skipped or dropped, and how much of it: one line each.

    `traces` is the traces.jsonl that the runs share; what the stage that made it left out is counted as well.
    """
    folders = {name: Path(folder) for name, folder in runs.items()}
    if traces is not None and Path(traces).parent.resolve() not in {f.resolve() for f in folders.values()}:
        folders = {"all arms": Path(traces).parent, **folders}
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for name, folder in folders.items():
        path = folder / "metrics.jsonl"
        for number, (_, row) in enumerate(lines(path, MetricRow), 1):
            if row["stage"] == LEFT_OUT:  # a resumed stage counts again, and its last count is right
                shapes.check(row, LeftOutRow, path, number)
                found[name, row["by"], row["what"]] = row["count"], row["of"]
    return [
        f"{name}, {stage}: {count:,} of {total:,} {what}"
        for (name, stage, what), (count, total) in found.items()
        if count
    ]


def setting(tree: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or None."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def relabelled(tree: dict[str, Any], now: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """A recorded configuration with the titles of `now`, the one in force, which may have been changed since."""
    own = (now["arms"].get(arm) or {}) if now["arms"] else now
    listed = {one["name"]: one for one in now["evaluate"]["benchmarks"]}
    benchmarks = [
        {**one, **{key: listed.get(one["name"], one).get(key) for key in ("title", "about")}}
        for one in setting(tree, "evaluate.benchmarks") or ()
    ]
    return {
        **tree,
        "title": own.get("title"),
        "about": own.get("about"),
        "model": {**tree.get("model", {}), "title": now["model"]["title"]},
        "evaluate": {**tree.get("evaluate", {}), "benchmarks": benchmarks},
    }


def lines(path: Path, shape: type[shapes.Shape]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) for each complete line of a JSON-lines file; nothing if there is no file."""
    if not path.is_file():
        return
    for line in strict_json.read_lines(path, own=True, torn="drop"):  # the last may be still being written
        yield line.offset, shapes.check(line.value, shape, path, line.number)


# ---------------------------------------------------------------------------------------------------
# Which rows to show
# ---------------------------------------------------------------------------------------------------


def shares(sizes: Sequence[int], limit: int) -> list[int]:
    """How many to take from groups of these sizes: at most `limit` in all, equally many as far as possible."""
    taken = [0] * len(sizes)
    for i, group in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        taken[group] = min(sizes[group], round(limit / (len(sizes) - i)))
        limit -= taken[group]
    return taken


def spread(groups: Mapping[Any, Sequence[int]], limit: int) -> list[int]:
    """At most `limit` members, ascending: equally many per group as far as possible, evenly spaced within each."""
    members = list(groups.values())
    takes = zip(members, shares([len(m) for m in members], limit), strict=True)
    return sorted(m[i] for m, take in takes for i in np.linspace(0, len(m) - 1, take).round().astype(int))


def matched(runs: Sequence[Mapping[Place, Drawn]]) -> list[tuple[Place, str, int]]:
    """The (place, problem_id, sample) to show of all runs alike, at most MAX_SAMPLES; the longest budgets first.

    Equally many per benchmark and budget as far as possible, and there per problem. Runs are shown side by side, so a
    sample must be in all runs that have the place at all, if there are such samples.
    """
    orders = {}
    for place in sorted(dict.fromkeys(place for run in runs for place in run), key=lambda place: -place[1]):
        orders[place] = _in_order([run[place] for run in runs if place in run])
    chosen, places = [], list(orders)
    for place, room in zip(places, shares([_size(orders[p]) for p in places], MAX_SAMPLES), strict=True):
        takes = shares([len(samples) for samples in orders[place].values()], room)
        for (problem, samples), take in zip(orders[place].items(), takes, strict=True):
            chosen += [(place, problem, sample) for sample in samples[:take]]
    return chosen


def _size(order: Mapping[str, Sequence[int]]) -> int:
    return sum(map(len, order.values()))


def _in_order(runs: Sequence[Drawn]) -> dict[str, list[int]]:
    """The samples of each problem, those first that tell most: one with the usual verdicts, then the rarest ones."""
    names = dict.fromkeys(problem for drawn in runs for problem in drawn)
    samples = {name: dict.fromkeys(s for drawn in runs for s in drawn.get(name, ())) for name in names}
    shared = {
        name: [s for s in own if all(s in drawn.get(name, ()) for drawn in runs)] for name, own in samples.items()
    }
    found = {}
    for name, own in (shared if _size(shared) else samples).items():
        groups: dict[tuple, list[int]] = defaultdict(list)  # by the verdicts in all runs
        for sample in own:
            groups[tuple(drawn.get(name, {}).get(sample, (0, None))[1] for drawn in runs)].append(sample)
        usual, *others = sorted(groups.values(), key=len, reverse=True) or [[]]
        rounds = itertools.zip_longest(usual, *reversed(others))
        found[name] = [sample for one in rounds for sample in one if sample is not None]
    return found


def _samples(run: Run, drawn: Mapping[Place, Drawn], chosen: Sequence[tuple[Place, str, int]]) -> list[dict[str, Any]]:
    """The rows of a run to show, in the order of `chosen`."""
    places = [drawn.get(place, {}).get(problem, {}).get(sample) for place, problem, sample in chosen]
    offsets = [found[0] for found in places if found is not None]
    if not offsets:
        return []
    return [_sample(row) for row in strict_json.read_at(run.folder / "samples.jsonl", offsets)]


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------


def _run(name: str, folder: Path) -> tuple[Run, dict[Place, Drawn]]:
    """A run without samples, and where these lie in samples.jsonl."""
    found = folder / "results.json"
    path = folder / "config.yaml"
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    metrics: dict[str, MetricTable] = defaultdict(lambda: defaultdict(dict))
    for _, row in lines(folder / "metrics.jsonl", MetricRow):
        for key, value in row.items():
            if key not in ("stage", "step", "time") and isinstance(value, int | float):
                metrics[row["stage"]][key][row["step"]] = (
                    value  # a resumed stage repeats steps, and the last value counts
                )
    lengths: dict[Place, list[int]] = defaultdict(list)
    drawn: dict[Place, Drawn] = defaultdict(lambda: defaultdict(dict))
    for offset, row in lines(folder / "samples.jsonl", files.SampleRow):
        place = row["benchmark"], row["budget"]
        lengths[place].append(row["tokens"])
        drawn[place][row["problem_id"]][row["sample"]] = offset, row["correct"]
    run = Run(
        name,
        folder,
        read_manifest(folder),
        text,
        config_lib.parse_yaml(text, path) or {},
        files.read_results(found) if found.is_file() else {},
        {stage: dict(rows) for stage, rows in metrics.items()},
        dict(lengths),
        [],
        sum(map(len, lengths.values())),
    )
    return run, {place: dict(found) for place, found in drawn.items()}


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    limits = dict.fromkeys(files.SampleRow.model_fields, MAX_ANSWER) | {"text": MAX_TEXT, "forced_text": MAX_TEXT}
    row = {"answer_tokens": 0, **row}  # missing from older files
    return {key: clip(row[key], limit) if isinstance(row[key], str) else row[key] for key, limit in limits.items()}


def clip(text: str, limit: int) -> str:
    """The text, or its two ends."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters left out …]\n\n{text[-half:]}"


def _trace_file(path: Path, name: str, owner: int | None, folders: Sequence[Path]) -> TraceFile:
    found, groups = TraceFile(name, owner), defaultdict(list)
    first: tuple[tuple[bool, float], str, int] = (True, 1.0), "", 0
    for offset, trace in traces_lib.stream(path, torn="drop"):
        writer = np.frombuffer((trace.writer or "").encode("ascii"), np.uint8) == ord("s")
        if len(writer) > len(found.by_anyone):
            longer = (0, len(writer) - len(found.by_anyone))
            found.by_student, found.by_anyone = np.pad(found.by_student, longer), np.pad(found.by_anyone, longer)
        found.by_student[: len(writer)] += writer
        found.by_anyone[: len(writer)] += 1
        found.total += 1
        found.lengths.append(len(trace.response_ids))
        if trace.acceptance is not None:
            found.acceptance.append(trace.acceptance)
        found.finish[clip(trace.finish, MAX_ANSWER)] += 1
        reason = clip((trace.drop or "").split(":")[0], MAX_ANSWER)
        if reason:
            found.drops[reason] += 1
        found.mentions += reason == "artefact" or mention(trace.text, PHRASES) is not None
        found.problems.add(trace.problem_id)
        groups[reason].append(offset)
        if (rank := _rank(trace)) < first[0]:
            first = rank, reason, offset
    if found.total:  # the one that the viewer opens on is always shown
        groups[first[1]].remove(first[2])
        groups["the first"] = [first[2]]
    shown = sorted(traces_lib.read_at(path, spread(groups, MAX_TRACES)), key=_rank)
    found.rows = [_shown(trace) for trace in shown]
    places = {(row["problem_id"], row["sample"]): row for row in found.rows}
    for folder in dict.fromkeys(folders):
        for _, score in lines(folder / "token_scores.jsonl", ScoreRow):
            row = places.get((clip(score["problem_id"], MAX_ANSWER), score["sample"]))
            if row is not None and row["push"] is None and len(score["log_ratio"]) == row["tokens"]:
                row["push"], found.scored = _rounded(score["log_ratio"]), True
    return found


def _rank(trace: Trace) -> tuple[bool, float]:
    """Orders traces: kept ones before dropped ones, and there the most mixed first, of which both roles wrote much."""
    share = (trace.writer or "").count("s") / max(len(trace.writer or ""), 1)
    return trace.drop is not None, -min(share, 1 - share)


def _shown(trace: Trace) -> dict[str, Any]:
    """What the page's trace viewer gets of a trace."""
    return {
        "sample": trace.sample,
        "solution": trace.solution,
        "acceptance": trace.acceptance,
        "problem_id": clip(trace.problem_id, MAX_ANSWER),
        "finish": clip(trace.finish, MAX_ANSWER),
        "drop": clip(trace.drop or "", MAX_ANSWER) or None,
        "tokens": len(trace.response_ids),
        "text": clip(trace.text, MAX_TEXT),
        "writer": (trace.writer or "")[:MAX_TOKENS],
        "ids": list(trace.response_ids[:MAX_TOKENS]),
        "logq": _rounded(trace.logq),
        "log_student": _rounded(trace.log_student),
        "log_privileged": _rounded(trace.log_privileged),
        "push": None,
    }


def _rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    """The first values, rounded, with null for what JSON cannot express."""
    if values is None:
        return None
    return [None if v is None or not math.isfinite(v) else round(v, 3) for v in values[:MAX_TOKENS]]
