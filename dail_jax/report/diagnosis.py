"""Signs that the method has failed (arXiv 2602.02405), each with the figures that show it, or that show it is absent."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dail_jax.evaluate import passk
from dail_jax.evaluate.files import UNTRAINED
from dail_jax.report.charts import places
from dail_jax.report.collect import Run, TraceFile, setting

RESAMPLES = 1000
ARTEFACTS = 0.05  # a larger share of traces that mention the reference is a warning
# A spike is a loss more than MADS deviations above the median of the last WINDOW updates with batches of like size, that
# is with as many tokens to within a factor of ALIKE.
WINDOW, MADS = 20, 10.0
ALIKE = 1.25


@dataclass(frozen=True)
class Finding:
    """One check over some runs. `seen` says whether the sign is there; there are figures in either case."""

    seen: bool
    title: str
    meaning: str  # what usually causes it
    figures: tuple[str, ...]


Check = tuple[bool, str, str]  # (seen, title, figures) of one run

MEANINGS = {
    "Traces that mention the reference": "tau too high, or a reasoning model sampled directly",
    "Better on its training problems alone": "shortcuts were learnt instead of reasoning",
    "Below the untrained model": "over-fitting, or training data without the kinds of problems that got worse",
    "Accuracy falling at long budgets": "privileged distillation has cost a thinking model its long thoughts",
    "Loss spikes": "gamma or the learning rate too high",
    "Excess not falling": "gamma or the learning rate too high, or training too short",
}


def find(runs: Sequence[Run], traces: Sequence[TraceFile]) -> list[Finding]:
    """All checks for which there are figures; those that saw something come first."""
    first = baseline(runs)
    checks: list[Check] = [
        *_artefacts(traces),
        *_memorised(runs, first),
        *_falling(runs, first),
        *_long_budgets(runs),
        *_losses(runs),
    ]
    return [
        Finding(seen, title, meaning, figures)
        for seen in (True, False)
        for title, meaning in MEANINGS.items()
        if (figures := tuple(text for *key, text in checks if key == [seen, title]))
    ]


def baseline(runs: Sequence[Run]) -> int:
    """The index of the untrained model among the runs, or of the first run if there is none."""
    return next((i for i, run in enumerate(runs) if run.objective == UNTRAINED), 0)


def difference(a: Run, b: Run, benchmark: str, budget: str) -> passk.Difference | None:
    """How much higher pass@1 is in `b` than in `a`; None unless both have the same problems."""
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
    return f"{100 * found.mean:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}], p = {found.p:.2g}"


def _artefacts(traces: Sequence[TraceFile]) -> Iterator[Check]:
    for t in traces:
        if t.total:
            share = t.mentions / t.total
            yield (
                share > ARTEFACTS,
                "Traces that mention the reference",
                f"{t.name}: {t.mentions:,} of {t.total:,} traces ({share:.1%}), {t.drops['artefact']:,} dropped for it",
            )


def _memorised(runs: Sequence[Run], first: int) -> Iterator[Check]:
    """Better on the problems that were trained on, and on no other benchmark."""
    for run in runs:
        data = setting(run.config, "data.path")
        rows = {b["name"]: setting(b, "rows.path") for b in setting(run.config, "evaluate.benchmarks") or ()}
        gains = {name: difference(runs[first], run, name, budgets[-1]) for name, budgets in places(runs).items()}
        trained = {name: g for name, g in gains.items() if g and data and rows.get(name) == data}
        others = {name: g for name, g in gains.items() if g and name not in trained}
        if run is runs[first] or not trained or not others:
            continue
        seen = any(g.sign > 0 for g in trained.values()) and not any(g.sign > 0 for g in others.values())
        figures = ", ".join(f"{name} {_points(g)}" for name, g in {**trained, **others}.items())
        detail = f"{run.name} against {runs[first].name}, pass@1: {figures} (trained on {', '.join(trained)})"
        yield seen, "Better on its training problems alone", detail


def _falling(runs: Sequence[Run], first: int) -> Iterator[Check]:
    """Worse than the untrained model on some benchmark."""
    if runs[first].objective != UNTRAINED:
        return
    for run in runs:
        found = {
            f"{name} (budget {int(budget):,})": difference(runs[first], run, name, budget)
            for name, budgets in places(runs).items()
            for budget in budgets
        }
        compared = {place: d for place, d in found.items() if d}
        if run is runs[first] or not compared:
            continue
        worst = min(compared, key=lambda place: compared[place].mean)
        lost = [place for place, d in compared.items() if d.sign < 0]
        figures = ", ".join(f"{place} {_points(compared[place])}" for place in lost or [worst])
        yield bool(lost), "Below the untrained model", f"{run.name}, pass@1{'' if lost else ', at worst'}: {figures}"


def _long_budgets(runs: Sequence[Run]) -> Iterator[Check]:
    """More tokens, fewer right answers."""
    for run in runs:
        falls, seen = [], False
        for name, budgets in run.benchmarks.items():
            order = sorted(budgets, key=int)
            best = max(order, key=lambda b: (budgets[b]["pass@k"].get("1", {}).get("mean", 0.0), int(b)))
            d = paired(*(budgets[b].get("per_problem") for b in (best, order[-1])))
            if len(order) < 2 or d is None:
                continue
            seen |= d.sign < 0
            falls.append(
                f"{name} best at its longest budget, {int(best):,}"
                if best == order[-1]
                else f"{name} {_points(d)} from budget {int(best):,} to {int(order[-1]):,}"
            )
        if falls:
            yield seen, "Accuracy falling at long budgets", f"{run.name}, pass@1: {', '.join(falls)}"


def _losses(runs: Sequence[Run]) -> Iterator[Check]:
    for run in runs:
        rows = run.metrics.get("train", {})
        steps, loss = list(rows.get("loss", {})), np.array(list(rows.get("loss", {}).values()), np.float64)
        gamma = f" (gamma {setting(run.config, 'train.gamma')})" if "kl_negative" in rows else ""
        if len(loss) > WINDOW:
            tokens = rows.get("tokens", {})
            spikes = [steps[i] for i in _spikes(loss, np.array([tokens.get(step, 1) for step in steps], np.float64))]
            broken = int((~np.isfinite(loss)).sum())
            where = f" at updates {', '.join(map(str, spikes[:8]))}{', …' * (len(spikes) > 8)}" if spikes else ""
            detail = f"{len(spikes)} spikes{where}, {broken} losses not finite, in {len(loss):,} updates"
            yield bool(spikes or broken), "Loss spikes", f"{run.name}{gamma}: {detail}"
        excess = np.array([v for v in rows.get("excess", {}).values() if math.isfinite(v)])
        if len(excess) > WINDOW:
            start, end = excess[: len(excess) // 5], excess[-(len(excess) // 5) :]
            error = math.hypot(*(part.std() / math.sqrt(len(part)) for part in (start, end)))
            detail = f"{start.mean():.4g} over the first fifth of the updates, {end.mean():.4g} over the last"
            yield bool(end.mean() > start.mean() - 2 * error), "Excess not falling", f"{run.name}{gamma}: {detail}"


def _spikes(loss: np.ndarray, tokens: np.ndarray) -> list[int]:
    """The indices at which the loss stands out from the last WINDOW losses on batches with about as many tokens.

    Examples of like length are trained on together, and short responses have another loss than long ones. So most
    batches of a run may resemble each other while a few differ in every epoch, which is no spike. Batches of a size that
    has not occurred often enough yet are not judged.
    """
    spikes = []
    for i, (value, count) in enumerate(zip(loss, tokens, strict=True)):
        alike = (tokens[:i] <= count * ALIKE) & (tokens[:i] >= count / ALIKE) & np.isfinite(loss[:i])
        before = loss[:i][alike][-WINDOW:]
        if len(before) == WINDOW:
            middle = float(np.median(before))
            spread = 1.4826 * float(
                np.median(np.abs(before - middle))
            )  # the standard deviation, if losses were Gaussian
            if value > middle + MADS * max(spread, 1e-6):
                spikes.append(i)
    return spikes
