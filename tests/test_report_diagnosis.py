"""The signs of failure: what is found in healthy and broken runs, how bad it is, in which order, and what to do."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from dail_jax import config as config_lib
from dail_jax.report import collect, diagnosis


def run_of(name="dail", objective="dail", train=None, cells=None, config=None) -> collect.Run:
    """A run with these metrics of training by name, and these benchmarks: {name: {budget: figures}}."""
    metrics = {key: dict(enumerate(map(float, values), 1)) for key, values in (train or {}).items()}
    tree = config or {"train": {"gamma": 0.1, "online": {"sampling": {"max_tokens": 100}}}}
    results = {"objective": objective, "benchmarks": cells or {}}
    return collect.Run(name, Path(name), {}, "", tree, results, {"train": metrics}, {}, [], 0)


def cell(share, answered=1.0, forced=0.0, tokens=50.0, problems=60):
    """Figures of a benchmark whose problems have this share of right samples among 20, give or take one."""
    right = [min(20, max(0, round(20 * share) + (i % 3 - 1) * (0 < share < 1))) for i in range(problems)]
    shares = {"1": {"mean": sum(right) / 20 / problems}}
    figures = {"answered": answered, "forced": forced, "mean_tokens": tokens, "problems": problems, "samples": 20}
    return {**figures, "pass@k": shares, "per_problem": {f"p{i}": [c, 20] for i, c in enumerate(right)}}


def seen(*runs, traces=()):
    """(severity, title) of what was seen, in order."""
    return [(f.severity, f.title) for f in diagnosis.find(runs, traces) if f.seen]


def noise(n, scale=0.02, seed=0):
    return scale * np.random.default_rng(seed).normal(size=n)


def falling(n=200, start=2.0, end=0.3):
    return end + (start - end) * np.exp(-np.arange(n) / (n / 6))


def by_length(n=240, epoch=40, up=True):
    """(tokens, loss) of batches sorted by length in each epoch: short responses have twice the loss of long ones."""
    tokens = np.tile(np.geomspace(300, 4000, epoch)[:: 1 if up else -1], math.ceil(n / epoch))[:n]
    return tokens, falling(n, 0.6, 0.3) * (0.5 + 450 / tokens)


HEALTHY = {
    "falling": {"loss": falling() + noise(200), "excess": falling() + noise(200)},
    "sorted batches": {"tokens": by_length()[0], "loss": by_length()[1], "excess": by_length()[1]},
    "sorted downwards": {"tokens": by_length(up=False)[0], "loss": by_length(up=False)[1]},
    "one sorted epoch": {"tokens": by_length(200, 200)[0], "loss": by_length(200, 200)[1]},
    "two lengths in turns": {
        "tokens": np.where(np.arange(300) % 5 < 4, 500, 2000),
        "loss": np.where(np.arange(300) % 5 < 4, 0.001, 0.2) + falling(300, 0.3, 0.0) + noise(300, 1e-3),
    },
    "constant": {"loss": np.full(100, 0.6931) + noise(100, 1e-7)},
    "at the optimum": {"loss": noise(100, 1e-3), "excess": np.full(100, 0.003) + noise(100, 1e-4)},
    "heavy tails": {"loss": falling() * np.exp(0.4 * np.random.default_rng(1).standard_t(4, 200).clip(-3, 3))},
    "tiny": {"loss": [1.0, 0.9, 0.8], "excess": [0.5, 0.4, 0.5]},
    "twenty-five updates": {"loss": falling(25) + noise(25, 0.1), "excess": falling(25) + noise(25, 0.1)},
    "likelihood of certain data": {"loss": falling(200, 0.4, 0.001), "entropy": falling(200, 0.4, 0.001)},
    "online": {
        "loss": noise(200, 0.3),
        "kl_base": np.linspace(0, 2, 200),
        "reward": np.linspace(0.1, 0.97, 200),
        "entropy": falling(200, 1.0, 0.05),
        "response_tokens": np.full(200, 40.0),
    },
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_training_raises_no_alarm(kind):
    assert seen(run_of(train=HEALTHY[kind])) == []


def spiked(values, *at, by=3.0):
    values = np.array(values, np.float64)
    values[list(at)] += by
    return values


ONLINE = {"kl_base": np.full(100, 0.1), "loss": noise(100), "response_tokens": np.full(100, 40.0)}
BROKEN = {
    "diverging": (
        {"loss": [*falling(100), *np.linspace(0.3, 9, 60)] + noise(160), "excess": np.linspace(0.3, 5, 160)},
        [("red", "Loss rising")],
        "train.optimizer.learning_rate",
    ),
    "not finite": (
        {"loss": [*falling(60), *[math.nan] * 5]},
        [("red", "Losses not finite")],
        "train.optimizer.clip",
    ),
    "a spike": (
        {"loss": spiked(falling() + noise(200), 120)},
        [("amber", "Loss spikes")],
        "train.optimizer.clip",
    ),
    "a spike in a sorted epoch": (
        {"tokens": by_length(400, 100)[0], "loss": spiked(by_length(400, 100)[1], 290, by=1.0)},
        [("amber", "Loss spikes")],
        "train.gamma",
    ),
    "excess flat": (
        {"loss": np.full(100, 0.4) + noise(100), "excess": np.full(100, 0.4) + noise(100)},
        [("amber", "Excess not falling")],
        "train.epochs",
    ),
    "entropy collapse": (
        {**ONLINE, "reward": np.full(100, 0.3), "entropy": falling(100, 1.0, 0.02)},
        [("red", "Entropy collapse")],
        "train.online.kl_weight",
    ),
    "no rewards": (
        {**ONLINE, "reward": np.zeros(100), "entropy": np.full(100, 0.5)},
        [("red", "No rewards")],
        "train.online.group",
    ),
    "too long": (
        {**ONLINE, "reward": np.full(100, 0.3), "response_tokens": np.linspace(40, 100, 100)},
        [("red", "Samples too long")],
        "filters.finished",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_training_is_named_once(kind):
    train, expected, key = BROKEN[kind]
    assert seen(run_of(train=train)) == expected
    assert key in next(f for f in diagnosis.find([run_of(train=train)], []) if f.seen).advice


def test_advice_names_keys_that_exist():
    for _, advice in diagnosis.SIGNS.values():
        keys = re.findall(r"\b[a-z]+(?:\.[a-z_]+)+\b", advice)
        for key in keys:
            node = config_lib.Config
            for part in key.split("."):
                fields = node.model_fields
                assert part in fields, key
                kinds = [fields[part].annotation, *getattr(fields[part].annotation, "__args__", ())]
                node = next((kind for kind in kinds if hasattr(kind, "model_fields")), node)
        assert keys


def test_effects_are_ordered_and_small_ones_stand_apart():
    """-98 points are red, -5 are amber, a gain is neither; the red ones with the largest first, whatever their order."""
    before = run_of("base", "none", cells={name: {"64": cell(1.0)} for name in ("chain", "known", "hard")})
    sft = run_of(
        "sft", "sft", cells={"chain": {"64": cell(0.8)}, "known": {"64": cell(0.0)}, "hard": {"64": cell(1.0)}}
    )
    dail = run_of("dail", cells={"chain": {"64": cell(0.95)}, "known": {"64": cell(1.0)}, "hard": {"64": cell(1.0)}})
    spikes = run_of("nll", "nll", train={"loss": spiked(falling() + noise(200), 120)})
    red, amber, spike, *absent = diagnosis.find([before, dail, sft, spikes], [])
    assert (red.severity, red.title, red.size) == ("red", "Below the untrained model", 1.0)
    assert [line.split(":")[0] for line in red.figures] == ["sft, known, pass@1", "sft, chain, pass@1"]
    assert red.figures[0] == "sft, known, pass@1: -100.0 points [-100.0, -100.0], p <= 0.001"
    assert (amber.severity, amber.title) == ("amber", "Below the untrained model")
    assert amber.size == pytest.approx(0.05, abs=0.01) and [x[:11] for x in amber.figures] == ["dail, chain"]
    assert (spike.severity, spike.title, spike.size) == ("amber", "Loss spikes", 1 / 200)
    assert spike.figures == ("nll: 1 spike at updates 121, in 200 updates",)
    assert absent and {f.severity for f in absent} == {"none"}


def test_collapse_to_empty_answers_is_told_once():
    """What has no answer is below the untrained model as well, which is the same finding."""
    before = run_of("base", "none", cells={"known": {"64": cell(0.98), "32": cell(0.9)}, "hard": {"64": cell(0.0)}})
    empty = run_of(
        cells={"known": {"64": cell(0.0, answered=0.01, tokens=1.0), "32": cell(0.0)}, "hard": {"64": cell(0.0)}}
    )
    assert seen(before, empty) == [("red", "Answers have vanished")]
    finding = diagnosis.find([before, empty], [])[0]
    assert finding.size == pytest.approx(0.99) and "filters.finished" in finding.advice
    assert finding.figures[0].startswith(
        "dail, known: 1.0% of samples have an answer, 1.0 tokens on average (untrained: 100.0%, 50.0 tokens); pass@1 -98"
    )
    # where few answers are missing, they do not explain that all are wrong
    wrong = run_of(cells={"known": {"64": cell(0.0, answered=0.93), "32": cell(0.0, answered=0.93)}})
    assert seen(before, wrong) == [("red", "Below the untrained model"), ("amber", "Answers have vanished")]
    assert len(diagnosis.find([before, wrong], [])[0].figures) == 1  # not once per budget


def test_samples_that_grow_too_long():
    before = run_of("base", "none", cells={"known": {"64": cell(0.9, tokens=30.0)}})
    long = run_of(cells={"known": {"64": cell(0.5, forced=0.6, tokens=60.0)}})
    assert seen(before, long) == [("red", "Samples too long")]
    assert "60.0% of them a forced one" in diagnosis.find([before, long], [])[0].figures[0]
    assert seen(run_of(cells={"known": {"64": cell(0.5, forced=0.3, tokens=60.0)}})) == []
    assert seen(run_of(cells={"known": {"64": cell(0.1, answered=0.2, tokens=60.0)}})) == [("red", "Samples too long")]


def test_one_of_many_comparisons_may_be_low_by_chance():
    """What is significant by itself is none among twenty comparisons."""
    known = cell(0.5)
    fewer = {name: [c - (i % 10 == 0) - (i == 5), n] for i, (name, (c, n)) in enumerate(known["per_problem"].items())}
    runs = [run_of("base", "none", cells={"known": {"64": known}})]
    low = run_of("low", cells={"known": {"64": {**known, "per_problem": fewer}}})
    d = diagnosis.difference(runs[0], low, "known", "64")
    assert d is not None and d.sign == -1 and 0.01 < d.p < 0.05
    assert seen(*runs, low) == [("amber", "Below the untrained model")]
    assert seen(*runs, low, *(run_of(f"arm{i}", cells={"known": {"64": known}}) for i in range(19))) == []


def test_traces_that_are_cut():
    traces = collect.TraceFile("dail", 0, total=50, mentions=3)
    traces.finish.update(length=20, stop=30)
    found = diagnosis.find([run_of()], [traces])
    assert [(f.severity, f.title, f.size) for f in found] == [
        ("red", "Traces cut off", 0.4),
        ("amber", "Traces that mention the reference", 0.06),
    ]
    assert found[0].figures == ("dail: 20 of 50 traces (40.0%)",) and "generate.sampling.max_tokens" in found[0].advice


def test_shortcuts():
    """Better on what was trained on, and nowhere else."""
    rows = [{"name": name, "rows": {"path": f"{name}.jsonl"}} for name in ("train", "hard")]
    config = {"data": {"path": "train.jsonl"}, "evaluate": {"benchmarks": rows}}
    before = run_of("base", "none", cells={"train": {"64": cell(0.2)}, "hard": {"64": cell(0.2)}})
    after = run_of(cells={"train": {"64": cell(0.9)}, "hard": {"64": cell(0.2)}}, config=config)
    (finding,) = (f for f in diagnosis.find([before, after], []) if f.seen)
    assert (finding.severity, finding.title) == ("red", "Better on its training problems alone")
    assert finding.size == pytest.approx(0.7, abs=0.01) and "data.path" in finding.advice
    assert finding.figures[0].startswith("dail against base, pass@1: train +70.0 points [")
    better = run_of(cells={"train": {"64": cell(0.9)}, "hard": {"64": cell(0.5)}}, config=config)
    assert seen(before, better) == []
