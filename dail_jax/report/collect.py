"""Reads run directories and reduces them to what the page and the plots show.

Every file may be missing, and one that is still being written may end in an incomplete line. Files are read in one pass
that keeps no texts, so that millions of long samples fit; the few rows to show are read a second time.
"""

from __future__ import annotations

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
    """One run directory. `lengths` counts the tokens of all samples by (benchmark, budget); `samples` has a few rows."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    results: dict[str, Any]
    metrics: dict[str, MetricTable]  # by stage
    lengths: dict[tuple[str, int], list[int]]
    samples: list[dict[str, Any]]
    total: int

    @property
    def benchmarks(self) -> dict[str, dict[str, dict[str, Any]]]:
        return self.results.get("benchmarks", {})

    @property
    def objective(self) -> str:
        return self.results.get("objective") or setting(self.config, "train.objective") or ""


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
    finish: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)  # reasons, without their details
    mentions: int = 0  # of the reference solution, whether dropped for it or not
    rows: list[dict[str, Any]] = field(default_factory=list)
    scored: bool = False  # whether token scores were found for some rows


def read(runs: Mapping[str, Path], traces: Path | None = None) -> tuple[list[Run], list[TraceFile]]:
    """All runs, and the traces: one file that they share, or each run's own; raises UserError for damaged files."""
    folders = [Path(folder) for folder in runs.values()]
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None or not folders:
        raise UserError(
            "no such run directory" if missing else "got no run directories, want at least one", file=missing
        )
    read_runs = [_run(name, Path(folder)) for name, folder in runs.items()]
    paths: dict[Path, tuple[str, int | None, list[Path]]] = {}
    if traces is not None:
        path = Path(traces)
        name = "all arms" if len(runs) > 1 else next(iter(runs))
        paths[path / "traces.jsonl" if path.is_dir() else path] = (name, None, folders)
    else:
        for i, run in enumerate(read_runs):
            path = Path(setting(run.config, "traces") or run.folder / "traces.jsonl").resolve()
            paths.setdefault(path, (run.name, i, []))[2].append(run.folder)
    found = [
        _trace_file(path, name, owner, [*theirs, path.parent])
        for path, (name, owner, theirs) in paths.items()
        if path.is_file()
    ]
    return read_runs, found


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


def lines(path: Path, shape: type[shapes.Shape]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) for each complete line of a JSON-lines file; nothing if there is no file."""
    if not path.is_file():
        return
    for line in strict_json.read_lines(path, own=True, torn="drop"):  # the last may be still being written
        yield line.offset, shapes.check(line.value, shape, path, line.number)


def spread(groups: Mapping[Any, Sequence[int]], limit: int) -> list[int]:
    """At most `limit` members, ascending: equally many per group as far as possible, evenly spaced within each."""
    left, chosen = limit, []
    for i, members in enumerate(sorted(groups.values(), key=len)):
        take = min(len(members), left // (len(groups) - i))
        chosen += [members[j] for j in np.linspace(0, len(members) - 1, take).round().astype(int)]
        left -= take
    return sorted(chosen)


def _run(name: str, folder: Path) -> Run:
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
    lengths, groups = defaultdict(list), defaultdict(list)
    for offset, row in lines(folder / "samples.jsonl", files.SampleRow):
        lengths[row["benchmark"], row["budget"]].append(row["tokens"])
        groups[row["benchmark"], row["budget"], row["correct"]].append(offset)
    chosen = spread(groups, MAX_SAMPLES)
    samples = [_sample(row) for row in strict_json.read_at(folder / "samples.jsonl", chosen)] if chosen else []
    return Run(
        name,
        folder,
        read_manifest(folder),
        text,
        config_lib.parse_yaml(text, path) or {},
        files.read_results(found) if found.is_file() else {},
        {stage: dict(rows) for stage, rows in metrics.items()},
        dict(lengths),
        samples,
        sum(map(len, lengths.values())),
    )


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
        groups[reason].append(offset)
    found.rows = [_shown(trace) for trace in traces_lib.read_at(path, spread(groups, MAX_TRACES))]
    places = {(row["problem_id"], row["sample"]): row for row in found.rows}
    for folder in dict.fromkeys(folders):
        for _, score in lines(folder / "token_scores.jsonl", ScoreRow):
            row = places.get((clip(score["problem_id"], MAX_ANSWER), score["sample"]))
            if row is not None and row["push"] is None and len(score["log_ratio"]) == row["tokens"]:
                row["push"], found.scored = _rounded(score["log_ratio"]), True
    return found


def _shown(trace: Trace) -> dict[str, Any]:
    """What the page's trace viewer gets of a trace."""
    return {
        "sample": trace.sample,
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
