"""Methods are values: one is added from outside, and everything that configures, checks and trains it follows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax.errors import UserError
from dail_jax.stages import drops
from dail_jax.train import methods
from dail_jax.train.methods import CONTRAST, METHODS, Method


def smoothed(log, tokens, cfg):
    """nll, with a share of every token's weight spread over the vocabulary."""
    share, nll = cfg.loss["share"], -methods.chosen(log["student"], tokens["targets"])
    spread = -log["student"].mean(-1)
    return (1 - share) * nll + share * spread, {"nll": nll, "spread": spread}


@pytest.fixture
def mine(monkeypatch):
    method = Method("mine", "traces", smoothed, settings={"share": 0.1})
    monkeypatch.setitem(METHODS, "mine", method)
    return method


def of(**train):
    return methods.of(config_lib.build({"run_dir": "r", "model": {"path": "m"}, "train": train}, "c.yaml"))


def test_a_method_from_outside_trains(tmp_path, pipeline, mine, capsys):
    """One function and one entry: nothing else knows of it, and it goes from traces to results."""
    changes = {"train__objective": "mine", "train__loss": {"share": 0.3}}
    path = tiny.write(tmp_path / "run", traces=str(pipeline / "traces.jsonl"), evaluate__samples=2, **changes)
    with tiny.alone():
        for stage in ("train", "export", "evaluate"):
            assert tiny.run(stage, path) == 0
        assert "train: mine on " in capsys.readouterr().out
        rows = [r for r in tiny.lines(tmp_path / "run" / "metrics.jsonl") if r["stage"] == "train"]
        assert len(rows) == tiny.UPDATES and rows[-1]["nll"] < rows[0]["nll"]
        for r in rows:
            assert r["loss"] == pytest.approx(0.7 * r["nll"] + 0.3 * r["spread"], rel=1e-5)
        assert tiny.run("train", path, "train.loss.shar=1") == 2
        assert "train.loss.shar: unknown key; did you mean 'share'?" in capsys.readouterr().err


def test_gated_trains(tmp_path, pipeline):
    """On traces, with cached references; the parts of its loss are the contrast's and what the student missed."""
    changes = {"train__objective": "gated", "train__loss": {"epsilon": 0.5}, "train__gamma": 0.3}
    path = tiny.write(tmp_path / "run", traces=str(pipeline / "traces.jsonl"), **changes)
    with tiny.alone():
        assert tiny.run("train", path) == 0
    rows = [r for r in tiny.lines(tmp_path / "run" / "metrics.jsonl") if r["stage"] == "train"]
    assert len(rows) == tiny.UPDATES and rows[-1]["missed"] < rows[0]["missed"]
    for r in rows:
        assert r["loss"] == pytest.approx(r["kl_privileged"] - 0.3 * r["kl_negative"] + r["missed"], rel=1e-5)
    assert (tmp_path / "run" / "references" / "negative.bin").is_file()


def test_sharp_trains(tmp_path, pipeline):
    """On traces, with cached references; what it minimises is its distance to the target, which falls."""
    path = tiny.write(tmp_path / "run", traces=str(pipeline / "traces.jsonl"), train__objective="sharp")
    with tiny.alone():
        assert tiny.run("train", path) == 0
    rows = [r for r in tiny.lines(tmp_path / "run" / "metrics.jsonl") if r["stage"] == "train"]
    assert len(rows) == tiny.UPDATES and all(r["loss"] == r["excess"] > 0 and r["target_entropy"] > 0 for r in rows)
    assert sum(r["loss"] for r in rows[-3:]) < sum(r["loss"] for r in rows[:3])  # the same examples, an epoch later
    assert (tmp_path / "run" / "references" / "privileged.bin").read_bytes() == (
        pipeline / "references" / "privileged.bin"
    ).read_bytes()


def test_a_method_s_settings_have_defaults():
    z = np.random.default_rng(0).normal(size=(3, 1, 2, 9)).astype(np.float32)
    log = dict(zip(("student", *CONTRAST), jax.nn.log_softmax(z), strict=True))
    best = (log["privileged"] - 0.3 * log["negative"]).argmax(-1)[0]
    nll = -log["student"][0, jnp.arange(2), best]
    assert (nll > -np.log(0.6)).all() and (nll < -np.log(0.01)).all()
    for loss, missed in (({}, 0), ({"epsilon": 0.6, "temperature": 0.2}, nll)):  # another method's is not read
        cfg = config_lib.Train(objective="gated", gamma=0.3, loss=loss)
        np.testing.assert_allclose(METHODS["gated"].bind(cfg)(log, {})[1]["missed"][0], missed, atol=1e-6)


@pytest.mark.parametrize(
    ("train", "want"),
    [
        ({"objective": "dial"}, "train.objective: got 'dial', want one of dail, .* none; did you mean 'dail'?"),
        ({"gamma": 1}, "train: gamma must be below 1: the objective is unbounded otherwise"),
        ({"objective": "onpolicy", "gamma": 1}, "train: gamma must be below 1: the objective is unbounded otherwise"),
        (
            {"objective": "grpo", "online": {"problems": 3, "group": 4}},
            "train: online.problems * online.group must be a multiple of batch_size",
        ),
        (
            {"objective": "nurl", "online": {"sampling": {"top_p": 0.9}}},
            "train: nurl wants plain online.sampling: temperature 1 and no truncation",
        ),
        ({"loss": {"epsilom": 1}}, "train.loss.epsilom: unknown key; did you mean 'epsilon'?"),
        (
            {"objective": "gated", "gamma": 1, "kl": "forward"},
            "train: gamma must be below 1: there is no target otherwise",
        ),
        (
            {"objective": "gated", "loss": {"epsilon": 1}},
            "train: loss.epsilon must be above 0 and below 1, got 1",
        ),
        ({"objective": "sharp", "gamma": 1}, "train: gamma must be below 1: there is no target otherwise"),
        (
            {"objective": "sharp", "loss": {"temperature": 0}},
            "train: loss.temperature must be above 0 and at most 1, got 0",
        ),
        (
            {"objective": "sharp", "loss": {"temperature": 1.5}},
            "train: loss.temperature must be above 0 and at most 1, got 1.5",
        ),
    ],
)
def test_configurations_that_a_method_refuses(train, want):
    with pytest.raises(UserError) as error:
        of(**train)
    assert re.fullmatch(re.escape(want).replace(re.escape(".*"), ".*"), str(error.value))


def test_what_others_accept_is_not_refused():
    assert of(objective="nll", gamma=1).name == "nll"  # which does not read gamma
    assert of(gamma=1.5, kl="forward").name == "dail"
    assert of(loss={"temperature": 2}).name == "dail"
    assert of(objective="sharp", loss={"temperature": 1}, kl="forward").name == "sharp"
    assert of(objective="onpolicy", online={"sampling": {"top_p": 0.9}}).name == "onpolicy"


def test_what_each_method_asks_of_the_stages():
    cfg = config_lib.Train()
    assert [n for n, m in METHODS.items() if m.reads_traces(cfg)] == ["dail", "gated", "sharp", "nll", "star", "nurl"]
    assert [n for n, m in METHODS.items() if m.source == "samples"] == ["onpolicy", "grpo", "nurl"]
    assert [n for n, m in METHODS.items() if m.caches(cfg)] == ["dail", "gated", "sharp"]
    assert [n for n, m in METHODS.items() if m.rationalises] == ["star"]
    assert [n for n, m in METHODS.items() if not m.trains] == ["none"]
    assert METHODS["grpo"].prompted == METHODS["nll"].prompted == ("student",)
    base = {"run_dir": "r", "model": {"path": "m"}}
    kept = [drops.filters_of(config_lib.build({**base, "train": {"objective": n}}, "c")).correct for n in METHODS]
    assert [n for n, correct in zip(METHODS, kept, strict=True) if correct] == ["star"]
