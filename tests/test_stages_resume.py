"""Interrupted and killed stages resume where they stopped, and end with the same bytes as an undisturbed run."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from dail_jax import launch, rundir
from dail_jax.checkpoint.store import Store
from dail_jax.sample import engine


@pytest.fixture(autouse=True)
def one():
    with tiny.alone():
        yield


def stop_after(monkeypatch, looks, pulse=1000):
    """SIGTERM arrives just before a stage checks for it for the n-th time, which it does after `pulse` quiet chunks, too."""
    seen = []
    monkeypatch.setattr(engine, "PULSE", pulse)
    monkeypatch.setattr(rundir.Interrupt, "wanted", property(lambda _: seen.append(1) or len(seen) == looks))


def same_training(folder, whole):
    """Final parameters, losses and checkpoints equal those of the uninterrupted run, bit for bit."""
    assert tiny.losses(folder) == tiny.losses(whole)
    name = "adapter/adapter_model.safetensors"
    for run in (folder, whole):
        assert tiny.run("export", f"{run}.yaml") == 0
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    store = Store(folder / "checkpoints", 2)
    assert store.steps()[-1] == tiny.UPDATES
    store.close()


def test_generate_resumes_after_an_interrupt_and_a_torn_line(tmp_path, pipeline, monkeypatch, capsys):
    folder, path = tmp_path / "run", tiny.write(tmp_path / "run")
    with monkeypatch.context() as patch:  # a signal is heard while no sample has finished
        stop_after(patch, 1, pulse=1)
        assert tiny.run("generate", path) == launch.STOPPED
    assert "generating: stopped with 0 of 24 traces drawn; call again to resume" in capsys.readouterr().out
    stop_after(monkeypatch, 5)
    durable, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: durable.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(rundir, "SYNC_SECONDS", 1e9)
    assert tiny.run("generate", path) == launch.STOPPED
    assert "generating: stopped with 5 of 24 traces drawn; call again to resume" in capsys.readouterr().out
    journal = folder / "traces.partial.jsonl"
    kept = tiny.lines(journal)
    assert journal.stat().st_size in durable
    assert len(kept) == 5 and not (folder / "traces.jsonl").exists()
    journal.write_bytes(journal.read_bytes() + journal.read_bytes()[:100])  # as a crash would leave it
    assert tiny.run("generate", path) == 0
    assert f"{journal}: dropped a torn last line" in capsys.readouterr().out
    assert (folder / "traces.jsonl").read_bytes() == (pipeline / "traces.jsonl").read_bytes()
    assert not journal.exists()


def test_a_kill_between_traces_and_the_mark_costs_nothing(tmp_path, pipeline, monkeypatch):
    """The journal is deleted only once run.json says that the stage is done."""
    folder, path = tmp_path / "run", tiny.write(tmp_path / "run")
    monkeypatch.setattr(rundir, "_now", iter(["start"]).__next__)  # the second call, for the mark, fails
    with pytest.raises((StopIteration, RuntimeError)):
        tiny.run("generate", path)
    assert (folder / "traces.jsonl").exists() and len(tiny.lines(folder / "traces.partial.jsonl")) == 24
    monkeypatch.undo()
    with tiny.nothing_is_drawn():
        assert tiny.run("generate", path) == 0
    assert (folder / "traces.jsonl").read_bytes() == (pipeline / "traces.jsonl").read_bytes()
    assert not (folder / "traces.partial.jsonl").exists()


def test_evaluate_resumes_after_an_interrupt(tmp_path, pipeline, monkeypatch):
    folder, path = tmp_path / "run", tiny.write(tmp_path / "run")
    shutil.copytree(pipeline / "checkpoints", folder / "checkpoints")
    shutil.copy(pipeline / "run.json", folder)
    manifest = (folder / "run.json").read_text().replace('"evaluate"', '"other"', 1)
    (folder / "run.json").write_text(manifest)
    stop_after(monkeypatch, 4)
    assert tiny.run("evaluate", path) == launch.STOPPED
    assert len(tiny.lines(folder / "samples.partial.jsonl")) == 4
    assert tiny.run("evaluate", path) == 0
    for name in ("samples.jsonl", "results.json"):
        assert (folder / name).read_bytes() == (pipeline / name).read_bytes()
    assert not (folder / "samples.partial.jsonl").exists()


@pytest.mark.parametrize("looks", [1, 3])
def test_training_resumes_after_an_interrupt(tmp_path, pipeline, monkeypatch, capsys, looks):
    folder = tmp_path / "run"
    path = tiny.write(folder, traces=str(pipeline / "traces.jsonl"))
    stop_after(monkeypatch, looks)
    assert tiny.run("train", path) == launch.STOPPED
    assert f"train: stopped and saved at update {looks} of 6; call again to resume" in capsys.readouterr().out
    with (folder / "metrics.jsonl").open("a") as file:  # updates after the checkpoint, which a crash loses
        file.write('{"stage": "train", "step": 4, "loss": 99}\n{"stage": "tr')
    assert tiny.run("train", path) == 0
    assert f"train: resuming at update {looks}" in capsys.readouterr().out
    same_training(folder, pipeline)


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, pipeline, capsys):
    folder = tmp_path / "run"
    path = tiny.write(folder, traces=str(pipeline / "traces.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        assert tiny.run("train", path) == launch.STOPPED
    victim = max((folder / "checkpoints" / "4").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    assert tiny.run("train", path) == 0
    out = capsys.readouterr().out
    assert "checkpoint 4 is damaged" in out and "falling back" in out and "train: resuming at update 2" in out
    same_training(folder, pipeline)


def test_a_kill_before_the_first_checkpoint_leaves_no_rows(tmp_path, pipeline, monkeypatch):
    folder = tmp_path / "run"
    path = tiny.write(folder, traces=str(pipeline / "traces.jsonl"))
    monkeypatch.setattr(Store, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert tiny.run("train", path) == 130 and len(tiny.losses(folder)) == 2
    monkeypatch.undo()
    assert tiny.run("train", path) == 0
    same_training(folder, pipeline)


def test_changed_traces_are_noticed(tmp_path, pipeline, monkeypatch, capsys):
    traces = tmp_path / "t.jsonl"
    shutil.copy(pipeline / "traces.jsonl", traces)
    path = tiny.write(tmp_path / "run", traces=str(traces))
    stop_after(monkeypatch, 1)
    assert tiny.run("train", path) == launch.STOPPED
    traces.write_text("".join(traces.read_text().splitlines(keepends=True)[1:]))
    assert tiny.run("train", path) == 2
    assert "traces: the contents of " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# Real processes, real signals
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pipeline):
    """Uninterrupted runs of generate and train in processes of their own: with other threads, rounding differs."""
    folder = tmp_path_factory.mktemp("whole")
    generate = tiny.write(folder / "generate", generate__slots=2)
    train = tiny.write(folder / "train", traces=str(pipeline / "traces.jsonl"))
    for stage, path in (("generate", generate), ("train", train)):
        status, _, err = tiny.finish(tiny.start(stage, path))
        assert status == 0, err
    return folder


def test_sigkill_in_generate_loses_no_finished_trace(tmp_path, pipeline, whole):
    """Kills at random moments: what was durable stays, nothing is drawn twice, and the final bytes are the same."""
    folder, path = tmp_path / "run", tiny.write(tmp_path / "run", generate__slots=2)
    journal, rng, acknowledged = folder / "traces.partial.jsonl", random.Random(3), []
    for _ in range(2):
        process = tiny.start("generate", path)
        tiny.wait_for(journal, len(acknowledged) + rng.randint(1, 3), process)
        process.kill()
        process.communicate()
        lines = journal.read_bytes().split(b"\n")[:-1]
        assert lines[: len(acknowledged)] == acknowledged and len(lines) > len(acknowledged)
        acknowledged = lines
    status, _, err = tiny.finish(tiny.start("generate", path))
    assert status == 0, err
    assert (folder / "traces.jsonl").read_bytes() == (whole / "generate" / "traces.jsonl").read_bytes()
    got, want = tiny.lines(folder / "traces.jsonl"), tiny.lines(pipeline / "traces.jsonl")
    assert [t["response_ids"] for t in got] == [t["response_ids"] for t in want]  # with other slots, the same traces


def test_signals_in_train(tmp_path, pipeline, whole):
    """SIGTERM saves and exits with 75; SIGKILL loses what came after the last save; the results are bit-identical."""
    folder = tmp_path / "run"
    path = tiny.write(folder, traces=str(pipeline / "traces.jsonl"))
    log = folder / "metrics.jsonl"
    process = tiny.start("train", path)
    tiny.wait_for(log, 1, process, "train")
    process.send_signal(signal.SIGTERM)
    status, out, err = tiny.finish(process)
    assert status == launch.STOPPED and "train: stopped and saved at update" in out, (out, err)
    done = len(tiny.losses(folder))
    assert 1 <= done < tiny.UPDATES and f"saved at update {done} of 6" in out
    process = tiny.start("train", path)
    tiny.wait_for(log, done + 1, process, "train")
    process.kill()
    process.communicate()
    status, out, err = tiny.finish(tiny.start("train", path))
    assert status == 0 and "train: resuming at update" in out, (out, err)
    same_training(folder, whole / "train")


def test_worker_processes_feed_the_same_batches_and_die_with_their_parent(tmp_path, pipeline, whole):
    """Two workers: the same losses across a SIGKILL and a resume, and no orphan 10 s after their parent's death."""
    folder = tmp_path / "run"
    path = tiny.write(folder, traces=str(pipeline / "traces.jsonl"), train__workers=2, train__save_every=1)
    process = tiny.start("train", path)
    tiny.wait_for(folder / "metrics.jsonl", 1, process, "train")
    workers = [pid for pid in tiny.children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    tiny.wait_for(folder / "metrics.jsonl", 2, process, "train")  # so that the first update is saved
    process.kill()
    process.communicate()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(tiny.is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(tiny.is_alive, workers))
    status, out, err = tiny.finish(tiny.start("train", path))
    assert status == 0 and "train: resuming at update" in out and "shared_memory" not in err, (out, err)
    same_training(folder, whole / "train")


def test_sigterm_at_the_start_says_that_there_is_more_to_do(tmp_path):
    path = tiny.write(tmp_path / "run")
    process = tiny.start("generate", path)
    tiny.wait_for(tmp_path / "run" / "run.json", 1, process)  # the model is being loaded
    process.send_signal(signal.SIGTERM)
    status, _, err = tiny.finish(process)
    assert status == launch.STOPPED == 75 and "Traceback" not in err, err


def test_errors_are_one_line_and_status_2(tmp_path):
    path = tiny.write(tmp_path / "run")
    status, out, err = tiny.finish(tiny.start("train", path, "train.gama=0.2"))
    assert (status, out, err) == (2, "", f"error: {path}:train.gama: unknown key; did you mean 'gamma'?\n")


def test_training_that_is_not_finite_stops_and_saves_nothing(tmp_path, pipeline, capsys):
    settings = {"train__optimizer__learning_rate": 1e38, "train__save_every": 1, "train__max_skipped": 3}
    path = tiny.write(tmp_path / "run", traces=str(pipeline / "traces.jsonl"), **settings)
    assert tiny.run("train", path) == 2
    out, err = capsys.readouterr()
    assert "error: train: 3 updates in a row were not finite" in err
    finite = [bool(np.isfinite(loss) and np.isfinite(norm)) for _, loss, norm in tiny.losses(tmp_path / "run")]
    assert finite[-3:] == [False] * 3 and sum(finite) == len(finite) - 3
    assert out.count("was not finite and is skipped; rows: ") == 3
    saved = sorted(int(p.stem) for p in (tmp_path / "run" / "checkpoints" / "manifests").glob("*.json"))
    assert max(saved) == sum(finite)
