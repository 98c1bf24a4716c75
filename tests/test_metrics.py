"""What long work shows where there is no terminal."""

import jax

from dail_jax import config as config_lib
from dail_jax import metrics


def test_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    monkeypatch.setattr(metrics.Progress, "every", 30.0)
    with metrics.progress("training", 160, "updates", done=100) as bar:
        for now in (110.0, 120.0, 131.0, 140.0, 162.0):  # noqa: B007
            bar.advance(2, note="loss 0.300")
    assert capsys.readouterr().out.splitlines() == [
        "training: 106 / 160 updates, 0.194 updates/s, loss 0.300, 0:00:31 elapsed, 0:04:39 left",
        "training: 110 / 160 updates, 0.161 updates/s, loss 0.300, 0:01:02 elapsed, 0:05:10 left",
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
