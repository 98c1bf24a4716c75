"""The charts as data: the page draws them in the browser, plots.py with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dail_jax.report.collect import Run, TraceFile

BINS = 40
POINTS = 240  # per curve; a longer one becomes means with their range
NATS = "nats per token"
TRAINING = {  # metric: (title, unit)
    "loss": ("Loss", NATS),
    "excess": ("Excess, KL to the optimum", NATS),
    "kl_privileged": ("KL to the privileged student", NATS),
    "kl_negative": ("KL to the negative reference", NATS),
    "entropy": ("Entropy", NATS),
    "reward": ("Share of right samples", ""),
    "kl_base": ("KL to the untrained model", NATS),
    "grad_norm": ("Gradient norm", ""),
    "learning_rate": ("Learning rate", ""),
}

Point = tuple[float, float, float, float]  # x, y, and y's low and high end


@dataclass(frozen=True)
class Series:
    """One curve. `colour` is the index of its run, or -1 for what all runs share."""

    name: str
    colour: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """One chart. `kind` is "line", "marked" (a line with its points) or "step" (points are the left edges of bins, the
    last one the end).

    The charts of a section that share a variant are shown together. The page shows the first variant until its reader
    chooses another.
    """

    section: str
    variant: str
    title: str
    kind: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    percent: bool = False


def build(runs: Sequence[Run], traces: Sequence[TraceFile]) -> list[Chart]:
    """All charts that there are data for, in the order of the page."""
    return [*_pass_at_k(runs), *_against_tokens(runs), *_lengths(runs), *_training(runs), *_traces(traces)]


def places(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The budgets of every benchmark that any run has results for, ascending."""
    budgets: dict[str, set[str]] = {}
    for run in runs:
        for name, found in run.benchmarks.items():
            budgets.setdefault(name, set()).update(found)
    return {name: sorted(found, key=int) for name, found in budgets.items()}


def thin(points: Sequence[tuple[float, float]], limit: int = POINTS) -> list[Point]:
    """The points; if there are many, means of neighbours with their range, so that a spike stays visible."""
    size = math.ceil(len(points) / limit) if points else 1
    groups = [np.array(points[i : i + size], np.float64) for i in range(0, len(points), size)]
    return [(float(g[-1, 0]), float(g[:, 1].mean()), float(g[:, 1].min()), float(g[:, 1].max())) for g in groups]


def histogram(
    values: Mapping[tuple[str, int], Sequence[float]], span: tuple[float, float] | None = None, bins: int = BINS
) -> list[Series]:
    """The shares of values per bin, a series for each (name, colour).

    All series have the same bins: over `span`, or over the integers from the least value to the greatest.
    """
    if not any(len(v) for v in values.values()):
        return []
    if span is not None:
        edges = np.linspace(*span, bins + 1)
    else:
        low, high = (end(end(v) for v in values.values() if len(v)) for end in (min, max))
        width = max(1, math.ceil((high - low + 1) / bins))
        edges = np.arange(low, high + width + 1, width) - 0.5
    series = []
    for (name, colour), v in values.items():
        shares = np.histogram(v, edges)[0] / max(len(v), 1)
        heights = zip(edges.round(6).tolist(), [*shares.round(6).tolist(), 0.0], strict=True)
        series.append(Series(name, colour, [(x, y, y, y) for x, y in heights]))
    return series


def _chart(
    section: str, variant: str, title: str, kind: str, x: str, y: str, series: Iterable[Series], **more: Any
) -> list[Chart]:
    filled = [s for s in series if s.points]
    return [Chart(section, variant, title, kind, x, y, filled, **more)] if filled else []


def _interval(x: float, found: Mapping[str, float]) -> Point:
    return x, found["mean"], found["low"], found["high"]


def _pass_at_k(runs: Sequence[Run]) -> Iterable[Chart]:
    several = len({b for budgets in places(runs).values() for b in budgets}) > 1
    for metric in ("pass@k", "maj@k"):
        for name, budgets in places(runs).items():
            for budget in reversed(budgets):
                variant = f"{metric}, budget {int(budget):,}" if several else metric
                cells = [run.benchmarks.get(name, {}).get(budget, {}).get(metric, {}) for run in runs]
                series = [
                    Series(run.name, i, [_interval(int(k), v) for k, v in cell.items()])
                    for i, (run, cell) in enumerate(zip(runs, cells, strict=True))
                ]
                yield from _chart("pass", variant, name, "marked", "k", metric, series, log_x=True, percent=True)


def _against_tokens(runs: Sequence[Run]) -> Iterable[Chart]:
    for name, budgets in places(runs).items():
        cells = {
            (i, b): run.benchmarks[name][b]
            for i, run in enumerate(runs)
            for b in budgets
            if b in run.benchmarks.get(name, {})
        }
        ks = sorted({int(k) for cell in cells.values() for k in cell["pass@k"]})
        for k in map(str, dict.fromkeys([*ks[:1], *ks[-1:]])):
            for x, label in (("budget", "token budget"), ("mean_tokens", "mean tokens")):
                if x == "budget" and len(budgets) < 2:
                    continue
                series = []
                for i, run in enumerate(runs):
                    own = {b: cells[i, b] for b in budgets if k in cells.get((i, b), {}).get("pass@k", {})}
                    points = [_interval(int(b) if x == "budget" else c[x], c["pass@k"][k]) for b, c in own.items()]
                    series.append(Series(run.name, i, points))
                yield from _chart(
                    "budget",
                    f"pass@{k} against {label}",
                    name,
                    "marked",
                    label,
                    f"pass@{k}",
                    series,
                    log_x=x == "budget",
                    percent=True,
                )


def _lengths(runs: Sequence[Run]) -> Iterable[Chart]:
    keys = dict.fromkeys(key for run in runs for key in run.lengths)
    for name, budget in sorted(keys, key=lambda key: -key[1]):
        series = histogram({(run.name, i): run.lengths.get((name, budget), []) for i, run in enumerate(runs)})
        variant = f"budget {budget:,}" if len({b for _, b in keys}) > 1 else ""
        yield from _chart(
            "lengths", variant, name, "step", "tokens of a sample", "share of samples", series, percent=True
        )


def _training(runs: Sequence[Run]) -> Iterable[Chart]:
    for stage in ("train", "pretrain"):
        for key, (label, unit) in TRAINING.items():
            rows = [sorted(run.metrics.get(stage, {}).get(key, {}).items()) for run in runs]
            series = [
                Series(run.name, i, thin([(step, value) for step, value in row if math.isfinite(value)]))
                for i, (run, row) in enumerate(zip(runs, rows, strict=True))
            ]
            title = label if stage == "train" else f"{label} (pre-training)"
            yield from _chart("training", "", title, "line", "update", unit, series)


def _traces(traces: Sequence[TraceFile]) -> Iterable[Chart]:
    names = [(t.name, -1 if t.owner is None else t.owner) for t in traces]
    accepted = []
    for name, t in zip(names, traces, strict=True):
        size, points = math.ceil(len(t.by_anyone) / BINS) or 1, []
        for start in range(0, len(t.by_anyone), size):
            ours, n = t.by_student[start : start + size].sum(), t.by_anyone[start : start + size].sum()
            # Wilson's interval, which is sound for shares near 1, as these are.
            p, z = ours / n, 1.96
            middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
            points.append(
                (start + size / 2, float(p), *(float((middle + s * half) / (1 + z * z / n)) for s in (-1, 1)))
            )
        accepted.append(Series(*name, points))
    yield from _chart(
        "traces",
        "",
        "Tokens that the student wrote, by position",
        "line",
        "position in the trace",
        "share of tokens",
        accepted,
        percent=True,
    )
    for title, x, field, span in (
        ("Length of a trace", "tokens", "lengths", None),
        ("Share of a trace that the student wrote", "acceptance", "acceptance", (0.0, 1.0)),
    ):
        series = histogram({name: getattr(t, field) for name, t in zip(names, traces, strict=True)}, span)
        yield from _chart("traces", "", title, "step", x, "share of traces", series, percent=True)
