"""The run directory: one process at a time, one configuration, and files that a kill cannot spoil."""

import json
import os
import select
import signal
import subprocess
import sys

import pytest

from dail_jax import config as config_lib
from dail_jax import metrics, rundir
from dail_jax.errors import UserError


def config(folder, **changes):
    tree = {"run_dir": str(folder), "model": {"path": "m"}, "data": {"path": "d"}}
    for key, value in changes.items():
        config_lib.assign(tree, key.replace("__", "."), value)
    return config_lib.build(tree, "test")


HOLD = """
import sys
from dail_jax import config, rundir
with rundir.RunDir(config.build({"run_dir": sys.argv[1], "model": {"path": "m"}}, "test")):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_names_the_other_process(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(UserError) as error, rundir.RunDir(config(tmp_path)):
        pass
    assert str(error.value) == f"{tmp_path}: in use by process {other.pid}: wait for it, or choose another run_dir"
    (tmp_path / ".report.html.99.tmp").write_text("torn")
    (tmp_path / ".adapter.99.tmp").mkdir()
    other.kill()  # a killed process holds nothing, and what it left half written is swept away
    other.communicate()
    with rundir.RunDir(config(tmp_path)):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        assert not list(tmp_path.glob(".*.tmp"))
    with rundir.RunDir(config(tmp_path)):
        pass


def test_of_three_that_start_together_one_works(tmp_path):
    (tmp_path / ".lock").write_text(str((1 << 22) + 1))  # of a process that was killed: above any number
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    started = [subprocess.Popen(command, env=env, text=True, **pipes) for _ in range(3)]
    streams = {process.stdout: process for process in started}
    held = []
    while len(held) < 1:
        for stream in select.select(list(streams), [], [])[0]:
            process = streams.pop(stream)
            if stream.readline() == "held\n":
                held.append(process)
    losers = [process for process in started if process not in held]
    errors = [process.communicate()[1] for process in losers]  # the winner holds the lock until it is told to go
    held[0].communicate("")
    assert held[0].returncode == 0 and all(process.returncode for process in losers)
    assert all(f"{tmp_path}: in use by process {held[0].pid}: wait for it" in error for error in errors)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as a run directory"), rundir.RunDir(config(tmp_path / "file")):
        pass


def test_stages_end_once_and_changes_are_refused(tmp_path):
    with rundir.RunDir(config(tmp_path)) as run, run.stage("generate", {"data": "aaa"}) as done:
        assert not done() and not run.finished("generate")
    assert run.finished("generate") and not run.finished("train")
    with rundir.RunDir(config(tmp_path)) as run, run.stage("generate", {"data": "aaa"}) as done:
        assert done()
    changed = config(tmp_path, generate__tau=0.5, seed=1, mesh__fsdp=2)
    with pytest.raises(UserError) as error, rundir.RunDir(changed) as run, run.stage("generate", {"data": "bbb"}):
        pass
    assert str(error.value) == (
        f"{tmp_path}: stage 'generate' was started with another configuration: "
        "seed: 3407 -> 1; generate.tau: 0.8 -> 0.5; inputs.data: 'aaa' -> 'bbb'. "
        "Use another run_dir, or delete this one"
    )
    assert rundir._differences({"a": [1, 2, {"b": "x" * 99}]}, {"a": [1, 3]}) == [
        "a.1: 2 -> 3",
        "a.2: {'b': '" + "x" * 50 + "... -> None",
    ]
    # What a stage does not read may change; so may the devices.
    later = config(tmp_path, train__epochs=9, mesh__fsdp=2)
    with rundir.RunDir(later) as run, run.stage("generate", {"data": "aaa"}) as done:
        assert done()
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["seed"] == 3407 and manifest["versions"]["jax"] and manifest["devices"] == 8
    assert config_lib.load(tmp_path / "config.yaml") == config(tmp_path)


def test_a_stage_that_fails_is_not_done_and_keeps_its_scratch_files(tmp_path):
    def attempt(fail):
        with rundir.RunDir(config(tmp_path)) as run, run.stage("train", scratch=("journal",)) as done:
            assert not done()
            (tmp_path / "journal").write_text("work")
            if fail:
                raise rundir.Interrupted
        return tmp_path / "journal"

    with pytest.raises(rundir.Interrupted):
        attempt(True)
    assert (tmp_path / "journal").exists()
    assert not attempt(False).exists()


def test_other_devices_are_said(tmp_path, capsys):
    def begin(devices):
        with rundir.RunDir(config(tmp_path)) as run, run.stage("train"):
            manifest = json.loads((tmp_path / "run.json").read_text())
            manifest["stages"]["train"]["place"]["devices"] = devices
            (tmp_path / "run.json").write_text(json.dumps(manifest))
            raise rundir.Interrupted

    for devices in (8, 4, 8):
        with pytest.raises(rundir.Interrupted):
            begin(devices)
    said = capsys.readouterr().out.strip()
    assert said == "train: resumed elsewhere (devices: 4 -> 8): results agree to rounding, not bit for bit"


def test_damaged_manifest_is_the_users_error(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: got a damaged file"):
        rundir.RunDir(config(tmp_path)).finished("train")


def test_atomic_writes(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    rundir.write_atomic(path, "one")
    rundir.write_atomic(path, b"two")
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["x.json"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no rename")))
    with pytest.raises(UserError, match=r"x\.json: cannot be written: no rename"):
        rundir.write_atomic(path, "three")
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["x.json"]


def test_journal_survives_every_cut(tmp_path):
    """Cut anywhere, the whole lines are kept, the torn one goes, and appending goes on from there."""
    path, rows = tmp_path / "j.jsonl", [{"n": i, "text": "ä\u2028\r\n" * i} for i in range(4)]
    journal = rundir.Journal(path)
    journal.append(*rows[:2])
    journal.append(*rows[2:])
    journal.close()
    whole = path.read_bytes()
    assert whole.isascii() and whole.count(b"\n") == 4
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = rundir.Journal(path)
        kept = whole[:cut].count(b"\n")
        assert journal.rows == rows[:kept]
        journal.append(*rows[kept:])
        journal.close()
        assert path.read_bytes() == whole


def test_journal_says_what_it_dropped_and_refuses_damage(tmp_path, capsys):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n":1}\n{"n":')
    rundir.Journal(path).close()
    assert "j.jsonl: dropped a torn last line" in capsys.readouterr().out
    path.write_bytes(b'{"n":1}\n{"n"\n{"n":3}\n')
    with pytest.raises(UserError) as error:
        rundir.Journal(path)
    message = "got a line that is not JSON: Expecting ':' delimiter at character 6: delete the file to make it anew"
    assert str(error.value) == f"{path}:2: {message}"
    path.write_bytes(b'{"n":1}\n' + b'{"n":' * 9000 + b"\n")
    with pytest.raises(UserError, match=r"j.jsonl:2: got a line nested too deeply, want at most 50 levels: delete"):
        rundir.Journal(path)
    with pytest.raises(ValueError, match="Out of range"):
        rundir.json_line({"x": float("nan")})


def test_metrics_forget_what_is_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for stage in ("generate", "train"):
        writer = metrics.Metrics(tmp_path, config_lib.Log(), stage)
        for step in range(1, 4):
            writer.write(step, loss=step / 2)
    path.write_bytes(path.read_bytes() + b'{"stage":"train","st')  # torn by a kill
    writer = metrics.Metrics(tmp_path, config_lib.Log(), "train")
    assert len(path.read_bytes().splitlines()) == 6
    writer.rewind(1)
    writer.write(2, loss=7.0)
    got = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in got] == [*(("generate", i) for i in (1, 2, 3)), ("train", 1), ("train", 2)]


def test_interrupts_are_noted_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with rundir.Interrupt() as interrupt:
        assert not interrupt.wanted
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
