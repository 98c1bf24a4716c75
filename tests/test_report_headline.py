"""The sentences at the top of the page, from figures that are given and from those of synthetic runs."""

import dataclasses
import json

import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax.evaluate.passk import Difference
from dail_jax.report import collect, headline
from dail_jax.report.headline import Benchmark, Outcome, Rival
from dail_jax.stages import experiment, recipes


def interval(mean: float, half: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def benchmark(title: str, before: float, after: float, half: float = 0.02, *rivals: Rival) -> Benchmark:
    """A benchmark whose difference has an interval of this half-width, and is certain if that excludes 0."""
    d = after - before
    difference = Difference(d, d - half, d + half, 0.001 if abs(d) > half else 0.5, 0, 0, 0)
    return Benchmark(title, interval(after), interval(before), difference, rivals)


def rival(title: str, k: int, ours: float, theirs: float, half: float = 0.02) -> Rival:
    found = benchmark(title, theirs, ours, half)
    assert found.before is not None and found.difference is not None
    return Rival(title, k, found.before, found.difference)


def composed(*benchmarks: Benchmark, arm: str | None = "DAIL", solutions: int | None = 800) -> list[tuple[int, str]]:
    """The signs and texts of the sentences, in plain characters."""
    sentences = headline.compose(Outcome(arm, "Qwen3-8B", solutions, benchmarks))
    return [(sentence.sign, sentence.text.replace("\u2212", "-").replace("\u00a0", " ")) for sentence in sentences]


def test_the_demo_in_four_sentences():
    hard = benchmark("hard", 0.003, 0.876, 0.07, rival("NLL", 1, 0.876, 0.607), rival("NLL", 32, 0.891, 1.0))
    known = benchmark("known", 0.988, 0.977, 0.005)
    assert composed(known, hard, benchmark("chain", 0.98, 0.971)) == [
        (
            1,
            "DAIL has taught Qwen3-8B from 800 expert solutions: pass@1 on hard rose, 0.3 → 87.6 (+87.3 [+80.3, +94.3]).",
        ),
        (
            1,
            "It keeps 99% of what it knew: known 98.8 → 97.7 (-1.1 [-1.6, -0.6]); "
            "chain 98.0 → 97.1 (-0.9 [-2.9, +1.1]).",
        ),
        (1, "Ahead of NLL at pass@1 on hard: 87.6 against 60.7 (+26.9 [+24.9, +28.9])."),
        (-1, "Behind NLL at pass@32 on hard: 89.1 against 100 (-10.9 [-12.9, -8.9])."),
    ]


def test_no_certain_change():
    ((sign, text),) = composed(benchmark("AIME 2024", 0.12, 0.131, 0.03))
    assert (sign, text) == (
        0,
        "DAIL has taught Qwen3-8B from 800 expert solutions: pass@1 on AIME 2024 did not change with certainty, "
        "12.0 → 13.1 (+1.1 [-1.9, +4.1]).",
    )
    level = composed(benchmark("a", 0.12, 0.131, 0.03, rival("NLL", 1, 0.131, 0.14, 0.03)))
    assert level[1] == (
        0,
        "Not certainly different from NLL at pass@1 on a: 13.1 against 14.0 (-0.9 [-3.9, +2.1]).",
    )
    exact = Rival("NLL", 8, interval(1.0), Difference(0.0, 0.0, 0.0, 1.0, 0, 0, 5))
    found = composed(benchmark("a", 0.1, 0.2, 0.02, exact))
    assert found[1] == (0, "Level with NLL at pass@8 on a: 100 against 100 (+0.0 [+0.0, +0.0]).")
    narrow = Difference(0.1, 0.02, 0.18, 0.06, 3, 1, 0)  # few problems: the interval and the test disagree
    found = composed(Benchmark("a", interval(0.3), interval(0.2), narrow))
    assert found[0][1].endswith("did not change with certainty, 20.0 → 30.0 (+10.0 [+2.0, +18.0], p = 0.06).")


def test_worse():
    lead, kept = composed(benchmark("a", 0.5, 0.3), benchmark("b", 0.9, 0.6))
    assert lead[0] == -1 and "pass@1 on a fell, 50.0 → 30.0 (-20.0 [-22.0, -18.0])." in lead[1]
    assert kept == (-1, "It keeps 67% of what it knew: b 90.0 → 60.0 (-30.0 [-32.0, -28.0]).")


def test_several_benchmarks_the_largest_gain_leads():
    found = composed(benchmark("a", 0.1, 0.2), benchmark("b", 0.1, 0.4), benchmark("c", 0.01, 0.01), solutions=None)
    assert [sign for sign, _ in found] == [1, 1, 0]
    assert found[0][1].startswith("DAIL has taught Qwen3-8B: pass@1 on b rose, 10.0 → 40.0")
    assert found[1][1] == "Better, too, on a 10.0 → 20.0 (+10.0 [+8.0, +12.0])."
    assert found[2][1] == "No gain on c 1.0 → 1.0 (+0.0 [-2.0, +2.0])."
    kept = composed(benchmark("a", 0.1, 0.2), benchmark("b", 0.5, 0.5))[1]
    assert kept[0] == 1 and kept[1].startswith("It keeps 100% of what it knew: b 50.0 → 50.0")
    assert kept[1].endswith(", no certain change.")


def test_one_arm_alone_and_none_at_all():
    one = Benchmark("hard", interval(0.876))
    assert composed(one) == [
        (
            0,
            "DAIL has taught Qwen3-8B from 800 expert solutions: pass@1 on hard 87.6 [85.6, 89.6], "
            "with no untrained model to compare it with.",
        )
    ]
    assert composed(one, arm=None) == [(0, "Qwen3-8B, untrained: pass@1 on hard 87.6 [85.6, 89.6].")]
    assert composed(arm="SFT") == [(0, "SFT has taught Qwen3-8B from 800 expert solutions. There is no pass@1 yet.")]


@pytest.fixture(scope="module")
def runs(synthetic_runs):
    return collect.read(*synthetic_runs)[0]


def test_figures_of_runs(runs):
    found = headline.outcome(runs, [None, 5, 7].__getitem__)
    assert (found.arm, found.model, found.solutions) == ("dail", "tiny", 7)
    assert [one.title for one in found.benchmarks] == ["hard", "known"]
    results = [json.loads((run.folder / "results.json").read_text())["benchmarks"]["hard"]["256"] for run in runs]
    hard = found.benchmarks[0]
    assert hard.after == results[2]["pass@k"]["1"] and hard.before == results[0]["pass@k"]["1"]
    assert hard.difference is not None and hard.difference.sign == 1
    means = [result["pass@k"]["1"]["mean"] for result in results]
    assert hard.difference.mean == pytest.approx(means[2] - means[0], abs=1e-6)
    assert [(one.title, one.k) for one in hard.rivals] == [("nll", 1), ("nll", 8)]
    assert hard.rivals[0].score["mean"] + hard.rivals[0].difference.mean == pytest.approx(means[2], abs=1e-5)


def test_which_arm_the_sentences_are_about(runs):
    """The one trained by `dail`; without one, or with several, the best at the first benchmark."""

    def arm(*chosen, **changes):
        some = [dataclasses.replace(run, results={**run.results, **changes.get(run.name, {})}) for run in chosen]
        return headline.outcome(some, lambda _: None).arm

    base, nll, dail = runs
    assert headline.outcome(runs, lambda _: None).best_of == 1  # it was not chosen for its figures
    two = headline.outcome(
        [nll, dataclasses.replace(dail, results={**dail.results, "objective": "grpo"})], lambda _: None
    )
    assert two.best_of == 2 and ", the best of 2 trained arms, has taught tiny: " in headline.compose(two)[0].text
    assert arm(base, nll, dail) == "dail" and arm(base, nll) == "nll" and arm(base) is None
    assert arm(nll, dail, nll={"objective": "dail"}, dail={"objective": "grpo"}) == "nll"
    assert arm(nll, dail, nll={"objective": "dail"}) == "dail"
    twins = [dataclasses.replace(run, config={**run.config, "title": "same"}) for run in (nll, dail)]
    assert arm(*twins) == "dail" and arm(dataclasses.replace(dail, name="my_run")) == "dail"  # not its folder's name
    alone = headline.outcome([dail], lambda _: None).benchmarks[0]
    assert alone.before is None and alone.difference is None and alone.rivals == []
    other = dataclasses.replace(base, config={**base.config, "model": {"path": "models/other"}})
    assert headline.outcome([other, dail], lambda _: None).benchmarks[0].before is None  # another model's scores


def test_titles_and_pools(runs):
    base, _, dail = runs
    tree = json.loads(json.dumps(dail.config))
    tree["title"], tree["model"]["title"] = "DAIL", "a tiny model"
    tree["evaluate"]["benchmarks"][0]["title"] = "New problems"
    titled = dataclasses.replace(dail, config=tree)
    found = headline.outcome([base, titled], lambda _: None)
    assert (found.arm, found.model) == ("DAIL", "a tiny model")
    assert [one.title for one in found.benchmarks] == ["New problems", "known"]
    tree["evaluate"]["benchmarks"][1]["pool"] = "hard"  # which then stands for its problems
    assert [one.title for one in headline.outcome([base, titled], lambda _: None).benchmarks] == ["New problems"]


def test_titles_in_force_stand_above_recorded_ones(runs):
    cfg = config_lib.build(
        {
            "run_dir": "r",
            "model": {"path": "m", "title": "new model"},
            "arms": {"dail": {"title": "new", "about": "now"}},
            "evaluate": {"benchmarks": [{"name": "hard", "rows": {"path": "x.jsonl"}, "title": "Hard ones"}]},
        },
        "test",
    )
    tree = collect.relabelled(runs[2].config, cfg.model_dump(mode="json"), "dail")
    assert (tree["title"], tree["about"], tree["model"]["title"]) == ("new", "now", "new model")
    assert tree["model"]["path"] == runs[2].config["model"]["path"]
    assert [one["title"] for one in tree["evaluate"]["benchmarks"]] == ["Hard ones", None]
    assert tree["evaluate"]["samples"] == runs[2].config["evaluate"]["samples"]


def test_titles_decide_no_output(tmp_path):
    """They may be corrected at any time, and an arm does not inherit the experiment's."""
    plain = tiny.tree(tmp_path / "r", arms={"a": {}, "b": {"title": "B", "about": "other"}})
    named = json.loads(json.dumps(plain))
    named |= {"title": "T", "about": "text"}
    named["model"]["title"] = "M"
    named["data"]["about"] = "how to read them"
    for one in named["evaluate"]["benchmarks"]:
        one |= {"title": "X", "about": "Y"}
    old, new = (config_lib.build(tree, "test") for tree in (plain, named))
    for recipe in (recipes.generate, recipes.train, recipes.evaluate, recipes.export):
        assert recipe(old).settings == recipe(new).settings
    arms = [experiment.arm(new, name) for name in new.arms]
    assert [(arm.title, arm.about) for arm in arms] == [(None, ""), ("B", "other")]
    assert arms[0].traces == str(tmp_path / "r" / "traces.jsonl")
