"""The run directory: one process at a time, one configuration, and files that a kill cannot spoil."""

import contextlib
import dataclasses
import hashlib
import json
import os
import select
import signal
import subprocess
import sys

import pytest

from dail_jax import config as config_lib
from dail_jax import metrics, provenance, rundir
from dail_jax.errors import Interrupted, UserError


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


def test_only_our_own_temporary_files_are_swept(tmp_path):
    """In the places where we write, and by our whole pattern; a user's dot-folder stays."""
    theirs = (".mydata.tmp", ".mydata.old.tmp", "mine.7.tmp", "data/.x.7.tmp")
    ours = (".traces.jsonl.7.tmp", "plots/.a.png.7.tmp", "checkpoints/manifests/.3.json.7.tmp")
    for name in (*theirs, *ours):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("x")
    with rundir.RunDir(config(tmp_path)):
        assert all((tmp_path / name / "file").exists() for name in theirs)
        assert not any((tmp_path / name).exists() for name in ours)


# ---------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------


def recipe(settings=None, data="aaa", path="rows.jsonl", **more):
    """A stage `draw` that writes out.txt, and sum.txt from it."""
    outputs = (provenance.File("out.txt"), provenance.File("sum.txt", derived=True))
    inputs = {"data.path": provenance.Input(path, lambda _: data)}
    return provenance.Recipe("draw", {"seed": 1} if settings is None else settings, inputs, outputs, **more)


def run(folder, recipe, fail=False, write=("out.txt", "sum.txt"), **changes):
    """Whether the stage was done before."""
    with rundir.RunDir(config(folder, **changes)) as opened, opened.stage(recipe) as stage:
        if not stage.done:
            for name in write:
                (folder / name).write_text(name)
            if fail:
                raise Interrupted
        return stage.done


def test_a_stage_ends_once(tmp_path):
    assert not run(tmp_path, recipe()) and run(tmp_path, recipe())
    assert run(tmp_path, recipe(path="moved.jsonl"), mesh__fsdp=2)  # the same contents elsewhere; other devices
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["seed"] == 3407 and manifest["versions"]["jax"] and manifest["devices"] == 8
    record = manifest["stages"]["draw"]
    assert record["settings"] == {"seed": 1}
    assert record["inputs"] == {"data.path": {"path": "rows.jsonl", "sha256": "aaa"}}
    assert record["outputs"] == {name: hashlib.sha256(name.encode()).hexdigest() for name in ("out.txt", "sum.txt")}
    assert config_lib.load(tmp_path / "config.yaml") == config(tmp_path)


@pytest.mark.parametrize("fail", [False, True])
def test_changes_are_named_where_there_is_work(tmp_path, fail):
    with contextlib.suppress(Interrupted):
        run(tmp_path, recipe({"seed": 1, "generate": {"tau": 0.8}}), fail)
    with pytest.raises(UserError) as error:
        run(tmp_path, recipe({"seed": 2, "generate": {"tau": 0.5}}, "bbb"))
    assert str(error.value) == (
        f"{tmp_path}: stage `draw` was started with another configuration: seed: 1 -> 2; generate.tau: 0.8 -> 0.5; "
        "data.path: the contents of 'rows.jsonl' have changed. "
        "Use another run_dir, or delete out.txt, sum.txt to start the stage anew"
    )
    with pytest.raises(UserError, match=r"configuration: data\.path: 'rows\.jsonl' -> 'b\.jsonl'\. Use"):
        run(tmp_path, recipe({"seed": 1, "generate": {"tau": 0.8}}, "bbb", "b.jsonl"))
    assert (tmp_path / "out.txt").read_text() == "out.txt"


def test_differences_are_cut():
    assert provenance.differences({"a": [1, 2, {"b": "x" * 99}]}, {"a": [1, 3]}) == [
        "a.1: 2 -> 3",
        "a.2: {'b': '" + "x" * 50 + "... -> None",
    ]


def test_changes_are_taken_where_nothing_was_made(tmp_path):
    """A first start that failed leaves a record, and perhaps an empty journal."""
    (tmp_path / "journal").write_text("")
    with pytest.raises(Interrupted):
        run(tmp_path, recipe(partial=("journal",)), fail=True, write=())
    assert not run(tmp_path, recipe({"seed": 2}, partial=("journal",)))
    assert json.loads((tmp_path / "run.json").read_text())["stages"]["draw"]["settings"] == {"seed": 2}


def test_work_without_a_record_is_not_taken_for_ours(tmp_path):
    (tmp_path / "out.txt").write_text("of somebody else")
    with pytest.raises(UserError) as error:
        run(tmp_path, recipe())
    assert str(error.value) == (
        f"{tmp_path}/out.txt: already exists, and no stage `draw` of {tmp_path} is on record as having made it: "
        "use another run_dir, or move it away"
    )
    assert (tmp_path / "out.txt").read_text() == "of somebody else"


def test_done_is_said_only_of_whole_outputs(tmp_path, capsys):
    run(tmp_path, recipe())
    (tmp_path / "sum.txt").write_text("torn")  # derived: made again
    assert not run(tmp_path, recipe()) and run(tmp_path, recipe())
    (tmp_path / "out.txt").unlink()
    assert not run(tmp_path, recipe()) and run(tmp_path, recipe())
    assert capsys.readouterr().out.splitlines() == [
        "draw: done before, but sum.txt is stale; made again",
        "draw: done before, but out.txt is missing; made again",
    ]
    (tmp_path / "out.txt").write_text("out.tx")
    with pytest.raises(UserError) as error:
        run(tmp_path, recipe())
    assert str(error.value) == (
        f"{tmp_path}/out.txt: is not what was written here, by its SHA-256: put that back, or delete the file to make "
        "it again"
    )


def test_another_summary_makes_derived_outputs_stale(tmp_path):
    run(tmp_path, recipe(summary={"ks": [1]}))
    with rundir.RunDir(config(tmp_path)) as opened, opened.stage(recipe(summary={"ks": [2]})) as stage:
        assert stage.states == {"out.txt": "intact", "sum.txt": "stale"} and not stage.done
    assert run(tmp_path, recipe(summary={"ks": [2]}))


def test_a_stage_looks_at_what_it_reads(tmp_path):
    """Earlier stages must be finished, made with this configuration, and whole; what is gone is not mistaken."""

    def later(**more):
        return provenance.Recipe("later", {}, {}, (provenance.File("later.txt"),), after=(recipe(**more),))

    def read(recipe):
        return run(tmp_path, recipe, write=("later.txt",))

    def unreadable(_):
        raise UserError("no such file")

    with pytest.raises(UserError) as error:
        read(later())
    assert str(error.value) == f"{tmp_path}/out.txt: not finished: run the stage `draw` first"
    run(tmp_path, recipe())
    with pytest.raises(UserError) as error:
        read(later(settings={"seed": 2}))
    assert str(error.value) == (
        f"{tmp_path}: stage `draw` was run with another configuration: seed: 1 -> 2. Use that one, or another run_dir"
    )
    with pytest.raises(UserError, match=r"the contents of 'rows\.jsonl' have changed"):
        read(later(data="bbb"))
    (tmp_path / "out.txt").unlink()
    with pytest.raises(UserError, match="missing: run the stage `draw` again"):
        read(later())
    run(tmp_path, recipe())
    gone = dataclasses.replace(recipe(), inputs={"data.path": provenance.Input("rows.jsonl", unreadable)})
    assert not read(dataclasses.replace(later(), after=(gone,))) and read(later())
    (tmp_path / "out.txt").unlink()
    assert read(later())  # done: it reads nothing more
    (tmp_path / "sum.txt").unlink()
    run(tmp_path, recipe({"seed": 2}))  # the stage was run anew
    with pytest.raises(UserError, match="stage `draw` has been run again, with another configuration"):
        read(later(settings={"seed": 2}))


def test_a_stage_that_fails_is_not_done_and_keeps_its_scratch(tmp_path):
    def attempt(fail):
        (tmp_path / "kept").mkdir(exist_ok=True)
        run(tmp_path, recipe(partial=("kept/*",), scratch=("kept", "journal")), fail=fail)
        return (tmp_path / "kept").exists()

    with pytest.raises(Interrupted):
        attempt(True)
    assert (tmp_path / "kept").exists()
    assert not attempt(False)


def change(folder, *keys, value):
    tree = json.loads((folder / "run.json").read_text())
    node = tree["stages"]["draw"]
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    (folder / "run.json").write_text(json.dumps(tree))


def test_other_devices_are_logged_and_other_packages_refused(tmp_path, capsys):
    with pytest.raises(Interrupted):
        run(tmp_path, recipe(), fail=True)
    change(tmp_path, "place", "devices", value=4)
    with pytest.raises(Interrupted):
        run(tmp_path, recipe(), fail=True)
    assert capsys.readouterr().out.strip() == (
        "draw: resumed elsewhere (devices: 4 -> 8): results agree to rounding, not bit for bit"
    )
    change(tmp_path, "versions", "grain", value="0.1")
    with pytest.raises(UserError, match=r"other packages, which decide its results: grain: '0\.1' -> '0\.2\..*Install"):
        run(tmp_path, recipe())


def test_digests_of_large_files_are_remembered(tmp_path, monkeypatch):
    """Until size, inode or a time changes; a file that has just changed is read again."""
    path, read = tmp_path / "weights", []
    monkeypatch.setattr(provenance, "LARGE", 4)
    monkeypatch.setattr(provenance, "sha256", lambda path: read.append(path) or f"digest {len(read)}")
    path.write_text("12345")
    checksum = provenance.Checksums()
    assert [checksum(path), checksum(path)] == ["digest 1", "digest 2"] and not checksum.known
    monkeypatch.setattr(provenance, "SETTLED", -(10**18))
    assert [checksum(path), checksum(path)] == ["digest 3"] * 2
    assert provenance.Checksums(json.loads(json.dumps(checksum.known)))(path) == "digest 3"  # in another process
    stat = path.stat()
    path.write_text("54321")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times would
    assert checksum(path) == "digest 4"


def test_damaged_manifests_are_the_users_error(tmp_path):
    for text, message in (
        ("{", "got a file that is not JSON"),
        ("[]", "want a JSON object"),
        ('{"stages": 3}', "stages: got 3, want"),
        ('{"stages": {"draw": {"inputs": {"data": 3}}}}', r"stages\.draw\.inputs\.data: got 3, want"),
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=rf"run\.json:? ?.*{message}") as error:
            run(tmp_path, recipe())
        assert "\n" not in str(error.value)


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
    with rundir.Interrupt(keeps=False):  # there is nothing to save
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
