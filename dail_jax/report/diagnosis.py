"""Signs that the method has failed (arXiv 2602.02405): how bad each is, the figures that show it, and what to change."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from dail_jax.evaluate import passk, protocol
from dail_jax.evaluate.files import UNTRAINED
from dail_jax.report.charts import places
from dail_jax.report.collect import Run, TraceFile, setting

RESAMPLES = 1000
SERIOUS = 0.1  # a sign of this size is red, a smaller one amber
ARTEFACTS = 0.05  # a larger share of traces that mention the reference is a sign
CUT = 0.25  # a larger share of traces that do not end is a sign
UNANSWERED = 0.05  # so is a larger share of samples that lost their answers
LONGER = 1.2  # samples that are on average this many times as long as the untrained model's are long
SILENT = 0.5  # a larger share of updates without any reward is a sign
ENTROPY = 0.3  # online training that keeps less of its first entropy explores no more
SOLVED = 0.7  # where more of the samples are right, nothing is left to explore
# A spike is a loss that is far above the median of the last WINDOW updates with batches of like size, that is with as many
# tokens to within a factor of ALIKE: by MADS deviations, by RISE of the median, and by NOTICED nats.
WINDOW, MADS, RISE, NOTICED = 20, 10.0, 0.25, 0.1
ALIKE = 1.25
PER_FIFTH = 500  # updates that are looked at in each fifth of a training

Severity = Literal["red", "amber", "none"]


@dataclass(frozen=True)
class Finding:
    """One sign in some runs. `severity` is "none" where it was looked for and is absent; there are figures in each case.

    `size` is the largest effect among them, as a share: of right samples lost, of traces, of updates.
    """

    severity: Severity
    title: str
    meaning: str  # what usually causes it
    advice: str  # what to do, with the configuration keys to change
    size: float
    figures: tuple[str, ...]

    @property
    def seen(self) -> bool:
        return self.severity != "none"


class Check(NamedTuple):
    """One sign in one place. `about` is the run and the benchmark that it concerns."""

    title: str
    seen: bool
    size: float
    figures: str
    about: tuple[str, ...] = ()

    @property
    def severity(self) -> Severity:
        return "none" if not self.seen else "red" if self.size >= SERIOUS else "amber"


SIGNS = {  # title: (what usually causes it, what to do)
    "Answers have vanished": (
        "the model has learnt to stop early, or to leave the answer out",
        "set filters.finished and filters.correct, so that every trace ends in a right answer; lower "
        "train.optimizer.learning_rate or train.epochs",
    ),
    "Samples too long": (
        "the model has learnt from traces that do not end, or goes on without answering",
        "set filters.finished, so that every trace ends; lower filters.max_repetition; if longer samples are wanted, raise "
        "evaluate.sampling.max_tokens",
    ),
    "Below the untrained model": (
        "over-fitting, or training data without the kinds of problems that got worse",
        "lower train.epochs or train.optimizer.learning_rate, or add such problems to data.path",
    ),
    "Better on its training problems alone": (
        "shortcuts were learnt instead of reasoning",
        "lower train.epochs, raise train.gamma, or train on more problems (data.path)",
    ),
    "Accuracy falling at long budgets": (
        "privileged distillation has cost a thinking model its long thoughts",
        "lower train.epochs; raise generate.sampling.max_tokens and train.max_tokens, so that long traces are learned from",
    ),
    "Traces that mention the reference": (
        "tau too high, or a reasoning model sampled directly",
        "lower generate.tau (the command calibrate shows what other values do), or add the phrases to filters.artefacts",
    ),
    "Traces cut off": (
        "the limit is too short for this model's traces, or they repeat themselves",
        "raise generate.sampling.max_tokens; set filters.finished, so that such traces are not learned from",
    ),
    "Losses not finite": (
        "numbers overflow: the learning rate is too high, or the precision too low",
        "lower train.optimizer.learning_rate or train.optimizer.clip, or use model.dtype: float32; the log names the rows",
    ),
    "Loss rising": (
        "training diverges: the learning rate or gamma is too high",
        "lower train.optimizer.learning_rate or train.gamma, raise train.optimizer.warmup_steps",
    ),
    "Loss spikes": (
        "gamma or the learning rate too high",
        "lower train.optimizer.learning_rate or train.optimizer.clip, or train.gamma",
    ),
    "Excess not falling": (
        "training too short, or steps too small or too large to come nearer to the optimum",
        "raise train.epochs, or change train.optimizer.learning_rate: up if the curve is flat, down if it rises",
    ),
    "Entropy collapse": (
        "samples have become alike, so that nothing new is found",
        "raise train.online.kl_weight, lower train.optimizer.learning_rate",
    ),
    "No rewards": (
        "the problems are too hard for the model: a group that fails as a whole teaches nothing",
        "raise train.online.group, choose problems that it sometimes solves (the command select), or give hints "
        "(train.objective: nurl)",
    ),
}


def find(runs: Sequence[Run], traces: Sequence[TraceFile]) -> list[Finding]:
    """All signs for which there are figures: the red before the amber, each with the largest effect first, then those
    that are absent."""
    first = baseline(runs)
    answers = list(_answers(runs, first))
    explained = {check.about: check.size for check in answers if check.seen}  # what has no answer is not right either
    checks = [
        *answers,
        *_falling(runs, first, explained),
        *_memorised(runs, first),
        *_long_budgets(runs),
        *_traces(traces),
        *(check for run in runs for check in _training(run)),
    ]
    found = []
    for title, (meaning, advice) in SIGNS.items():
        for severity in ("red", "amber", "none"):
            own = sorted((c for c in checks if (c.title, c.severity) == (title, severity)), key=lambda c: -c.size)
            if own:
                figures = tuple(dict.fromkeys(check.figures for check in own))
                found.append(Finding(severity, title, meaning, advice, own[0].size, figures))
    return sorted(found, key=lambda f: (("red", "amber", "none").index(f.severity), -f.size if f.seen else 0))


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
    p = protocol.p_value(found.p, RESAMPLES)
    return f"{100 * found.mean:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}], {p}"


def _lower(found: passk.Difference, among: int) -> bool:
    """Whether pass@1 is lower, although it is the lowest of so many comparisons: Bonferroni's correction, as far as
    RESAMPLES can show it."""
    return found.sign < 0 and found.p <= max(passk.SIGNIFICANT / among, 2 / (1 + RESAMPLES))


# ---------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------


def _answers(runs: Sequence[Run], first: int) -> Iterator[Check]:
    """Samples without an answer at the longest budget: empty ones, and ones that are too long."""
    untrained = runs[first].objective == UNTRAINED
    for run in runs:
        if untrained and run is runs[first]:
            continue
        checks = []
        for name, budgets in run.benchmarks.items():
            budget = max(budgets, key=int)
            if not budgets[budget]["pass@k"]:  # of a benchmark that is not graded
                continue
            cell, before = budgets[budget], runs[first].benchmarks.get(name, {}).get(budget) if untrained else None
            was = before or {"answered": 1.0, "forced": 0.0, "mean_tokens": int(budget) / 2 / LONGER}
            long = cell["mean_tokens"] > LONGER * was["mean_tokens"]
            lost, forced = was["answered"] - cell["answered"], cell["forced"] - was["forced"]
            size, least = max(lost, forced if long else 0.0), UNANSWERED if before else 0.5
            figures = f"{run.name}, {name}: {cell['answered']:.1%} of samples have an answer, " + (
                f"{cell['forced']:.1%} of them a forced one, " if cell["forced"] else ""
            )
            figures += f"{cell['mean_tokens']:,.1f} tokens on average"
            if before:
                figures += f" (untrained: {before['answered']:.1%}, {before['mean_tokens']:,.1f} tokens)"
            d = difference(runs[first], run, name, budget) if before else None
            figures += f"; pass@1 {_points(d)}" if d else ""
            title = "Samples too long" if long else "Answers have vanished"
            checks.append(Check(title, size >= least, size, figures, (run.name, name)))
        seen = [check for check in checks if check.seen]
        yield from seen or sorted(checks, key=lambda check: -check.size)[:1]


def _falling(runs: Sequence[Run], first: int, explained: Mapping[tuple[str, ...], float]) -> Iterator[Check]:
    """Worse than the untrained model on some benchmark: each at the budget where it lost most.

    Where at least half of the loss is `explained` by another sign, it is not told twice.
    """
    if runs[first].objective != UNTRAINED:
        return
    found = {
        (run.name, name, budget): d
        for run in runs
        for name, budgets in places(runs).items()
        for budget in budgets
        if run is not runs[first] and (d := difference(runs[first], run, name, budget))
        if -d.mean > 2 * explained.get((run.name, name), 0.0) or (run.name, name) not in explained
    }
    for run in runs:
        several = {name: len(budgets) > 1 for name, budgets in run.benchmarks.items()}
        # A significant loss comes before a larger one that is not.
        order = sorted(
            (key for key in found if key[0] == run.name),
            key=lambda key: (not _lower(found[key], len(found)), found[key].mean),
        )
        worst = {name: (budget, found[arm, name, budget]) for arm, name, budget in reversed(order)}
        lost = {name: d for name, (_, d) in worst.items() if _lower(d, len(found))}
        for name in lost or [order[0][1]] if order else []:
            budget, d = worst[name]
            where = f"{name} (budget {int(budget):,})" if several.get(name) else name
            text = f"{run.name}, {where}, pass@1{'' if lost else ', at worst'}: {_points(d)}"
            yield Check("Below the untrained model", name in lost, -d.mean, text, (run.name, name))


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
        size = max(g.mean for g in trained.values()) - max(0.0, *(g.mean for g in others.values()))
        figures = ", ".join(f"{name} {_points(g)}" for name, g in {**trained, **others}.items())
        detail = f"{run.name} against {runs[first].name}, pass@1: {figures} (trained on {', '.join(trained)})"
        yield Check("Better on its training problems alone", seen, size, detail)


def _long_budgets(runs: Sequence[Run]) -> Iterator[Check]:
    """More tokens, fewer right answers."""
    found: dict[tuple[str, str], tuple[str, str, passk.Difference]] = {}
    for run in runs:
        for name, budgets in run.benchmarks.items():
            order = sorted(budgets, key=int)
            best = max(order, key=lambda b: (budgets[b]["pass@k"].get("1", {}).get("mean", 0.0), int(b)))
            d = paired(*(budgets[b].get("per_problem") for b in (best, order[-1])))
            if len(order) > 1 and d is not None:
                found[run.name, name] = best, order[-1], d
    for (arm, name), (best, last, d) in found.items():
        text = (
            f"best at its longest budget, {int(best):,}"
            if best == last
            else f"{_points(d)} from budget {int(best):,} to {int(last):,}"
        )
        yield Check(
            "Accuracy falling at long budgets", _lower(d, len(found)), -d.mean, f"{arm}, {name}, pass@1: {text}"
        )


def _traces(traces: Sequence[TraceFile]) -> Iterator[Check]:
    for t in traces:
        if not t.total:
            continue
        share, cut = t.mentions / t.total, t.finish["length"] / t.total
        figures = (
            f"{t.name}: {t.mentions:,} of {t.total:,} traces ({share:.1%}), {t.drops['artefact']:,} dropped for it"
        )
        yield Check("Traces that mention the reference", share > ARTEFACTS, share, figures)
        figures = f"{t.name}: {t.finish['length']:,} of {t.total:,} traces ({cut:.1%})"
        yield Check("Traces cut off", cut > CUT, cut, figures)


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------

Levels = list[tuple[float, float]]  # (mean, standard error) over each fifth of the updates


def _training(run: Run) -> Iterator[Check]:
    rows = run.metrics.get("train", {})
    loss = np.array([v for _, v in sorted(rows.get("loss", {}).items())], np.float64)
    steps = sorted(rows.get("loss", {}))
    if len(loss) <= WINDOW:
        return
    tokens = np.array([rows.get("tokens", {}).get(step, 1.0) for step in steps], np.float64)
    about = f"{run.name} (gamma {setting(run.config, 'train.gamma')})" if "kl_negative" in rows else run.name
    series: Callable[[str], np.ndarray] = lambda key: np.array(  # noqa: E731
        [rows.get(key, {}).get(step, math.nan) for step in steps], np.float64
    )
    broken = int((~np.isfinite(loss)).sum())
    size = 1.0 if broken and not np.isfinite(loss[-1]) else broken / len(loss)
    yield Check("Losses not finite", broken > 0, size, f"{about}: {broken:,} of {len(loss):,} updates were skipped")
    if "kl_base" not in rows:  # a policy gradient's loss has no level of its own
        rising = list(_rising(about, loss, tokens))
        yield from rising
        if not any(check.seen for check in rising):
            yield _spiking(about, steps, loss, tokens)
            if levels := _levels(series("excess"), tokens):
                yield _excess(about, levels)
    if "response_tokens" in rows:
        yield from _online(about, run.config, series, tokens)


def _rising(about: str, loss: np.ndarray, tokens: np.ndarray) -> Iterator[Check]:
    levels = _levels(loss, tokens)
    if not levels:
        return
    (end, error), (low, low_error) = levels[-1], min(levels)
    rise, fall = end - low, levels[0][0] - low
    seen = rise > 4 * math.hypot(error, low_error) and rise > max(RISE * fall, RISE * abs(low), NOTICED / 2)
    figures = f"{about}: {end:.4g} over the last fifth of the updates, {low:.4g} at its lowest"
    yield Check("Loss rising", seen, min(1.0, rise / max(abs(low), NOTICED)), figures)


def _spiking(about: str, steps: Sequence[int], loss: np.ndarray, tokens: np.ndarray) -> Check:
    spikes = [steps[i] for i in _spikes(loss, tokens)]
    where = f" at updates {', '.join(map(str, spikes[:8]))}{', …' * (len(spikes) > 8)}" if spikes else ""
    count = f"{len(spikes)} spike{'s' * (len(spikes) != 1)}"
    figures = f"{about}: {count}{where}, in {len(loss):,} updates"
    return Check("Loss spikes", bool(spikes), len(spikes) / len(loss), figures)


def _excess(about: str, levels: Levels) -> Check:
    (start, before), (end, after) = levels[0], levels[-1]
    seen = end > start - 2 * math.hypot(before, after) and end > NOTICED / 2
    figures = f"{about}: {start:.4g} over the first fifth of the updates, {end:.4g} over the last"
    return Check("Excess not falling", seen, min(1.0, max(0.0, end - start)), figures)


def _online(
    about: str, config: Mapping[str, Any], series: Callable[[str], np.ndarray], tokens: np.ndarray
) -> Iterator[Check]:
    """Signs in the student's own samples: no rewards, lengths at the limit, no variety."""
    rewards, entropy, lengths = (x[np.isfinite(x)] for x in map(series, ("reward", "entropy", "response_tokens")))
    fifth = slice(-max(1, len(lengths) // 5), None)
    right = float(rewards[fifth].mean()) if len(rewards) else 0.0
    if len(rewards):
        silent = float((rewards == 0).mean())
        figures = f"{about}: no right sample in {silent:.1%} of the updates; {right:.1%} right over the last fifth"
        yield Check("No rewards", silent > SILENT, silent, figures)
    limit = setting(config, "train.online.sampling.max_tokens")
    if limit and len(lengths):
        mean = float(lengths[fifth].mean())
        figures = f"{about}: {mean:,.1f} tokens on average over the last fifth of the updates, of {limit:,}"
        yield Check("Samples too long", mean > 0.9 * limit and right < SOLVED, mean / limit, figures)
    if len(entropy):
        start, end = float(entropy[: max(1, len(entropy) // 5)].mean()), float(entropy[fifth].mean())
        figures = f"{about}: {start:.3g} nats per token over the first fifth of the updates, {end:.3g} over the last"
        seen = end < ENTROPY * start and right < SOLVED
        yield Check("Entropy collapse", seen, 1 - end / start if start else 0.0, figures)


def _levels(values: np.ndarray, tokens: np.ndarray) -> Levels:
    """The level of a metric over each fifth of the updates, on batches with as many tokens as those of the last fifth.

    Batches hold examples of like length, and long ones have another loss than short ones: as long as a fifth holds some
    of like size, each is compared with their mean. Empty if there are few updates, or a fifth without such batches.
    """
    known = np.isfinite(values) & (tokens > 0)
    values, sizes = values[known], np.log(tokens[known])
    if len(values) <= WINDOW:
        return []
    parts = [part[:: math.ceil(len(part) / PER_FIFTH)] for part in np.array_split(np.arange(len(values)), 5)]
    alike: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda a, b: (  # noqa: E731
        np.abs(sizes[a][:, None] - sizes[b]) <= math.log(ALIKE)
    )
    last = parts[-1]
    shared = last[np.all([alike(last, part).any(1) for part in parts], axis=0)]
    if len(shared) < len(last) / 2:
        return []
    levels = []
    for part in parts:
        near, own = alike(shared, part), alike(part, part)
        level = (near @ values[part] / near.sum(1)).mean()
        noise = (values[part] - own @ values[part] / own.sum(1)).std()  # around batches of like size
        levels.append((float(level), float(noise) / math.sqrt(len(part))))
    return levels


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
            # the standard deviation, if losses were Gaussian
            spread = 1.4826 * float(np.median(np.abs(before - middle)))
            if value > middle + max(MADS * spread, RISE * abs(middle), NOTICED):
                spikes.append(i)
    return spikes
