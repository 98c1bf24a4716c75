"""Reads run directories and boils them down to what the page and the plots show.

Every file may be missing, and one that is still being written may end in a torn line. Files are read in one pass
without holding their texts, so that millions of long samples fit; the few rows to show are read again.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, FiniteFloat

from dail_jax import config as config_lib
from dail_jax import strict_json
from dail_jax.errors import UserError
from dail_jax.evaluate import files
from dail_jax.metrics import LEFT_OUT
from dail_jax.text import mention

MAX_SAMPLES = 400  # of one run, in the page
MAX_TRACES = 200  # of one file, in the page
MAX_TEXT = 8000  # characters of one text; its middle is left out
MAX_ANSWER = 400  # characters of an answer, or of another short field
MAX_TOKENS = 1024  # of one trace
PHRASES = config_lib.Filters().artefacts

Logs = list[float | None] | None
Rows = dict[str, dict[int, float]]  # metric -> step -> value


class Manifest(files.Shape):
    versions: dict[str, str | None] = Field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Metric(files.Shape):
    stage: str
    step: int


class LeftOut(files.Shape):
    by: str
    what: files.Text
    count: int
    of: int


class Trace(files.Shape):
    problem_id: str
    sample: int
    response_ids: list[int] | None = None
    text: files.Text | None = None
    writer: str | None = None
    acceptance: FiniteFloat | None = None
    finish: str | None = None
    drop: files.Text | None = None
    pieces: list[files.Text] | None = None
    logq: Logs = None
    log_student: Logs = None
    log_privileged: Logs = None


class Scores(files.Shape):
    problem_id: str
    sample: int
    log_ratio: list[float | None]


@dataclass(frozen=True)
class Run:
    """One run directory. `lengths` has the tokens of all samples by (benchmark, budget); `samples` only some rows."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    results: dict[str, Any]
    metrics: dict[str, Rows]  # by stage
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
class Traces:
    """One traces.jsonl: counts over all rows, and the rows to show. `owner` is its run's place, or None if shared."""

    name: str
    owner: int | None
    total: int = 0
    lengths: list[int] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)
    by_student: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # tokens at each position
    by_anyone: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    finish: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)  # reasons, without their details
    mentions: int = 0  # of the reference solution, dropped for it or not
    rows: list[dict[str, Any]] = field(default_factory=list)
    scored: bool = False  # whether token scores were found for some rows


def read(runs: Mapping[str, Path], traces: Path | None = None) -> tuple[list[Run], list[Traces]]:
    """All runs, and the traces: one file that they share, or each run's own. Raises UserError for damaged files."""
    folders = [Path(folder) for folder in runs.values()]
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None or not folders:
        raise UserError(
            "no such run directory" if missing else "got no run directories, want at least one", file=missing
        )
    read_runs = [_run(name, Path(folder)) for name, folder in runs.items()]
    files: dict[Path, tuple[str, int | None, list[Path]]] = {}
    if traces is not None:
        path = Path(traces)
        name = "all arms" if len(runs) > 1 else next(iter(runs))
        files[path / "traces.jsonl" if path.is_dir() else path] = (name, None, folders)
    else:
        for i, run in enumerate(read_runs):
            path = Path(setting(run.config, "traces") or run.folder / "traces.jsonl").resolve()
            files.setdefault(path, (run.name, i, []))[2].append(run.folder)
    found = [
        _traces(path, name, owner, [*theirs, path.parent])
        for path, (name, owner, theirs) in files.items()
        if path.is_file()
    ]
    return read_runs, found


def left_out(runs: Mapping[str, Path], traces: Path | None = None) -> list[str]:
    """What the stages of these runs cut, skipped or dropped, and how much of it: a line for each.

    `traces` is the traces.jsonl that they share, whose own stage is counted as well.
    """
    folders = {name: Path(folder) for name, folder in runs.items()}
    if traces is not None and Path(traces).parent.resolve() not in {f.resolve() for f in folders.values()}:
        folders = {"all arms": Path(traces).parent, **folders}
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for name, folder in folders.items():
        path = folder / "metrics.jsonl"
        for number, (_, row) in enumerate(lines(path, Metric), 1):
            if row["stage"] == LEFT_OUT:  # after a resume, the later one
                files.check(row, LeftOut, path, number)
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


def lines(path: Path, shape: type[files.Shape]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) for each complete line of a JSON-lines file; nothing where there is no file."""
    if not path.is_file():
        return
    for line in strict_json.read_lines(path, own=True, torn="drop"):  # the last may be still being written
        yield line.offset, files.check(line.value, shape, path, line.number)


def spread(groups: Mapping[Any, Sequence[int]], limit: int) -> list[int]:
    """At most `limit` members, rising: equally many from each group, as far as it goes, and evenly spaced within."""
    left, chosen = limit, []
    for i, members in enumerate(sorted(groups.values(), key=len)):
        take = min(len(members), left // (len(groups) - i))
        chosen += [members[j] for j in np.linspace(0, len(members) - 1, take).round().astype(int)]
        left -= take
    return sorted(chosen)


def _run(name: str, folder: Path) -> Run:
    manifest, found = folder / "run.json", folder / "results.json"
    path = folder / "config.yaml"
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    metrics: dict[str, Rows] = defaultdict(lambda: defaultdict(dict))
    for _, row in lines(folder / "metrics.jsonl", Metric):
        for key, value in row.items():
            if key not in ("stage", "step", "time") and isinstance(value, int | float):
                metrics[row["stage"]][key][row["step"]] = value  # after a resume, the later one
    lengths, groups = defaultdict(list), defaultdict(list)
    for offset, row in lines(folder / "samples.jsonl", files.Sample):
        lengths[row["benchmark"], row["budget"]].append(row["tokens"])
        groups[row["benchmark"], row["budget"], row["correct"]].append(offset)
    chosen = spread(groups, MAX_SAMPLES)
    samples = [_sample(row) for row in strict_json.read_at(folder / "samples.jsonl", chosen)] if chosen else []
    return Run(
        name,
        folder,
        files.check(strict_json.read_object(manifest, own=True), Manifest, manifest) if manifest.is_file() else {},
        text,
        config_lib.parse_yaml(text, path) or {},
        files.read_results(found) if found.is_file() else {},
        {stage: dict(rows) for stage, rows in metrics.items()},
        dict(lengths),
        samples,
        sum(map(len, lengths.values())),
    )


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    limits = dict.fromkeys(files.Sample.model_fields, MAX_ANSWER) | {"text": MAX_TEXT, "forced_text": MAX_TEXT}
    row = {"answer_tokens": 0, **row}  # which older files lack
    return {key: clip(row[key], limit) if isinstance(row[key], str) else row[key] for key, limit in limits.items()}


def clip(text: str, limit: int) -> str:
    """The text, or its two ends."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters left out …]\n\n{text[-half:]}"


def _traces(path: Path, name: str, owner: int | None, folders: Sequence[Path]) -> Traces:
    found, groups = Traces(name, owner), defaultdict(list)
    for offset, row in lines(path, Trace):
        writer = np.frombuffer((row.get("writer") or "").encode("ascii", "replace"), np.uint8) == ord("s")
        if len(writer) > len(found.by_anyone):
            longer = (0, len(writer) - len(found.by_anyone))
            found.by_student, found.by_anyone = np.pad(found.by_student, longer), np.pad(found.by_anyone, longer)
        found.by_student[: len(writer)] += writer
        found.by_anyone[: len(writer)] += 1
        found.total += 1
        found.lengths.append(len(row.get("response_ids") or writer))
        if row.get("acceptance") is not None:
            found.acceptance.append(row["acceptance"])
        found.finish[clip(row.get("finish") or "unknown", MAX_ANSWER)] += 1
        reason = clip((row.get("drop") or "").split(":")[0], MAX_ANSWER)
        if reason:
            found.drops[reason] += 1
        found.mentions += reason == "artefact" or mention(row.get("text") or "", PHRASES) is not None
        groups[reason].append(offset)
    found.rows = [_trace(row) for row in strict_json.read_at(path, spread(groups, MAX_TRACES))]
    places = {(row["problem_id"], row["sample"]): row for row in found.rows}
    for folder in dict.fromkeys(folders):
        for _, score in lines(folder / "token_scores.jsonl", Scores):
            row = places.get((clip(score["problem_id"], MAX_ANSWER), score["sample"]))
            if row is not None and row["push"] is None and len(score["log_ratio"]) == row["tokens"]:
                row["push"], found.scored = _logs(score["log_ratio"]), True
    return found


def _trace(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: row.get(key) for key in ("sample", "acceptance")},
        **{key: clip(row.get(key) or "", MAX_ANSWER) or None for key in ("problem_id", "finish", "drop")},
        "tokens": len(row.get("response_ids") or row.get("writer") or ""),
        "text": clip(row.get("text") or "", MAX_TEXT),
        "writer": (row.get("writer") or "")[:MAX_TOKENS],
        "ids": (row.get("response_ids") or [])[:MAX_TOKENS],
        "pieces": row["pieces"][:MAX_TOKENS] if row.get("pieces") else None,
        **{key: _logs(row.get(key)) for key in ("logq", "log_student", "log_privileged")},
        "push": None,
    }


def _logs(values: Sequence[float | None] | None) -> list[float | None] | None:
    """Rounded, with null for what JSON cannot say."""
    if values is None:
        return None
    return [None if v is None or not math.isfinite(v) else round(v, 3) for v in values[:MAX_TOKENS]]
