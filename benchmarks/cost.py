"""Where a compiled program's time goes, instruction by instruction, by the compiler's own figures: for docs/performance.md.

    python benchmarks/cost.py configs/qwen3_8b_reasoning.yaml v6e:4x4 "evaluation, 256" model.path=configs/models/qwen3_8b

compiles every sampling program whose name contains the third argument for a slice that need not be present (`pip install
libtpu`), with 1 and with 3 layers, and extrapolates to the model's depth. With `layer` in its place it compiles one layer's
share of an update of one row on one device, without its attention kernels, since libtpu prints no train step. Loops are
multiplied out, of branches the dearest counts. For decoding, everything is one token's. What an instruction takes is in
`dail_jax/ahead/timing.py`, as for `compile`, which also adds attention kernels; the time of all is their sum, or what main
memory takes for all bytes, whichever is longer.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import re

import common  # noqa: F401  (JAX_PLATFORMS, before JAX is imported)
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import resources
from dail_jax.ahead import chips, compiled, programs
from dail_jax.ahead.hlo import Step
from dail_jax.ahead.timing import EXCHANGES, Cost, Reader
from dail_jax.model import lora as lora_lib
from dail_jax.model import transformer
from dail_jax.model.blocks import Bound, block
from dail_jax.model.families import ModelConfig, read_config

SCAFFOLDING = r"jit\(\w+\)|while|body|cond|closed_call|branch_\d+_fun|shard_map|checkpoint|vmap\(.*\)|\w+_fn"


def label(step: Step, multiplies: bool) -> str:
    """An instruction's scope in our source, and its kind."""
    op, found = step.op, re.search(r'op_name="([^"]*)"', step.op.rest)
    parts = found[1].split("/")[:-1] if found else []
    scopes = [part for part in parts if not re.fullmatch(SCAFFOLDING, part) and "->" not in part]
    kind = "fetched ahead" if step.ahead else "products" if multiplies else "vectors"
    kind = "exchanged" if op.kind.startswith(EXCHANGES) else "copies" if op.kind in ("copy", "transpose") else kind
    return f"{'/'.join(scopes) or '-'}: {op.kind if op.kind == 'custom-call' else kind}"


def costs(compiled_: jax.stages.Compiled, chip: chips.Chip, tokens: int = 1) -> dict[str, Cost]:
    """By label, what a run takes, or one of its tokens."""
    text = compiled.hlo_text(compiled_)
    assert text is not None, "libtpu does not print this program"
    reader, out = Reader(text, chip), collections.defaultdict(Cost)
    for step, cost in reader.steps():
        out[label(step, reader.multiplies(step.op))] += cost * (1 / max(tokens, 1))
    return out


def layer_update(config: config_lib.Config, model: ModelConfig, device) -> jax.stages.Lowered:
    """One layer's share of an update on one device: its forward pass, what is recomputed of it, and its gradient."""
    cfg, layer = config.train, model.layers[0]
    short = dataclasses.replace(model, layers=(layer,))
    mesh = mesh_lib.make_mesh(config_lib.Axes(data=1), [device])
    tokens, where = sum(programs.lengths(config)), mesh_lib.replicated(mesh)

    def array(x, start: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[start:], x.dtype, sharding=where)

    adapter, weights = lora_lib.abstract(short, cfg.lora, mesh), programs.base(config, short, mesh)["layers"]
    positions = array(jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    x = array(jax.ShapeDtypeStruct((1, tokens, model.D), jnp.dtype(config.model.dtype)))

    def see(q, k, v):  # in the place of a kernel, which hides what it does
        return q * jnp.repeat(k + v, model.N // model.K, axis=2), None

    def update(x, tree, weights, positions, gradient):
        angles = transformer._angles(positions, short)[layer.rope]

        def step(layer, x, tree):
            return block(x, Bound(short, weights, (tree, adapter.scale), angles), layer.mixer, layer.mlp, see)[0]

        y, pull_back = jax.vjp(functools.partial(transformer._remat(step, cfg.remat, True), layer), x, tree)
        y, gradient = jax.lax.optimization_barrier((y, gradient))
        return y, pull_back(gradient)

    tree, weights = (jax.tree.map(functools.partial(array, start=1), part) for part in (adapter.tree, weights))
    return programs.lower(mesh, jax.jit(update), x, tree, weights, positions, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", "topology", "only"):
        parser.add_argument(name)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--without", help="a scope that is left out, such as a branch that is not taken")
    parser.add_argument("--rows", type=int, default=30, help="of each table, those that take longest")
    args = parser.parse_args()
    config = config_lib.load(args.config, args.overrides)
    model, devices = read_config(resources.model(config.model.path)), chips.devices(args.topology)
    chip = chips.chip(devices[0])
    assert chip is not None, devices[0].device_kind
    if args.only == "layer":
        done = layer_update(config, model, devices[0]).compile()
        title = f"one layer of an update, {sum(programs.lengths(config)):,} tokens, train.remat: {config.train.remat}"
        flops = compiled.figures_of(done).flops / (chip.peak * 1e12)
        show(title, costs(done, chip), args.rows)
        return print(f"FLOPs at the peak {1e3 * flops:.2f} ms")
    for program in programs.programs_of(config, model, *programs.meshes_of(config.mesh, devices)):
        if args.only in program.name and program.unrolled:
            rows = whole(program, chip, args.without)
            total = sum(rows.values(), start=Cost())
            kernels = program.kernels / (chip.peak * 1e12 * programs.KERNEL_EFFICIENCY)
            show(program.name, rows, args.rows)
            seconds = max(total.time + kernels, total.memory)
            print(f"{1e3 * seconds:.2f} ms, of which attention kernels {1e3 * kernels:.2f}")


def whole(program: programs.Program, chip: chips.Chip, without: str | None) -> dict[str, Cost]:
    """From 1 and 3 layers."""
    tables = []
    for count in (1, 3):
        short = dataclasses.replace(program.model, layers=program.model.layers[:1] * count)
        tables.append(costs(program.lower(short).compile(), chip, program.tokens))
    one, three = tables
    names = [name for name in {**one, **three} if not without or without not in name]
    return {name: one[name] + (three[name] + one[name] * -1) * ((program.model.L - 1) / 2) for name in names}


def show(title: str, rows: dict[str, Cost], most: int) -> None:
    total = sum(rows.values(), start=Cost())
    shown = Table("ms", "instructions", "products", "vectors", "memory", "links", "time", title=title)
    for name, cost in sorted(rows.items(), key=lambda item: -max(item[1].time, item[1].memory))[:most]:
        shown.add_row(name, *_cells(cost))
    shown.add_row("all", *_cells(total))
    Console(width=180).print(shown)


def _cells(cost: Cost) -> list[str]:
    count, *seconds = dataclasses.astuple(cost)
    return [f"{count:.0f}", *(f"{1e3 * x:.3f}" for x in seconds)]


if __name__ == "__main__":
    main()
