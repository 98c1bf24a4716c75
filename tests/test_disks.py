"""Disks that are full, over quota, read-only or broken: one line that names the path, and nothing finished is lost.

A limit on the size of files, which needs no privileges, makes the system itself refuse to write: EFBIG.
"""

import contextlib
import errno
import os

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_stages_resume import same_training

from dail_jax import config as config_lib
from dail_jax import metrics, rundir
from dail_jax.checkpoint import hf
from dail_jax.checkpoint.store import Store, damaged
from dail_jax.errors import UserError, reason
from dail_jax.stages import export
from dail_jax.train import references

FULL = "cannot be written: File too large; what was finished is kept"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_every_failure_of_a_disk_names_the_file(tmp_path, monkeypatch, code):
    path = tmp_path / "results.json"
    monkeypatch.setattr(rundir, "SYNC_SECONDS", 0)
    rundir.write_atomic(path, "old")
    journal = rundir.Journal(tmp_path / "journal.jsonl")
    journal.append({"n": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    for write, file in ((lambda: rundir.write_atomic(path, "new"), path), (lambda: journal.append({}), journal.path)):
        with pytest.raises(UserError) as error:
            write()
        assert str(error.value) == f"{file}: cannot be written: {os.strerror(code)}; what was finished is kept"
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["journal.jsonl", "results.json"]


def test_a_full_disk_keeps_the_rows_that_were_there(tmp_path):
    journal = rundir.Journal(tmp_path / "journal.jsonl")
    rows = [{"n": n, "text": "x" * 1000} for n in range(3)]
    with tiny.small_files(2500), pytest.raises(UserError, match=FULL):
        for row in rows:
            journal.append(row)
    journal.close()
    again = rundir.Journal(tmp_path / "journal.jsonl")  # the torn row goes
    assert again.rows == rows[:2]
    again.close()
    with tiny.small_files(100), pytest.raises(UserError, match=rf"metrics\.jsonl: {FULL}"):
        metrics.Metrics(tmp_path, config_lib.Log(), "train").write(1, note="x" * 200)


def test_references_take_their_space_before_they_are_computed(tmp_path):
    """A sparse memory map would end in SIGBUS instead, in the middle of the work."""
    path = tmp_path / "references" / "privileged.bin"
    references._allocate(path, 1 << 20)
    assert path.stat().st_size == 1 << 20 and path.stat().st_blocks * 512 >= 1 << 20
    with tiny.small_files(1 << 16), pytest.raises(UserError, match=rf"privileged\.bin: {FULL}"):
        references._allocate(path, 1 << 20)
    assert not path.parent.exists()


def test_a_checkpoint_that_does_not_fit_leaves_those_before_it(tmp_path, capfd):
    state = {name: jnp.arange(30_000.0) * n for n, name in enumerate("abcdef")}
    store = Store(tmp_path, keep=2)
    store.save(1, state, {})
    with tiny.small_files(1 << 14), pytest.raises(UserError, match=rf"{tmp_path}/2: {FULL}"):
        store.save(2, state, {})
    assert store.steps() == [1] and damaged(tmp_path, 1) is None
    assert sorted(os.listdir(tmp_path)) == ["1", "manifests"]
    assert "Traceback" not in capfd.readouterr().err
    store.close()


def test_model_folders_that_do_not_fit_leave_nothing(tmp_path):
    with (
        tiny.small_files(1 << 14),
        pytest.raises(UserError, match=f"m: {FULL}"),
        hf.new_folder(tmp_path / "m") as folder,
    ):
        hf.save_file({"x": np.zeros(30_000)}, folder / "model.safetensors")
    assert not os.listdir(tmp_path)


def test_training_goes_on_when_there_is_room_again(tmp_path, pipeline, capsys):
    folder = tmp_path / "run"
    path = tiny.write(folder, traces=str(pipeline / "traces.jsonl"))
    save = Store.save

    def on_a_full_disk(self, step, *args):
        with tiny.small_files(1 << 14) if step == 4 else contextlib.nullcontext():
            save(self, step, *args)

    with tiny.alone():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "save", on_a_full_disk)
            assert tiny.run("train", path) == 2
        assert capsys.readouterr().err == f"error: {folder / 'checkpoints' / '4'}: {FULL}\n"
        assert tiny.run("train", path) == 0
        assert "train: resuming at update 2" in capsys.readouterr().out
        same_training(folder, pipeline)


def test_errors_without_a_name_blame_the_run_directory(tmp_path, monkeypatch, capsys):
    path = tiny.write(tmp_path / "run")
    for error, place in (
        (OSError(errno.ENOSPC, "No space left on device"), tmp_path / "run"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x"),
    ):
        monkeypatch.setattr(export, "run", lambda _, error=error: (_ for _ in ()).throw(error))
        assert tiny.run("export", path) == 2
        assert capsys.readouterr().err == f"error: {place}: {error.strerror}; what was finished is kept\n"


def test_libraries_reasons_are_the_systems():
    assert reason(ValueError("""RESOURCE_EXHAUSTED: "x": Failed to write to file 9: Foo [os_error_code='28']""")) == (
        "No space left on device"
    )
    assert reason(ValueError("Error while serializing: I/O error: Foo (os error 28)")) == ("No space left on device")
    assert reason(ValueError("first\nsecond")) == "first" and reason(ValueError()) == "ValueError"
