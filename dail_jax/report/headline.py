"""What came out of some runs, in a few sentences: from their figures alone, with the intervals of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dail_jax.evaluate import protocol
from dail_jax.evaluate.files import UNTRAINED
from dail_jax.evaluate.passk import Difference
from dail_jax.report import diagnosis
from dail_jax.report.charts import places
from dail_jax.report.collect import Run, setting

KNEW = 0.1  # an untrained pass@1 from which a benchmark counts as something that the model knew
KEPT = 0.95  # the share of it that a model must keep for this to be good news

Score = Mapping[str, float]  # mean, low, high, as fractions


@dataclass(frozen=True)
class Rival:
    """Another arm at some k. `difference` is how much better the arm is that the sentences are about."""

    title: str
    k: int
    score: Score
    difference: Difference


@dataclass(frozen=True)
class Benchmark:
    """pass@1 on a benchmark, at its longest budget; `before` and `difference` are None without an untrained model."""

    title: str
    after: Score
    before: Score | None = None
    difference: Difference | None = None
    rivals: Sequence[Rival] = ()


@dataclass(frozen=True)
class Outcome:
    """What the sentences are written from. `arm` is the trained one that they are about, None if there is none yet."""

    arm: str | None
    model: str
    solutions: int | None
    benchmarks: Sequence[Benchmark]
    best_of: int = 1  # the number of trained arms that it was chosen from for its figures


@dataclass(frozen=True)
class Sentence:
    text: str
    sign: int = 0  # 1: good news, -1: bad news


# ---------------------------------------------------------------------------------------------------
# From runs to figures
# ---------------------------------------------------------------------------------------------------


def outcome(runs: Sequence[Run], solutions: Callable[[int], int | None]) -> Outcome:
    """The figures of the arm that the runs are about: `dail`, if one of them is that, otherwise the best one.

    `solutions` gives the number of expert solutions that a run, by its index, was given.
    """
    pooled = _pooled(runs)
    found = {name: budgets[-1] for name, budgets in places(runs).items() if name not in pooled}
    trained = [i for i, run in enumerate(runs) if run.objective not in ("", UNTRAINED)]
    scored = [i for i in trained if any(_score(runs[i], place, 1) for place in found.items())]
    known = [i for i in scored if runs[i].objective == "dail"]
    candidates = known if len(known) == 1 else scored or trained
    ours = max(candidates, key=lambda i: _best(runs[i], found), default=None)
    if ours is None:
        run = runs[diagnosis.baseline(runs)]
        alone = {name: _score(run, (name, budget), 1) for name, budget in found.items()}
        listed = [Benchmark(benchmark_title(runs, name), score) for name, score in alone.items() if score]
        return Outcome(None, _model(run), None, listed)
    run, model = runs[ours], setting(runs[ours].config, "model.path")
    same = (one for one in runs if one.objective == UNTRAINED and setting(one.config, "model.path") == model)
    base = next(same, None)
    rivals = [runs[i] for i in scored if i != ours]
    listed = [_benchmark(runs, run, base, rivals, place) for place in found.items() if _score(run, place, 1)]
    return Outcome(_title(runs, run), _model(run), solutions(ours), listed, len(candidates) if listed else 1)


def _title(runs: Sequence[Run], run: Run) -> str:
    """What an arm is called; a run by itself, whose title is the experiment's, is called by its method."""
    if len(runs) == 1:
        return run.objective
    return run.title if sum(one.title == run.title for one in runs) == 1 else run.name


def benchmark_title(runs: Sequence[Run], name: str) -> str:
    listed = (one for run in runs for one in setting(run.config, "evaluate.benchmarks") or ())
    return next((one["title"] for one in listed if one["name"] == name and one.get("title")), name)


def _pooled(runs: Sequence[Run]) -> set[str]:
    """The benchmarks whose problems are part of a pool, which stands for them."""
    known = {name for run in runs for name in run.benchmarks}
    listed = [one for run in runs for one in setting(run.config, "evaluate.benchmarks") or ()]
    return {one["name"] for one in listed if one.get("pool") in known}


def _model(run: Run) -> str:
    return setting(run.config, "model.title") or Path(setting(run.config, "model.path") or "the model").name


def _score(run: Run, place: tuple[str, str], k: int) -> Score | None:
    return run.benchmarks.get(place[0], {}).get(place[1], {}).get("pass@k", {}).get(str(k))


def _best(run: Run, found: Mapping[str, str]) -> float:
    """pass@1 on the first benchmark."""
    return next((score["mean"] for place in found.items() if (score := _score(run, place, 1))), -1.0)


def _benchmark(runs: Sequence[Run], run: Run, base: Run | None, rivals: Sequence[Run], place: tuple[str, str]):
    """The figures of `run`, which has some, at a place; its rivals are the best other arms at both ends of pass@k."""
    after, before = _score(run, place, 1), base and _score(base, place, 1)
    assert after is not None
    change = _difference(base, run, place, 1) if base else None
    ks = sorted(map(int, run.benchmarks[place[0]][place[1]]["pass@k"]))
    others = []
    for k in dict.fromkeys([1, ks[-1]]):
        against = [*rivals, base] if base and k > 1 else rivals  # at k = 1, the untrained model is what `before` is
        known = [
            Rival(_title(runs, one), k, score, d)
            for one in against
            if (score := _score(one, place, k)) and (d := _difference(one, run, place, k))
        ]
        others += sorted(known, key=lambda rival: rival.score["mean"])[-1:]
    return Benchmark(benchmark_title(runs, place[0]), after, before if change else None, change, others)


def _difference(a: Run, b: Run, place: tuple[str, str], k: int) -> Difference | None:
    """How much better pass@k is in `b`; None unless both have it, on the same problems."""
    if not (_score(a, place, k) and _score(b, place, k)):
        return None
    one, other = (run.benchmarks[place[0]][place[1]]["per_problem"].keys() for run in (a, b))
    if one != other:
        return None
    return protocol.compare(a.results, b.results, *place, k, 0, diagnosis.RESAMPLES)


# ---------------------------------------------------------------------------------------------------
# From figures to sentences
# ---------------------------------------------------------------------------------------------------


def compose(outcome: Outcome) -> list[Sentence]:
    """The sentences, the most important first; the first one says what was taught to what."""
    if not outcome.benchmarks:
        return [Sentence(f"{_taught(outcome)}. There is no pass@1 yet.")]
    main = max(outcome.benchmarks, key=_gain)
    rest = [one for one in outcome.benchmarks if one is not main]
    return [_lead(outcome, main), *_better(rest), *_kept(rest), *_against(main)]


def _gain(one: Benchmark) -> float:
    """What decides which benchmark leads: the largest certain gain, otherwise the order of the configuration."""
    return one.difference.mean if one.difference is not None and one.difference.sign > 0 else 0.0


def _taught(outcome: Outcome) -> str:
    if outcome.arm is None:
        return f"{outcome.model[:1].upper()}{outcome.model[1:]}, untrained"
    source = f" from {outcome.solutions:,} expert solutions" if outcome.solutions else ""
    chosen = f", the best of {outcome.best_of} trained arms," if outcome.best_of > 1 else ""
    return f"{outcome.arm}{chosen} has taught {outcome.model}{source}"


def _lead(outcome: Outcome, one: Benchmark) -> Sentence:
    if outcome.arm is None or one.before is None or one.difference is None:
        alone = "" if outcome.arm is None else ", with no untrained model to compare it with"
        return Sentence(f"{_taught(outcome)}: pass@1 on {one.title} {_interval(one.after)}{alone}.")
    verdict = {1: "rose", 0: "did not change with certainty", -1: "fell"}[one.difference.sign]
    return Sentence(
        f"{_taught(outcome)}: pass@1 on {one.title} {verdict}, {_change(one)}.",
        one.difference.sign,
    )


def _better(rest: Sequence[Benchmark]) -> Iterator[Sentence]:
    if found := [one for one in rest if one.difference is not None and one.difference.sign > 0]:
        yield Sentence(f"Better, too, on {_listed(found)}.", 1)


def _kept(rest: Sequence[Benchmark]) -> Iterator[Sentence]:
    """How much of what the untrained model could do is left, on the benchmarks that did not gain."""
    same = [one for one in rest if one.difference is not None and one.difference.sign <= 0]
    knew = [one for one in same if one.before is not None and one.before["mean"] >= KNEW]
    if knew:
        share = sum(one.after["mean"] for one in knew) / sum(one.before["mean"] for one in knew if one.before)
        lost = any(one.difference.sign < 0 for one in knew if one.difference)
        certain = "" if lost else ", no certain change"
        sign = -1 if lost and share < KEPT else 1 if share >= KEPT else 0
        yield Sentence(f"It keeps {100 * share:.0f}% of what it knew: {_listed(knew)}{certain}.", sign)
    if never := [one for one in same if one not in knew]:
        yield Sentence(f"No gain on {_listed(never)}.", -1 if any(_sign(one) < 0 for one in never) else 0)


def _sign(one: Benchmark) -> int:
    return 0 if one.difference is None else one.difference.sign


def _against(main: Benchmark) -> Iterator[Sentence]:
    for rival in main.rivals:
        d = rival.difference
        doubt = "Not certainly different from" if d.low or d.high else "Level with"
        verdict = {1: "Ahead of", 0: doubt, -1: "Behind"}[d.sign]
        yield Sentence(
            f"{verdict} {rival.title} at pass@{rival.k} on {main.title}: "
            f"{percent(rival.score['mean'] + rival.difference.mean)} against {percent(rival.score['mean'])} "
            f"({_points(rival.difference)}).",
            rival.difference.sign,
        )


def _listed(found: Sequence[Benchmark]) -> str:
    texts = [f"{one.title} {_change(one)}" for one in found]
    return "; ".join(texts)


def _change(one: Benchmark) -> str:
    assert one.before is not None and one.difference is not None
    # no-break spaces, so that the two stay on one line
    return f"{percent(one.before['mean'])}\u00a0\u2192\u00a0{percent(one.after['mean'])} ({_points(one.difference)})"


def _points(d: Difference) -> str:
    mean, low, high = (f"{100 * value:+.1f}".replace("-", "\u2212") for value in (d.mean, d.low, d.high))
    doubt = f", p = {d.p:.2g}" if not d.sign and (d.low > 0 or d.high < 0) else ""  # the interval and the test disagree
    return f"{mean} [{low}, {high}]{doubt}"


def _interval(found: Score) -> str:
    return f"{percent(found['mean'])} [{percent(found['low'])}, {percent(found['high'])}]"


def percent(share: float) -> str:
    """A share in percent with one decimal; 100 has none."""
    return f"{100 * share:.1f}".replace("100.0", "100")
