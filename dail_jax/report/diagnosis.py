"""Failure signatures of the method (arXiv 2602.02405) that figures of the runs can show, each with those figures."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dail_jax.evaluate import passk
from dail_jax.report.charts import places
from dail_jax.report.collect import Run, Traces, setting

RESAMPLES = 1000
ARTEFACTS = 0.05  # a larger share of traces that mention the reference is a warning
WINDOW, MADS = 20, 10.0  # a loss this many deviations above the median of this many updates before is a spike


@dataclass(frozen=True)
class Finding:
    """One check. `seen`: the signature is there; `detail` has the figures either way."""

    seen: bool
    title: str
    detail: str


def find(runs: Sequence[Run], traces: Sequence[Traces]) -> list[Finding]:
    """All checks for which there are figures, those that saw something first."""
    first = baseline(runs)
    checks = [*_artefacts(traces), *_memorised(runs, first), *_falling(runs, first), *_long_budgets(runs), *_losses(runs)]
    return sorted(checks, key=lambda finding: not finding.seen)


def baseline(runs: Sequence[Run]) -> int:
    """The place of the untrained model among the runs, else of the first."""
    return next((i for i, run in enumerate(runs) if run.objective == "none"), 0)


def difference(a: Run, b: Run, benchmark: str, budget: str) -> passk.Difference | None:
    """How much higher pass@1 is in `b` than in `a`; None where they have not the same problems."""
    counts = [run.benchmarks.get(benchmark, {}).get(budget, {}).get("per_problem") for run in (a, b)]
    return paired(*counts)


def paired(a: dict[str, list[int]] | None, b: dict[str, list[int]] | None) -> passk.Difference | None:
    """The same for two `per_problem` entries of results.json."""
    return _paired(*(tuple((name, c, n) for name, (c, n) in sorted(x.items())) for x in (a, b))) if a and b else None


@functools.lru_cache(maxsize=4096)
def _paired(*counts: tuple[tuple[str, int, int], ...]) -> passk.Difference | None:
    a, b = ({name: c / n for name, c, n in count} for count in counts)  # pass@1 is the share of right samples
    return passk.paired_difference(a, b, 0, RESAMPLES) if a.keys() == b.keys() else None


def _points(found: passk.Difference) -> str:
    return f"{100 * found.mean:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _artefacts(traces: Sequence[Traces]) -> Iterator[Finding]:
    for t in traces:
        count = sum(n for reason, n in t.drops.items() if reason.startswith("artefact"))
        share = count / t.total if t.total else 0.0
        advice = "Usual causes: tau too high, or direct sampling from a reasoning model. " if share > ARTEFACTS else ""
        if t.total:
            yield Finding(share > ARTEFACTS, "Traces that mention the reference",
                          f"{advice}{count} of {t.total:,} traces ({share:.1%}) were dropped for it ({t.name}).")  # fmt: skip


def _memorised(runs: Sequence[Run], first: int) -> Iterator[Finding]:
    """Better on the problems that were trained on, and on no other benchmark."""
    for run in runs:
        data = setting(run.config, "data.path")
        rows = {b["name"]: setting(b, "rows.path") for b in setting(run.config, "evaluate.benchmarks") or ()}
        gains = {name: difference(runs[first], run, name, budgets[-1]) for name, budgets in places(runs).items()}
        trained = {name: g for name, g in gains.items() if g and data and rows.get(name) == data}
        others = {name: g for name, g in gains.items() if g and name not in trained}
        if run is runs[first] or not trained or not others:
            continue
        seen = any(g.low > 0 for g in trained.values()) and not any(g.low > 0 for g in others.values())
        figures = ", ".join(f"{name} {_points(g)}" for name, g in {**trained, **others}.items())
        yield Finding(seen, "Better on its training problems alone",
                      f"{'It learnt shortcuts rather than reasoning. ' if seen else ''}{run.name} against "
                      f"{runs[first].name}, pass@1: {figures}. Trained on: {', '.join(trained)}.")  # fmt: skip


def _falling(runs: Sequence[Run], first: int) -> Iterator[Finding]:
    """Below the untrained model on some benchmark."""
    if runs[first].objective != "none":
        return
    for run in runs:
        found = {(name, b): difference(runs[first], run, name, b) for name, budgets in places(runs).items() for b in budgets}
        compared = [(f"{name} (budget {int(b):,})", d) for (name, b), d in found.items() if d]
        if run is runs[first] or not compared:
            continue
        lost = [(place, d) for place, d in compared if d.high < 0]
        advice = "Old skills are lost: over-fitting, or no pairs of the old kinds in the data. " if lost else ""
        worst = lost or [min(compared, key=lambda pair: pair[1].mean)]
        yield Finding(bool(lost), "Below the untrained model",
                      f"{advice}{run.name} against {runs[first].name}, pass@1, {'falling' if lost else 'the least gain'}: "
                      f"{', '.join(f'{place} {_points(d)}' for place, d in worst)}.")  # fmt: skip


def _long_budgets(runs: Sequence[Run]) -> Iterator[Finding]:
    """More tokens, fewer right answers."""
    for run in runs:
        falls = []
        for name, budgets in run.benchmarks.items():
            order = sorted(budgets, key=int)
            best = max(order, key=lambda b: budgets[b]["pass@k"].get("1", {}).get("mean", 0.0))
            counts = [budgets[b].get("per_problem") for b in (best, order[-1])]
            d = paired(*counts)
            if len(order) > 1 and d:
                falls.append((f"{name} {_points(d)} from budget {int(best):,} to {int(order[-1]):,}", d.high < 0))
        if falls:
            shown = [text for text, seen in falls if seen] or [text for text, _ in falls]
            yield Finding(any(seen for _, seen in falls), "Accuracy falling at long budgets",
                          f"{run.name}, pass@1 at its best budget and at the longest: {', '.join(shown)}.")  # fmt: skip


def _losses(runs: Sequence[Run]) -> Iterator[Finding]:
    for run in runs:
        rows = run.metrics.get("train", {})
        steps, loss = list(rows.get("loss", {})), np.array(list(rows.get("loss", {}).values()), np.float64)
        gamma = setting(run.config, "train.gamma")
        advice = f"gamma ({gamma}) or the learning rate may be too high. " if run.objective == "dail" else ""
        if len(loss) > WINDOW:
            spikes = [step for i, step in enumerate(steps) if i >= WINDOW and _spike(loss[i - WINDOW : i], loss[i])]
            broken = int((~np.isfinite(loss)).sum())
            where = f" (updates {', '.join(map(str, spikes[:8]))}{', …' if len(spikes) > 8 else ''})" if spikes else ""
            seen = bool(spikes or broken)
            yield Finding(seen, "Loss spikes", f"{advice * seen}{run.name}: {len(spikes)} spikes{where} and {broken} "
                          f"losses that are not finite, in {len(loss):,} updates.")  # fmt: skip
        excess = np.array([v for v in rows.get("excess", {}).values() if math.isfinite(v)])
        if len(excess) > WINDOW:
            start, end = excess[: len(excess) // 5], excess[-(len(excess) // 5) :]
            error = math.hypot(*(part.std() / math.sqrt(len(part)) for part in (start, end)))
            seen = bool(end.mean() > start.mean() - 2 * error)
            yield Finding(seen, "Excess not falling", f"{advice * seen}{run.name}: {start.mean():.4g} over the first fifth "
                          f"of the updates, {end.mean():.4g} over the last.")  # fmt: skip


def _spike(before: np.ndarray, value: float) -> bool:
    middle = float(np.median(before))
    spread = 1.4826 * float(np.median(np.abs(before - middle)))
    return value > middle + MADS * max(spread, 1e-6)
