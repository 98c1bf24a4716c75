"""compile: compiles the real programs ahead of time, for devices that need not be present -> a table. Needs no weights."""

from __future__ import annotations

import dataclasses
import json as json_lib
from pathlib import Path

import jax
from rich.table import Table

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import resources, rundir
from dail_jax.ahead import chips, programs
from dail_jax.metrics import console, log
from dail_jax.model.families import read_config
from dail_jax.stages import auto


def run(
    config: config_lib.Config,
    topology: str = "cpu",
    json: str | None = None,
    quick: bool = False,
    only: str = "",
    short: bool = False,
) -> None:
    if config.model.dtype == "float32":  # as every stage does
        jax.config.update("jax_default_matmul_precision", "highest")
    folder = resources.model(config.model.path)
    model = read_config(folder)
    devices = chips.devices(topology)
    config = auto.settled(config, auto.stages_of(config), devices)
    train, sample = programs.meshes_of(config.mesh, devices)
    programs.check_pages(config, model, sample)
    shape = mesh_lib.described(train, sample)
    log(f"compile: {folder} for {len(devices)} {devices[0].device_kind} ({topology}), mesh {shape}")
    rows = []
    for row in programs.compile_all(config, model, train, sample, quick, only, short):
        log(f"  {row.program}: {row.compile_seconds:.0f} s, {row.verdict}")
        rows.append(row)
    console.print(table(rows))
    log(LEGEND)
    if json:
        common = {"topology": topology, "model": folder, "mesh": shape}
        lines = [json_lib.dumps({**common, **dataclasses.asdict(row)}) + "\n" for row in rows]
        rundir.write_atomic(Path(json), "".join(lines))


MARKS = {"compiler": "~", "bound": "> "}  # before a time
LEGEND = (
    "GB per device. FLOPs, bytes and times are per call, or per token for decoding. The first time is that of the "
    "instructions, or with ~ that of the compiler's model, where they cannot be read, or with > what a GPU takes at least; "
    "plus attention kernels at "
    f"{programs.KERNEL_EFFICIENCY:.0%} of the peak. The second is what main memory alone takes for the bytes moved. "
    "Utilisation: useful FLOPs, by arithmetic, in the first; of decoding, bytes moved over bytes that must be read."
)


def table(rows: list[programs.ProgramReport]) -> Table:
    heads = (
        "program",
        "compile",
        "arguments",
        "temporaries",
        "peak / HBM",
        "TFLOP",
        "GB moved",
        "time; memory's",
        "utilisation",
        "verdict",
    )
    shown = Table(*heads)
    for row in rows:
        number = lambda x, form, unit="": "" if x is None else f"{x:{form}}{unit}"  # noqa: E731
        used = f"{row.bytes_over_ideal:.2f} x bytes" if row.bytes_over_ideal else number(row.utilisation, ".2f")
        if row.cache_copies is not None:
            used += f"{', ' if used else ''}{row.cache_copies} cache copies"
        memory = f"{number(row.peak_gb, '.2f')} / {number(row.hbm_gb, '.0f') or '?'}"
        shown.add_row(
            row.program,
            f"{row.compile_seconds:.0f} s",
            number(row.arguments_gb, ".2f"),
            number(row.temporaries_gb, ".3f"),
            memory,
            number(row.flops and row.flops / 1e12, ".3g"),
            number(row.bytes and row.bytes / 1e9, ".3g"),
            MARKS.get(row.timed or "", "")
            + "; ".join(f"{x * 1e3:.3g} ms" for x in (row.seconds, row.bandwidth_seconds) if x),
            used,
            row.verdict,
        )
    return shown
