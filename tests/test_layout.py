"""`auto`: estimates beside what was compiled, choices for slices that are not here, and what a run keeps of them."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tiny
from test_config import RUNS, planned

from dail_jax import config as config_lib
from dail_jax import resources
from dail_jax.ahead import chips, layout, programs
from dail_jax.errors import UserError
from dail_jax.model import families
from dail_jax.stages import auto, experiment, plan
from dail_jax.stages.session import open_session

CONFIGS = Path(__file__).parent.parent / "configs"

V6E = layout.Devices(16, 1, "TPU v6 lite", 32e9, chips.CHIPS["TPU v6 lite"])
V5E = layout.Devices(16, 1, "TPU v5 lite", 16e9, chips.CHIPS["TPU v5 lite"])
QWEN = "configs/models/qwen3_8b"


def steps_of(config):
    return [(step.stage, step.config) for step in experiment.steps(config)]


def chosen(devices, *overrides, mesh="mesh=auto"):
    """(the values of `auto`, the peaks), for Qwen3-8B."""
    config = config_lib.load(CONFIGS / "qwen3_8b_reasoning.yaml", [f"model.path={QWEN}", mesh, *overrides])
    found = auto._chosen(config, steps_of(config), devices, False)
    return found["values"], found["peak_gb"]


@pytest.mark.parametrize(("path", "words"), RUNS)
def test_estimates_are_what_was_compiled(path, words):
    """Peaks of every job's prefill and decoding, and of every train step, in the stored plans of the presets: from 5% less
    to 20% more. What does not fit there would not be chosen."""
    config, count, known = planned(words)
    pairs: dict[tuple, list] = {}
    for own in plan.arms_of(config).values():
        folder = resources.model(own.model.path)
        model = families.read_config(folder)
        train, sample = programs.abstract_meshes(own.mesh, count)
        jobs = {name: job for job in programs.jobs_of(own, model) for name in programs.names_of(job, sample)}
        for program in programs.programs_of(own, model, train, sample):
            job, row = jobs.get(program.name), known.pop(plan.key_of(folder, program), None)  # of the first arm
            if row and (job or program.name.startswith("train step")):
                need = layout.sampling_need(own, model, job, sample) if job else layout.training_need(own, model, train)
                pairs.setdefault((folder, job or program.name), []).append((need, row))
    for what, several in pairs.items():
        need, peak = several[0][0], max(row.peak_gb for _, row in several)
        assert 0.95 < need.peak / 1e9 / peak < 1.2, (what, need, peak)
        if not all(row.fits for _, row in several):
            assert need.peak > layout.HEADROOM * several[0][1].hbm_gb * 1e9
    assert any("train step" in str(what) for _, what in pairs) and len(pairs) >= 3


@pytest.mark.parametrize("devices", [V6E, V5E, dataclasses.replace(V6E, count=4)], ids=lambda d: f"{d.kind}, {d.count}")
def test_the_flagship_has_a_layout_on_every_slice(devices):
    values, peaks = chosen(devices, "generate.slots=auto", "evaluate.slots=auto")
    sample, train = values["mesh.sample"], values["mesh.train"]
    assert math.prod(sample.values()) == math.prod(train.values()) == devices.count
    assert sample["fsdp"] == 1 and 8 % sample["tensor"] == 0  # 8 key-value heads; nothing is gathered for a token
    assert train["tensor"] == 1
    assert all(values[key] % sample["data"] == 0 for key in ("generate.slots", "evaluate.slots"))
    assert values["generate.slots"] <= 669 / layout.PLENTY
    assert all(gb * 1e9 <= devices.limit for gb in peaks.values()) and set(peaks) == {"sampling", "training"}
    assert (values, peaks) == chosen(devices, "generate.slots=auto", "evaluate.slots=auto")
    if devices is V6E:  # the preset's layout, with more slots than it names
        assert (sample, values["evaluate.slots"]) == ({"data": 4, "fsdp": 1, "tensor": 4}, 512)


def test_what_is_named_stays_and_limits_the_choice():
    values, _ = chosen(V6E, "evaluate.slots=auto", mesh="mesh.train=auto")  # sampling is named: 4 x 1 x 4
    assert set(values) == {"mesh.train", "evaluate.slots"}
    longer = ("evaluate.budgets=[16384]", "evaluate.sampling.max_tokens=16384")
    fewer, _ = chosen(V6E, "evaluate.slots=auto", *longer, mesh="mesh.train=auto")
    assert fewer["evaluate.slots"] < values["evaluate.slots"]
    assert "evaluate.slots" not in chosen(V6E)[0]
    rows, _ = chosen(V6E, "train.batch_size=4")  # fewer rows than devices
    assert (rows["mesh.train"]["tensor"], rows["mesh.train"]["data"] * rows["mesh.train"]["fsdp"]) == (4, 4)
    slices, _ = chosen(dataclasses.replace(V6E, count=32, slices=2))
    assert all(slices[key]["data"] % 2 == 0 for key in ("mesh.sample", "mesh.train"))


@pytest.mark.parametrize(
    ("devices", "overrides", "message"),
    [
        (
            V5E,
            ["evaluate.sampling.max_tokens=16384", "evaluate.budgets=[16384]"],
            r"mesh.sample: nothing fits for sampling: evaluation with 256 slots on data \d .* lower evaluate.slots",
        ),
        (dataclasses.replace(V6E, count=1), [], r"mesh.sample: nothing fits .* take more devices"),
        (V6E, ["train.max_tokens=80000"], r"mesh.train: nothing fits for training: .* lower train.max_tokens"),
        (dataclasses.replace(V6E, count=24), [], r"mesh.train: got auto, and 24 devices do not divide"),
        (V6E, ["arms.dail={evaluate.slots: auto}"], r"evaluate.slots: got auto in an arm"),
    ],
)
def test_nothing_that_fits_is_one_line(devices, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        chosen(devices, *overrides)
    assert len(error.value.lines) == 1


def test_a_choice_is_kept_and_taken_again(tmp_path, capsys):
    changes = {"mesh": "auto", "generate__slots": "auto", "evaluate__slots": "auto"}
    config = config_lib.load(tiny.write(tmp_path / "run", **changes))
    first = auto.settled(config, steps_of(config), keep=True)
    assert auto.automatic(first) == [] and "auto, for 8 x cpu: " in capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / auto.FILE).read_text())
    assert kept["devices"] == 8 and kept["values"]["evaluate.slots"] == first.evaluate.slots
    other = {**kept, "values": {**kept["values"], "evaluate.slots": 5}}  # as if by another version of the arithmetic
    (tmp_path / "run" / auto.FILE).write_text(json.dumps(other))
    assert auto.settled(config, steps_of(config)).evaluate.slots == 5
    longer = config_lib.with_overrides(config, {"evaluate.sampling.max_tokens": 64}, "test")
    assert auto.settled(longer, steps_of(longer)).evaluate.slots == first.evaluate.slots
    session = open_session(config_lib.with_overrides(config, {"run_dir": str(tmp_path / "other")}, "test"))
    assert session.config.generate.slot_count % session.sample_mesh.shape["data"] == 0
    assert math.prod(session.mesh.shape.values()) == 8


def test_check_prints_the_choice_and_writes_nothing(tmp_path, capsys):
    path = tiny.write(tmp_path / "run", mesh="auto", generate__slots="auto", evaluate__slots="auto")
    assert tiny.run("check", path) == 0 and not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    assert "auto, for 8 x cpu: mesh.sample data" in out and "mesh data" in out
