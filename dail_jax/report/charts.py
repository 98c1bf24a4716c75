"""The charts as data: the page draws them in the browser, plots.py with matplotlib.

What both must agree on is decided here: the colour of each arm, the smoothing, the scale and the ends of the y axis.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from dail_jax.evaluate.files import UNTRAINED
from dail_jax.report.collect import Run, TraceFile

BINS = 40  # of positions in a trace
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
CAPTIONS = {  # of a section's charts, in the page and in the plots
    "pass": "With 95% bootstrap intervals over problems.",
    "budget": "With 95% bootstrap intervals over problems.",
    "lengths": "Share of the samples that are at most so long.",
    "training": "Noisy curves are smoothed over neighbouring updates, with the raw values behind them. Losses of different objectives are not "
    "on the same scale.",
    "traces": "Of all traces, kept or dropped. Bands: 95% Wilson intervals.",
    "tau": "With 95% bootstrap intervals over problems.",
}

# (on a light page, on a dark one); each has 3:1 against its page at least.
COLOURS = (
    ("#2463c4", "#6ea8ff"),
    ("#d1620a", "#f59a4a"),
    ("#16806a", "#4cc9a4"),
    ("#5b6472", "#a5adba"),
    ("#a3388f", "#e389d2"),
    ("#8a6d00", "#d8b84a"),
    ("#c22f3d", "#ff8088"),
    ("#2f7fa8", "#7cc7ea"),
)
# Where a method is among them, so that an arm of its name has one colour in all pages and plots.
PLACES = {
    "dail": 0,
    "nll": 1,
    "sft": 2,
    UNTRAINED: 3,
    "sharp": 4,
    "star": 5,
    "grpo": 6,
    "onpolicy": 7,
    "nurl": 7,
    "gated": 6,
}
SHARED = -1  # the colour of what all runs share

Point = tuple[float, float, float, float]  # x, y, and y's low and high end
Scale = Literal["linear", "log", "apart"]


@dataclass(frozen=True)
class Series:
    """One curve. `colour` is a place in COLOURS, beyond its end for another dash; or SHARED.

    Where `smooth` has values, one per point, they are the curve, and the points are shown faintly behind it.
    """

    name: str
    colour: int
    points: Sequence[Point]
    smooth: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """One chart. `kind` is "line", "marked" (a line with its points) or "step" (a share that rises at its points).

    The charts of a section that share a variant are shown together. The page shows the first variant until its reader
    chooses another. `span` has the ends of the y axis, and `note` is the number of problems and samples.
    """

    section: str
    variant: str
    title: str
    kind: str
    x: str
    y: str
    series: Sequence[Series]
    span: tuple[float, float]
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    percent: bool = False


def build(runs: Sequence[Run], traces: Sequence[TraceFile]) -> list[Chart]:
    """All charts that there are data for, in the order of the page."""
    colour = colours(runs)
    return [
        *_pass_at_k(runs, colour),
        *_against_tokens(runs, colour),
        *_lengths(runs, colour),
        *_training(runs, colour),
        *_traces(traces, colour),
    ]


def colours(runs: Sequence[Run]) -> list[int]:
    """The place in COLOURS of each run, beyond its end after the first eight; no two are the same.

    A run's own place follows from its name, or from its being untrained, and not from which others are beside it. Only
    where two runs have the same, the later one gets the next that is free.
    """
    taken: list[int] = []
    for run in runs:
        name = UNTRAINED if run.objective == UNTRAINED else PurePath(run.name).name
        own, size = PLACES.get(name, zlib.crc32(name.encode("utf-8", "replace"))), len(COLOURS)
        order = (i // size * size + (own + i) % size for i in itertools.count())
        taken.append(next(place for place in order if place not in taken))
    return taken


def places(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The budgets of every benchmark that any run has results for, ascending."""
    budgets: dict[str, set[str]] = {}
    for run in runs:
        for name, found in run.benchmarks.items():
            budgets.setdefault(name, set()).update(found)
    return {name: sorted(found, key=int) for name, found in budgets.items()}


# ---------------------------------------------------------------------------------------------------
# Curves and axes
# ---------------------------------------------------------------------------------------------------

WIDEST = 50  # values at most on either side of a smoothed one
SMOOTHED = 20  # a shorter curve is shown as it is
ROUGH = 4  # a curve is noisy if it is this many times as long as it is high, such as a loss but no learning rate
FLAT = 0.1  # of the axis: a curve that varies less than this on it is flattened
STEADY = 0.05  # a curve that varies less than this share of its own values has nothing to flatten
LABELLED = 6  # curves at most that have their names beside their ends
DECADES = 2.0  # positive values over more of them have a logarithmic axis


def smooth(values: Sequence[float]) -> list[float]:
    """Centred means over a twelfth of the values, five at least; nothing for few values, or for a curve without noise.

    An outlier is moved as near to the median of its window as nearly all values are: they may well have two levels, where
    batches of short and of long responses take turns. The first and the last half of a window are straight lines: a steep
    beginning is neither delayed nor flattened.
    """
    y, n = np.asarray(values, np.float64), len(values)
    if n < SMOOTHED:
        return []
    steps = np.abs(np.diff(y))
    if steps.clip(max=np.percentile(steps, 98)).sum() <= ROUGH * np.ptp(np.percentile(y, (2, 98))):
        return []
    half = min(max(2, n // 24), WIDEST)
    size = 2 * half + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(y, half, mode="reflect"), size)
    medians = np.median(windows, axis=1)
    far = 3 * np.percentile(np.abs(y - medians), 98)
    y = y.clip(medians - far, medians + far)
    middle = np.convolve(y, np.ones(size) / size, "valid")
    at = np.arange(min(size, len(middle)))
    first, last = (np.polyfit(at, part, 1) for part in (middle[: len(at)], middle[-len(at) :]))
    # A line may leave the values that it stands for: a loss would fall below 0.
    start = np.polyval(first, np.arange(-half, 0)).clip(y[:size].min(), y[:size].max())
    end = np.polyval(last, len(at) + np.arange(half)).clip(y[-size:].min(), y[-size:].max())
    return np.concatenate([start, middle, end]).tolist()


def thin(points: Sequence[tuple[float, float]], limit: int = POINTS) -> list[Point]:
    """The points; if there are many, means of neighbours with their range, so that a spike stays visible."""
    size = math.ceil(len(points) / limit) if points else 1
    groups = [np.array(points[i : i + size], np.float64) for i in range(0, len(points), size)]
    return [(float(g[-1, 0]), float(g[:, 1].mean()), float(g[:, 1].min()), float(g[:, 1].max())) for g in groups]


def curve(name: str, colour: int, points: Sequence[tuple[float, float]]) -> Series:
    """A series of points with its smooth curve; values that are not finite are left out."""
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    means = smooth([y for _, y in kept])
    thinned = [y for _, y, *_ in thin([(x, mean) for (x, _), mean in zip(kept, means, strict=True)])] if means else []
    return Series(name, colour, thin(kept), thinned)


def scale(curves: Sequence[ArrayLike]) -> Scale:
    """How several curves can be told apart in one chart: on a linear axis, on a logarithmic one, or only apart.

    A curve is flattened where the others leave it a small part of the axis, although it varies in itself. Positive
    values over more than two decades have a logarithmic axis in any case.
    """
    arrays = [np.asarray(values, np.float64) for values in curves if np.size(values)]
    if not arrays:
        return "linear"
    varied = [a for a in arrays if np.ptp(a) > STEADY * np.abs(np.median(a))]

    def flattened(f: Any) -> bool:
        ends = [np.percentile(f(a), (2, 98)) for a in arrays]
        height = max(high for _, high in ends) - min(low for low, _ in ends)
        return len(arrays) > 1 and any(np.ptp(np.percentile(f(a), (2, 98))) < FLAT * height for a in varied)

    ends = [np.percentile(a, (2, 98)) for a in arrays]
    least, most = min(low for low, _ in ends), max(high for _, high in ends)
    flat = flattened(lambda a: a)
    if min(a.min() for a in arrays) > 0 and (flat or most > 10**DECADES * least) and not flattened(np.log):
        return "log"
    return "apart" if flat else "linear"


def span(series: Sequence[Series], log: bool = False) -> tuple[float, float]:
    """The ends of the y axis for these curves. An outlier behind a smooth curve does not flatten it: what would take more
    than a third of the axis is cut off."""
    f, back = (np.log10, lambda v: 10.0**v) if log else (lambda v: v, lambda v: v)
    raw = f(np.array([end for s in series for _, _, low, high in s.points for end in (low, high)], np.float64))
    shown = [f(np.array(s.smooth or [y for _, y, *_ in s.points], np.float64)) for s in series]
    firm = np.concatenate([*shown, np.percentile(raw, (2, 98))])
    low, high = firm.min(), firm.max()
    reach = (high - low) / 2
    low, high = raw[raw >= low - reach].min(), raw[raw <= high + reach].max()
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return float(back(low - room)), float(back(high + room))


def shares(series: Sequence[Series]) -> tuple[float, float]:
    """The ends of a y axis for shares: from 0, with room for what lies on an end."""
    top = max(high for s in series for *_, high in s.points)
    top = 1.0 if top > 0.8 else 1.05 * top or 0.01
    return -0.03 * top, 1.03 * top


def cumulative(values: Sequence[float]) -> list[Point]:
    """The share of values up to x, at each x where it rises; of many such x some, the last one included."""
    found, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    rising = counts.cumsum() / max(len(values), 1)
    at = np.unique(np.linspace(0, len(found) - 1, min(len(found), POINTS)).round().astype(int)) if len(found) else []
    return [(float(found[i]), *[round(float(rising[i]), 6)] * 3) for i in at]  # pyright: ignore


def ends_together(chart: Chart) -> bool:
    """Whether curves are few and end at about the same x, so that their names fit beside their ends."""
    starts, ends = ([series.points[i][0] for series in chart.series] for i in (0, -1))
    near = max(ends) - min(ends) <= 0.05 * (max(ends) - min(starts))
    return chart.kind != "step" and len(ends) <= LABELLED and near


def labels(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights for labels in [low, high], as near to the wanted ones as `gap` between any two allows."""
    groups: list[list[int]] = []  # neighbours that touch, around the mean of what they want

    def middle(group: list[int]) -> float:
        half = gap * (len(group) - 1) / 2
        return max(min(sum(heights[i] for i in group) / len(group), high - half), low + half)

    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        groups.append([i])
        while len(groups) > 1:
            below, above = groups[-2:]
            if middle(above) - middle(below) >= gap * (len(above) + len(below)) / 2 - 1e-9:
                break
            groups[-2:] = [below + above]
    found = {i: middle(group) + gap * (k - (len(group) - 1) / 2) for group in groups for k, i in enumerate(group)}
    return [found[i] for i in range(len(heights))]


# ---------------------------------------------------------------------------------------------------
# The sections
# ---------------------------------------------------------------------------------------------------


def chart(
    section: str, variant: str, title: str, kind: str, x: str, y: str, series: Iterable[Series], **more: Any
) -> list[Chart]:
    """The chart of the series that have points, with an axis for shares; none if there are no points at all."""
    filled = [s for s in series if s.points]
    return [Chart(section, variant, title, kind, x, y, filled, shares(filled), percent=True, **more)] if filled else []


def _interval(x: float, found: Mapping[str, float]) -> Point:
    return x, found["mean"], found["low"], found["high"]


def _size(runs: Sequence[Run], name: str, budget: str, shown: bool = False) -> str:
    """How many problems and samples are behind a chart, in which runs may differ, and if `shown` their budget."""
    cells = [run.benchmarks.get(name, {}).get(budget) for run in runs]
    sizes = dict.fromkeys(f"{c['problems']:,} problems x {c['samples']:,} samples" for c in cells if c)
    parts = [*([f"budget {int(budget):,}"] if shown else []), *([f"n = {' or '.join(sizes)}"] if sizes else [])]
    return ", ".join(parts)


def _pass_at_k(runs: Sequence[Run], colour: Sequence[int]) -> Iterable[Chart]:
    several = len({b for budgets in places(runs).values() for b in budgets}) > 1
    for metric in ("pass@k", "maj@k"):
        for name, budgets in places(runs).items():
            for budget in reversed(budgets):
                variant = f"{metric}, budget {int(budget):,}" if several else metric
                cells = [run.benchmarks.get(name, {}).get(budget, {}).get(metric, {}) for run in runs]
                series = [
                    Series(run.name, colour[i], [_interval(int(k), v) for k, v in cell.items()])
                    for i, (run, cell) in enumerate(zip(runs, cells, strict=True))
                ]
                note = _size(runs, name, budget, several)
                yield from chart("pass", variant, name, "marked", "k", metric, series, log_x=True, note=note)


def _against_tokens(runs: Sequence[Run], colour: Sequence[int]) -> Iterable[Chart]:
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
                    series.append(Series(run.name, colour[i], points))
                yield from chart(
                    "budget",
                    f"pass@{k} against {label}",
                    name,
                    "marked",
                    label,
                    f"pass@{k}",
                    series,
                    log_x=x == "budget",
                    note=_size(runs, name, budgets[-1]),
                )


def _lengths(runs: Sequence[Run], colour: Sequence[int]) -> Iterable[Chart]:
    keys = dict.fromkeys(key for run in runs for key in run.lengths)
    several = len({budget for _, budget in keys}) > 1
    for name, budget in sorted(keys, key=lambda key: -key[1]):
        series = [
            Series(run.name, c, cumulative(run.lengths.get((name, budget), [])))
            for run, c in zip(runs, colour, strict=True)
        ]
        variant = f"budget {budget:,}" if several else ""
        note = _size(runs, name, str(budget), several)
        yield from chart("lengths", variant, name, "step", "tokens of a sample", "share of samples", series, note=note)


def _training(runs: Sequence[Run], colour: Sequence[int]) -> Iterable[Chart]:
    for stage in ("train", "pretrain"):
        for key, (label, unit) in TRAINING.items():
            rows = [sorted(run.metrics.get(stage, {}).get(key, {}).items()) for run in runs]
            found = [curve(run.name, c, row) for run, c, row in zip(runs, colour, rows, strict=True)]
            filled = [s for s in found if s.points]
            title = label if stage == "train" else f"{label} (pre-training)"
            kind = scale([s.smooth or [y for _, y, *_ in s.points] for s in filled])
            for group in [[s] for s in filled] if kind == "apart" else [filled] if filled else []:
                name = f"{title}: {group[0].name}" if kind == "apart" else title
                alone = kind if kind != "apart" else scale([[y for _, y, *_ in group[0].points]])
                # What lies behind the curve may be 0 or less where the curve is not.
                log = alone == "log" and min(low for s in group for _, _, low, _ in s.points) > 0
                yield Chart("training", "", name, "line", "update", unit, group, span(group, log), log_y=log)


def _traces(traces: Sequence[TraceFile], colour: Sequence[int]) -> Iterable[Chart]:
    names = [(t.name, SHARED if t.owner is None else colour[t.owner]) for t in traces]
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
    note = f"n = {' or '.join(dict.fromkeys(f'{t.total:,}' for t in traces))}"
    title, x, y = "Student's tokens by position", "position in the trace", "share of tokens"
    yield from chart("traces", "", title, "line", x, y, accepted, note=note)
    for title, x, field in (
        ("Length of a trace", "tokens", "lengths"),
        ("Student's share of a trace", "acceptance", "acceptance"),
    ):
        series = [Series(*name, cumulative(getattr(t, field))) for name, t in zip(names, traces, strict=True)]
        yield from chart("traces", "", title, "step", x, "share of traces", series, note=note)
