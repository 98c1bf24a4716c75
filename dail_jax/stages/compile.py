"""compile: compiles the real programs ahead of time, for devices that need not be present -> a table. Needs no weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
from rich.table import Table

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import rundir
from dail_jax.ahead import chips, programs
from dail_jax.metrics import console, log
from dail_jax.model.families import read_config


def run(
    config: config_lib.Config, topology: str = "cpu", out: str | None = None, quick: bool = False, only: str = ""
) -> None:
    if config.model.dtype == "float32":  # as every stage does
        jax.config.update("jax_default_matmul_precision", "highest")
    model = read_config(config.model.path)
    devices = chips.devices(topology)
    mesh = mesh_lib.make_mesh(config.mesh, devices)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    log(f"compile: {config.model.path} for {len(devices)} {devices[0].device_kind} ({topology}), mesh {shape}")
    rows = []
    for row in programs.compile_all(config, model, mesh, quick, only):
        log(f"  {row.program}: {row.compile_seconds:.0f} s, {row.verdict}")
        rows.append(row)
    console.print(table(rows))
    kernels = f"{programs.KERNEL_EFFICIENCY:.0%}"
    log(
        "GB per device; sampling's peak includes the weights that training holds. FLOPs, bytes and time are per update, "
        "or per token for decoding. Time: the compiler's model, plus "
        f"attention kernels at {kernels} of the peak. Utilisation: useful FLOPs, by arithmetic, in that time; of "
        "decoding, bytes moved over bytes that must be read."
    )
    if out:
        common = {"topology": topology, "model": config.model.path, "mesh": dict(mesh.shape)}
        lines = [json.dumps({**common, **dataclasses.asdict(row)}) + "\n" for row in rows]
        rundir.write_atomic(Path(out), "".join(lines))


def table(rows: list[programs.ProgramReport]) -> Table:
    heads = (
        "program",
        "compile",
        "arguments",
        "temporaries",
        "peak / HBM",
        "TFLOP",
        "GB moved",
        "time",
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
            number(row.seconds and row.seconds * 1e3, ".3g", " ms"),
            used,
            row.verdict,
        )
    return shown
