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


def sharpened(log, tokens, cfg):
    """KL(q_T || M) with q_T ~ (p_PS / p_NR^gamma)^(1/((1-gamma) T))."""
    sharp = 1 / ((1 - cfg.gamma) * cfg.loss["temperature"])
    q = jax.nn.log_softmax(sharp * (log["privileged"] - cfg.gamma * log["negative"]))
    loss = methods.kl_divergence(q, log["student"])
    return loss, {"kl_target": loss}


@pytest.fixture
def mine(monkeypatch):
    method = Method("mine", "traces", sharpened, CONTRAST, settings={"temperature": 0.3})
    monkeypatch.setitem(METHODS, "mine", method)
    return method


def of(**train):
    return methods.of(config_lib.build({"run_dir": "r", "model": {"path": "m"}, "train": train}, "c.yaml"))


def test_a_method_from_outside_trains(tmp_path, pipeline, mine, capsys):
    """One function and one entry: nothing else knows of it, and it goes from traces to results."""
    changes = {"train__objective": "mine", "train__loss": {"temperature": 0.5}, "train__gamma": 0.3}
    path = tiny.write(tmp_path / "run", traces=str(pipeline / "traces.jsonl"), evaluate__samples=2, **changes)
    with tiny.alone():
        for stage in ("train", "export", "evaluate"):
            assert tiny.run(stage, path) == 0
        assert "train: mine on " in capsys.readouterr().out
        rows = [r for r in tiny.lines(tmp_path / "run" / "metrics.jsonl") if r["stage"] == "train"]
        assert len(rows) == tiny.UPDATES and rows[-1]["kl_target"] < rows[0]["kl_target"]
        assert all(r["loss"] == r["kl_target"] > 0 for r in rows)
        assert (tmp_path / "run" / "references" / "negative.bin").is_file()  # cached like anyone else's
        assert tiny.run("train", path, "train.loss.temprature=1") == 2
        assert "train.loss.temprature: unknown key; did you mean 'temperature'?" in capsys.readouterr().err


def test_a_method_s_settings_have_defaults(mine):
    z = np.random.default_rng(0).normal(size=(3, 1, 2, 9)).astype(np.float32)
    log = dict(zip(("student", *CONTRAST), jax.nn.log_softmax(z), strict=True))
    for loss, temperature in (({}, 0.3), ({"temperature": 1.0}, 1.0)):
        cfg = config_lib.Train(objective="mine", gamma=0.3, loss=loss)
        got = mine.bind(cfg)(log, {})[0]
        q = jax.nn.softmax((log["privileged"] - 0.3 * log["negative"]) / 0.7 / temperature)
        np.testing.assert_allclose(got, (q * (jnp.log(q) - log["student"])).sum(-1), atol=1e-6)


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
        ({"loss": {"temperature": 1}}, "train.loss.temperature: unknown key; no method declares settings"),
    ],
)
def test_configurations_that_a_method_refuses(train, want):
    with pytest.raises(UserError) as error:
        of(**train)
    assert re.fullmatch(re.escape(want).replace(re.escape(".*"), ".*"), str(error.value))


def test_what_others_accept_is_not_refused():
    assert of(objective="nll", gamma=1).name == "nll"  # which does not read gamma
    assert of(gamma=1.5, kl="forward").name == "dail"
    assert of(objective="onpolicy", online={"sampling": {"top_p": 0.9}}).name == "onpolicy"


def test_what_each_method_asks_of_the_stages():
    cfg = config_lib.Train()
    assert [n for n, m in METHODS.items() if m.reads_traces(cfg)] == ["dail", "nll", "star", "nurl"]
    assert [n for n, m in METHODS.items() if m.source == "samples"] == ["onpolicy", "grpo", "nurl"]
    assert [n for n, m in METHODS.items() if m.caches(cfg)] == ["dail"]
    assert [n for n, m in METHODS.items() if m.rationalises] == ["star"]
    assert [n for n, m in METHODS.items() if not m.trains] == ["none"]
    assert METHODS["grpo"].prompted == METHODS["nll"].prompted == ("student",)
    base = {"run_dir": "r", "model": {"path": "m"}}
    kept = [drops.filters_of(config_lib.build({**base, "train": {"objective": n}}, "c")).correct for n in METHODS]
    assert [n for n, correct in zip(METHODS, kept, strict=True) if correct] == ["star"]
