"""plan: what a configuration takes on a slice that need not be present: memory, hours and chip-hours of every stage.

Programs are compiled ahead of time as `compile` does, each once, however many arms call it. `dail_jax.ahead.plan`
says how often each is called.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json as json_lib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.table import Table

from dail_jax import config as config_lib
from dail_jax import provenance, resources, rundir, strict_json
from dail_jax.ahead import chips, programs
from dail_jax.ahead import plan as plan_lib
from dail_jax.ahead.plan import Lengths
from dail_jax.ahead.programs import ProgramReport
from dail_jax.errors import UserError
from dail_jax.metrics import console, log
from dail_jax.model.families import read_config
from dail_jax.stages import auto, experiment
from dail_jax.stages.compile import LEGEND
from dail_jax.stages.compile import table as program_table


@dataclasses.dataclass(frozen=True)
class Line:
    """A part of a stage: hours by the compiler's model, if lengths are as expected and at worst; and as expected with
    decoding as fast as main memory allows."""

    arm: str
    stage: str
    part: str
    hours: float
    worst: float
    memory_bound: float


def run(
    config: config_lib.Config,
    topology: str = "cpu",
    json: str | None = None,
    short: bool = False,
    known: Sequence[str] = (),
    known_only: bool = False,
    at_limit: float = 0.1,
    prompt_tokens: int = 256,
) -> None:
    if not 0 < at_limit <= 1:
        raise UserError(f"got {at_limit}, want a share above 0, and at most 1", field="--at-limit")
    if config.model.dtype == "float32":  # as every stage does
        jax.config.update("jax_default_matmul_precision", "highest")
    devices = chips.devices(topology)
    config = auto.settled(config, [(step.stage, step.config) for step in experiment.steps(config)], devices)
    meshes = functools.partial(programs.meshes_of, devices=devices)
    found = reports_of(known, topology)
    rows: dict[tuple[str, str], ProgramReport] = {}
    for arm, own in arms_of(config).items():
        folder = resources.model(own.model.path)
        train, sample = meshes(own.mesh)
        model = read_config(folder)
        programs.check_pages(own, model, sample)
        for program in programs.programs_of(own, model, train, sample):
            key = key_of(folder, program)
            if program.kind != "loss" and key not in rows:  # the train step has it
                skipped = programs.skipped(program) if known_only else None
                row = rows[key] = found.get(key) or skipped or programs.measure(program, own, short=short)
                log(f"  {arm or 'run'}: {program.name}: {row.compile_seconds:.0f} s, {row.verdict}")
    console.print(program_table(list(rows.values())))
    log(LEGEND)
    lines = lines_of(config, meshes, rows, Lengths(at_limit), prompt_tokens)
    console.print(table(lines, len(devices)))
    worst = max((row for row in rows.values() if row.peak_gb), key=lambda row: row.peak_gb or 0, default=None)
    if worst is not None:
        log(f"memory: {worst.peak_gb:.1f} GB per device, for {worst.program}")
    for (model, _), row in rows.items():
        if row.fits is False or row.seconds is None:
            log(f"{model}, {row.program}: {row.verdict}")
    if json:
        rundir.write_atomic(Path(json), report(topology, devices, rows, found, lines, at_limit, prompt_tokens))


def arms_of(config: config_lib.Config) -> dict[str, config_lib.Config]:
    """By name, what is run; arms that train come first, since their evaluation has an adapter and the others may share
    its programs."""
    arms = {name: experiment.arm(config, name) for name in config.arms} or {"": config}
    return dict(sorted(arms.items(), key=lambda item: item[1].train.objective == "none"))


def key_of(folder: str, program: programs.Program) -> tuple[str, str]:
    """What two arms' programs have in common if they are one: the model, its meshes, and the name, which has all shapes."""
    shape = " x ".join(map(str, program.mesh.shape.values()))
    return Path(folder).name, f"{program.name} on {shape}"


def lines_of(
    config: config_lib.Config,
    meshes: Callable[[config_lib.Mesh], tuple[Mesh, Mesh]],
    rows: Mapping[tuple[str, str], ProgramReport],
    lengths: Lengths,
    prompt: int,
) -> list[Line]:
    """The hours of every part of every stage of every arm; nothing for parts that have a program without a time."""
    lines: list[Line] = []
    for step in experiment.steps(config):
        path = resources.model(step.config.model.path)
        folder, model_config = Path(path).name, read_config(path)
        train, sample = meshes(step.config.mesh)
        shapes_of = [" x ".join(map(str, mesh.shape.values())) for mesh in (train, sample)]
        own = {
            key.rpartition(" on ")[0]: row
            for (model, key), row in rows.items()
            if model == folder and key.rpartition(" on ")[2] in shapes_of
        }
        times = {name: row.seconds for name, row in own.items() if row.seconds}
        bound = {
            name: row.bandwidth_seconds if name.endswith("decode") and row.bandwidth_seconds else times[name]
            for name, row in own.items()
            if name in times
        }
        expected, worst = (
            plan_lib.calls_of(step.stage, step.config, model_config, sample, one, prompt)
            for one in (lengths, Lengths(1.0))
        )
        for part in dict.fromkeys(call.part for call in expected):
            of = lambda calls, part=part: [call for call in calls if call.part == part]  # noqa: E731
            if all(call.program in times for call in of(expected)):
                figures = [plan_lib.hours(of(c), t) for c, t in ((expected, times), (worst, times), (expected, bound))]
                lines.append(Line(step.arm, step.stage, part, *figures))
    return lines


def table(lines: Sequence[Line], chips_: int) -> Table:
    shown = Table("arm", "stage", "part", "hours", "at worst", "memory-bound", "chip-hours")
    for line in lines:
        figures = (line.hours, line.worst, line.memory_bound, line.hours * chips_)
        shown.add_row(line.arm, line.stage, line.part, *(f"{x:.2f}" for x in figures))
    total = [sum(getattr(line, name) for line in lines) for name in ("hours", "worst", "memory_bound")]
    shown.add_section()
    shown.add_row("", "all", "", *(f"{x:.1f}" for x in (*total, total[0] * chips_)))
    return shown


def report(topology: str, devices, rows, known, lines: Sequence[Line], at_limit: float, prompt: int) -> str:
    """The plan as a file, from which `--known` and the tests of the presets read; without programs that were known."""
    compilers = ("jax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin") if ":" in topology else ()
    versions = {name: found for name, found in provenance.versions(compilers).items() if found}
    tree = {
        "topology": topology,
        "chips": len(devices),
        "versions": versions,
        "at_limit": at_limit,
        "prompt_tokens": prompt,
        "occupancy": plan_lib.OCCUPANCY,
        "peak_gb": round(max((row.peak_gb or 0 for row in rows.values()), default=0), 2),
        "hours": round(sum(line.hours for line in lines), 2),
        "worst_hours": round(sum(line.worst for line in lines), 2),
        "memory_bound_hours": round(sum(line.memory_bound for line in lines), 2),
        "lines": [_rounded(dataclasses.asdict(line)) for line in lines],
        "programs": [
            {"model": model, "key": key, **_rounded(dataclasses.asdict(row))}
            for (model, key), row in rows.items()
            if (model, key) not in known
        ],
    }
    return json_lib.dumps(tree, indent=1) + "\n"


def _rounded(tree: dict) -> dict:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in tree.items()}


def reports_of(paths: Sequence[str], topology: str) -> dict[tuple[str, str], ProgramReport]:
    """The programs of earlier plans for this topology, from files and folders of them."""
    found = {}
    files = [sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)] for path in paths]
    for file in itertools.chain(*files):
        tree = strict_json.read_object(file)
        if tree["topology"] == topology:
            for one in tree["programs"]:
                fields = {name: one[name] for name in (field.name for field in dataclasses.fields(ProgramReport))}
                found[one["model"], one["key"]] = ProgramReport(**fields)
    return found
