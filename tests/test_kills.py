"""Kills between any two durable writes of the shorter stages: the next call ends as if nothing had happened.

Here a kill is an exception that nothing handles, at a chosen call of fsync, with no cleaning up on its way;
benchmarks/crash.py kills real processes.
"""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import rundir
from dail_jax.checkpoint import base
from dail_jax.report import plots

# Stage: what it writes.
OUTPUTS = {
    "export": ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/MANIFEST.sha256"),
    "convert": ("model/config.json",),  # and Orbax's files, which hold the time: their checksums are verified
    "report": ("results.md", "results.tex", "report.html", "plots/pass_at_k.svg"),
    "grade": ("samples.jsonl", "results.json"),
    "select": ("selected.jsonl", "select/samples.jsonl", "select/results.json"),
    "calibrate": ("calibration.json", "calibration.md", "tau=0.6/traces.jsonl", "tau=0.99/traces.jsonl"),
    "sweep": ("results.md", "gamma=0.1/samples.jsonl", "gamma=0.1/adapter/adapter_model.safetensors"),
}


class Killed(BaseException):
    """As good as SIGKILL."""


@pytest.fixture(autouse=True)
def one(monkeypatch):
    monkeypatch.setattr(rundir, "SYNC_SECONDS", 0)  # so that the calls of fsync are always as many
    with tiny.alone():
        yield


ARGUMENTS = {"calibrate": ("--tau", "0.6,0.99"), "sweep": ("--over", "train.gamma=0.1")}


def run_until(stage: str, path: Path, count: int) -> int:
    """Runs a stage that is killed at its `count`th call of fsync; how many there were."""
    seen, fsync, rmtree = [], os.fsync, shutil.rmtree

    def note(handle):
        seen.append(handle)
        if len(seen) == count:
            raise Killed
        fsync(handle)

    def tidy(*args, **more):
        if len(seen) != count:  # the dead do not tidy up
            rmtree(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", note)
        patch.setattr(shutil, "rmtree", tidy)
        with contextlib.suppress(Killed):
            assert tiny.run(stage, path, *ARGUMENTS.get(stage, ())) == 0
    return len(seen)


def contents(folder: Path, stage: str) -> dict[str, bytes]:
    if stage == "convert":
        base.load(folder / "model", mesh_lib.make_mesh(config_lib.Mesh()), "float32")
    return {name: (folder / name).read_bytes() for name in OUTPUTS[stage]}


@pytest.mark.parametrize("stage", ["export", "convert", "report", "grade"])
def test_a_stage_that_was_killed_is_finished_by_the_next_call(tmp_path, pipeline, stage):
    folder = tmp_path / "run"
    shutil.copytree(pipeline, folder)
    path = tiny.write(folder)

    def anew():
        for name in ("adapter", "model"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if stage == "export":
            shutil.copy(pipeline / "run.json", folder)
            text = (folder / "run.json").read_text().replace('"export"', '"other"', 1)
            (folder / "run.json").write_text(text)

    anew()
    writes = run_until(stage, path, 0)
    want = contents(folder, stage)
    assert writes > 1
    for count in sorted({1, (1 + writes) // 2, writes}):
        anew()
        reached = run_until(stage, path, count)
        assert reached == count or count == writes  # how many files Orbax writes is not always the same
        assert tiny.run(stage, path) == 0
        assert contents(folder, stage) == want, count
        assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("stage", ["select", "calibrate", "sweep"])
def test_a_stage_of_several_runs_that_was_killed_twice_is_finished_by_the_next_call(
    tmp_path, pipeline, monkeypatch, stage
):
    changes = {
        "select": {"data": {"path": str(tiny.ASSETS / "hard.jsonl"), "limit": 2}},
        "calibrate": {"data__limit": 2},
        "sweep": {"traces": str(pipeline / "traces.jsonl")},  # all programs are those of `pipeline`
    }[stage]
    monkeypatch.setattr(plots, "draw", lambda _, folder: [folder])  # those are killed above, in `report`
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, cut = (tiny.write(tmp_path / name / "run", **changes) for name in ("whole", "cut"))
    third = run_until(stage, whole, 0) // 3
    for _ in range(2):
        assert run_until(stage, cut, third) == third
    assert run_until(stage, cut, 0) > 1
    assert contents(cut.with_suffix(""), stage) == contents(whole.with_suffix(""), stage)
