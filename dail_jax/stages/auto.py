"""`auto`: meshes and slots that are chosen when a command starts, by `dail_jax.ahead.layout`, for all of its stages at once.

What was chosen is printed, and kept in RUN_DIR/layout.json: a run that resumes on as many devices of the same kind takes
the same again. No result depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import resources, shapes, strict_json
from dail_jax.ahead import layout, plan, programs
from dail_jax.ahead.layout import Devices, Task
from dail_jax.errors import UserError, writing
from dail_jax.metrics import log
from dail_jax.model.families import read_config
from dail_jax.rundir import write_atomic
from dail_jax.train import methods

FILE = "layout.json"  # in the run directory
SLOTS = ("generate.slots", "train.online.slots", "evaluate.slots")
STAGES = ("generate", "train", "evaluate")


class Chosen(shapes.Shape):
    """What layout.json holds: the choice, the devices that it was made for, and a digest of all that decided it."""

    device_kind: str
    devices: int
    of: str
    values: dict[str, Any]
    peak_gb: dict[str, float] = Field(default_factory=dict)


def automatic(config: config_lib.Config) -> list[str]:
    """The keys whose value is `auto`."""
    slots = zip(SLOTS, (config.generate, config.train.online, config.evaluate), strict=True)
    meshes = (("mesh.sample", config.mesh.sample), ("mesh.train", config.mesh.train))
    return [key for key, value in meshes if value == "auto"] + [key for key, own in slots if own.slots == "auto"]


def stages_of(config: config_lib.Config) -> list[tuple[str, config_lib.Config]]:
    """All that a configuration may do, as `settled` wants it."""
    return [(stage, config) for stage in STAGES]


def settled(
    config: config_lib.Config,
    steps: Iterable[tuple[str, config_lib.Config]],
    devices: Sequence[Any] | None = None,
    keep: bool = False,
) -> config_lib.Config:
    """The configuration with a value wherever it says `auto`, for stages with the configurations that they run with.

    `devices`: of a topology that need not be present; by default those that are. `keep` writes the choice into the run
    directory. Raises UserError if nothing fits.
    """
    keys = automatic(config)
    steps = list(steps)
    if not keys and not any(automatic(one) for _, one in steps):
        return config
    found = layout.devices_of(mesh_lib.all_devices() if devices is None else devices)
    chosen = Chosen.model_validate(mesh_lib.from_first(lambda: _chosen(config, steps, found, devices is None)))
    values = {key: chosen.values[key] for key in keys if key in chosen.values}
    log("; ".join([f"auto, for {found.count} x {found.kind}: {_words(values)}", *_peaks(chosen, found)]))
    if keep:
        mesh_lib.from_first(lambda: _write(Path(config.run_dir), chosen))
    return config_lib.with_overrides(config, values, "auto")


def _chosen(config: config_lib.Config, steps: list[tuple[str, config_lib.Config]], devices: Devices, here: bool):
    """The fields of `Chosen`: as the run directory has them if nothing has changed, otherwise anew."""
    strange = {key for _, one in steps for key in automatic(one)} - set(automatic(config))
    if strange:
        raise UserError("got auto in an arm, want it for all of them, outside of `arms`", field=sorted(strange)[0])
    tasks = [_task(stage, one) for stage, one in steps]
    work = _work(steps)
    of = hashlib.sha256(repr((config.mesh, tasks, work, devices)).encode()).hexdigest()
    before = _read(Path(config.run_dir)) if here else None
    if before is not None and (before.device_kind, before.devices, before.of) == (devices.kind, devices.count, of):
        return before.model_dump()
    choice = layout.choose(config.mesh, tasks, devices, work)
    peaks = {phase: round(peak / 1e9, 2) for phase, peak in choice.peaks.items()}
    return {
        "device_kind": devices.kind,
        "devices": devices.count,
        "of": of,
        "values": dict(choice.values),
        "peak_gb": peaks,
    }


def _task(stage: str, config: config_lib.Config) -> Task:
    keys = automatic(config)
    own = config_lib.with_overrides(config, dict.fromkeys((key for key in keys if key in SLOTS), 1), "auto")
    model = read_config(resources.model(config.model.path))
    jobs = [job for job in programs.jobs_of(own, model) if job.stage == stage and _draws_here(job.stage, own)]
    trains = stage == "train" and methods.of(own).trains
    return Task(own, model, tuple(jobs), trains, frozenset(keys))


def _draws_here(stage: str, config: config_lib.Config) -> bool:
    """Whether the stage's samples are drawn by our engine."""
    section = {"generate": config.generate, "evaluate": config.evaluate}.get(stage)
    return section is None or section.sampler == "engine"


def _work(steps: Iterable[tuple[str, config_lib.Config]]) -> dict[str, float]:
    """Samples by key of slots, as many as the largest of the stages draws; none where rows cannot be counted."""
    found: dict[str, float] = {}
    for stage, config in steps:
        online = config.train.online
        count: float | None = None
        try:
            if stage == "generate" and config.generate.slots == "auto":
                count = plan.rows_in(config.data, "data") * config.generate.samples
            elif stage == "evaluate" and config.evaluate.slots == "auto":
                fields = [(one.rows, f"evaluate.benchmarks.{one.name}.rows") for one in config.evaluate.benchmarks]
                count = sum(plan.rows_in(*one) for one in fields) * config.evaluate.samples
        except UserError:  # which the stage itself raises where it matters
            count = None
        if stage == "train" and online.slots == "auto" and methods.of(config).source == "samples":
            count = online.problems * online.group
        if count:
            key = f"{'train.online' if stage == 'train' else stage}.slots"
            found[key] = max(found.get(key, 0), count)
    return found


def _words(values: dict[str, Any]) -> str:
    """The choice in words."""
    return ", ".join(
        f"{key} {' x '.join(f'{axis} {size}' for axis, size in value.items())}"
        if isinstance(value, dict)
        else f"{key} {value}"
        for key, value in values.items()
    )


def _peaks(chosen: Chosen, devices: Devices) -> list[str]:
    shown = ", ".join(f"{gb:.1f} GB while {phase}" for phase, gb in chosen.peak_gb.items())
    of = f" of {devices.memory / 1e9:.0f} GB" if devices.memory < float("inf") else ""
    return [f"per device about {shown}{of}"] if shown else []


def _read(folder: Path) -> Chosen | None:
    """An earlier choice; None where there is none, or none that can be read."""
    try:
        return shapes.parse(strict_json.read_object(folder / FILE, own=True), Chosen, folder / FILE)
    except (UserError, OSError):
        return None


def _write(folder: Path, chosen: Chosen) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, chosen.model_dump_json(indent=1) + "\n")
