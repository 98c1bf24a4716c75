"""What long work shows where there is no terminal."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dail_jax import config as config_lib
from dail_jax import metrics
from dail_jax.errors import UserError
from dail_jax.train import loop


def test_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    monkeypatch.setattr(metrics.Progress, "every", 30.0)
    with metrics.progress("training", 160, "updates", done=100) as bar:
        for now in (110.0, 120.0, 131.0, 140.0, 162.0):  # noqa: B007
            bar.advance(2, note="loss 0.300")
    with metrics.progress("generating", 40, "traces") as bar:
        now = 192.5
        bar.advance(0)
    assert capsys.readouterr().out.splitlines() == [
        "training: 106 / 160 updates, 0.194 updates/s, loss 0.300, 0:00:31 elapsed, 0:04:39 left",
        "training: 110 / 160 updates, 0.161 updates/s, loss 0.300, 0:01:02 elapsed, 0:05:10 left",
        "generating: 0 / 40 traces, 0:00:30 elapsed",  # how long the rest takes, nobody knows yet
    ]


def test_long_compilations_are_announced(capsys, monkeypatch):
    monkeypatch.setattr(metrics.Progress, "every", 30.0)
    metrics.configure(config_lib.Log())
    metrics.configure(config_lib.Log(every=7))
    assert metrics.Progress.every == 7
    jax.monitoring.record_event_duration_secs(metrics.COMPILED, 12.3, fun_name="update")
    jax.monitoring.record_event_duration_secs(metrics.COMPILED, 4.9, fun_name="update")
    assert capsys.readouterr().out == "compiled update in 12 s\n"
    monkeypatch.setattr(metrics, "LONG", 0.0)
    jax.jit(lambda x: 3 * x + 41)(1.0)  # the event has the name that JAX gives it
    assert "compiled jit(<lambda>) in 0 s" in capsys.readouterr().out


def train(run_dir, log, steps=5):
    """The loop, with updates that do next to nothing."""
    double = jax.jit(lambda x: 2 * x)

    def update(state, arrays):
        return double(state), {"loss": state.sum(), "tokens": 1000, "finite": True, "bad_rows": np.zeros((1, 1), bool)}

    batch = loop.Batch({}, np.array([["a"]]))
    feed = SimpleNamespace(steps=steps, next=lambda *_: batch, close=lambda: None)
    trainer = loop.Trainer(lambda: jnp.ones(3), None, update, lambda step: 0.1, 9, 9)  # pyright: ignore[reportArgumentType]
    return loop.run(trainer, feed, None, metrics.Metrics(run_dir, log, "train"))  # pyright: ignore[reportArgumentType]


def test_a_profile_holds_the_updates_that_were_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics.Progress, "every", 0.0)
    events = []
    for name in ("start_trace", "stop_trace"):
        own = getattr(jax.profiler, name)
        monkeypatch.setattr(jax.profiler, name, lambda *a, own=own, name=name: (events.append((name, done())), own(*a)))

    def done():
        file = tmp_path / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    train(tmp_path, config_lib.Log.model_validate({"profile": {"from": 2, "steps": 2}}))
    assert events == [("start_trace", 1), ("stop_trace", 3)]  # after so many updates
    (found,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert found.stat().st_size > 1000
    out = capsys.readouterr().out
    assert f"train: wrote a trace of its updates to {tmp_path}/profile" in out
    assert re.search(r"training: 5 / 5 updates, .* updates/s, loss 48, [\d.e-]+ s/update, [\d,]+ tokens/s, ", out)
    events.clear()
    (tmp_path / "none").mkdir()
    train(tmp_path / "none", config_lib.Log(), 1)
    train(None, config_lib.Log.model_validate({"profile": {"from": 1, "steps": 1}}), 1)  # without a run directory
    assert not events
    late = config_lib.Log.model_validate({"profile": {"from": 5, "steps": 9}})
    train(tmp_path, late)
    assert [name for name, _ in events] == ["start_trace", "stop_trace"]  # the end of training ends it too


def test_a_profile_wants_a_beginning_and_a_length(tmp_path):
    for tree, words in (
        ("{from: 3}", "want both"),
        ("{from: 0, steps: 1}", "log.profile.from: got 0"),
        ("{to: 3}", "profile"),
    ):
        with pytest.raises(UserError, match=words):
            config_lib.build(
                {"run_dir": "r", "model": {"path": "m"}, "log": {"profile": config_lib.parse_yaml(tree, "t")}}, "c"
            )
