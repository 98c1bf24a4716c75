"""Where a compiled program's time goes, instruction by instruction, by the compiler's own figures: for docs/performance.md.

    python benchmarks/cost.py configs/qwen3_8b_reasoning.yaml v6e:4x4 "evaluation, 256" model.path=configs/models/qwen3_8b

compiles every sampling program whose name contains the third argument for a slice that need not be present (`pip install
libtpu`), with 1 and with 3 layers, and extrapolates to the model's depth. With `layer` in its place it compiles one layer's
share of an update of one row on one device, without its attention kernels, since libtpu prints no train step. Loops are
multiplied out, of branches the dearest counts. For decoding, everything is one token's. An instruction takes the longest of

  products      the compiler's estimate of cycles, which includes fetching its operands
  vectors       two cycles for each register of 4 KB that it reads or writes (schedules that the compiler made of sums,
                exponentials and norms have 0.9 to 4)
  memory        bytes to and from main memory, at its bandwidth
  links         bytes received from other devices, at an eighth of that bandwidth, and a wait for each doubling of the
                devices (the assumptions of `mesh: auto`)

and at least what the compiler takes for an instruction that does next to nothing, some 2,100 cycles. Attention kernels are
added as `compile` does it. What is fetched ahead of its use counts as memory alone. So the time of all is their sum, or what
main memory takes for all bytes, whichever is longer.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import common  # noqa: F401  (JAX_PLATFORMS, before JAX is imported)
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import resources
from dail_jax.ahead import chips, compiled, layout, programs
from dail_jax.ahead.compiled import Op, Step
from dail_jax.model import lora as lora_lib
from dail_jax.model import transformer
from dail_jax.model.blocks import Bound, block
from dail_jax.model.families import ModelConfig, read_config

CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # peak FLOPs over what the units multiply in a cycle
REGISTER, CYCLES = 4096, 2
IDLE = 2200  # cycles of an instruction that does next to nothing, at most
EXCHANGES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SCAFFOLDING = r"jit\(\w+\)|while|body|cond|closed_call|branch_\d+_fun|shard_map|checkpoint|vmap\(.*\)|\w+_fn"


@dataclass(frozen=True)
class Cost:
    """Seconds of one kind of instruction, and how many there are; they add up over layers."""

    count: float = 0.0
    products: float = 0.0
    vectors: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    time: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(factor * x for x in dataclasses.astuple(self)))


def chip_of(device) -> chips.Chip:
    found = chips.chip(device)
    assert found is not None, device.device_kind
    return found


class Reader:
    """Costs of a program's instructions on one kind of chip."""

    def __init__(self, text: str, topology: str, device):
        self.computations, self.entry = compiled.computations_of(text)
        self.clock, self.chip = CLOCK[topology.split(":")[0]], chip_of(device)

    def cost(self, step: Step) -> Cost:
        """Of one run of an instruction."""
        op, found = step.op, re.search(r'"estimated_cycles":"(\d+)"', step.op.rest)
        estimate = int(found[1]) / self.clock if found else 0.0
        memory = step.moved / (self.chip.bandwidth * 1e9)
        if step.ahead:
            return Cost(1, memory=memory)
        if op.kind.startswith(EXCHANGES):
            links = self.exchange(op)
            return Cost(1, memory=memory, links=links, time=max(memory, links))
        if op.kind == "custom-call":  # kernels are added by arithmetic; the others name what needs no work
            return Cost(1, memory=memory, time=memory)
        products = estimate if self.multiplies(op) else 0.0
        vectors = 0.0 if products else CYCLES * step.touched / REGISTER / self.clock
        time = max(products, vectors, memory, min(estimate, IDLE / self.clock))
        return Cost(1, products, vectors, memory, 0.0, time)

    def exchange(self, op: Op) -> float:
        size, group = compiled.type_bytes(op.type, everywhere=True), self.group(op)
        share = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1.0}
        received = size * next((x for kind, x in share.items() if op.kind.startswith(kind)), (group - 1) / group)
        return received / (layout.LINKS * self.chip.bandwidth * 1e9) + layout.LATENCY * math.log2(group)

    def group(self, op: Op) -> int:
        """How many devices exchange something with each other."""
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", op.rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", op.rest):
            return int(found[1])
        found = re.search(r"replica_groups=\{\{([\d,]*)\}", op.rest)
        return found[1].count(",") + 1 if found else 2

    def multiplies(self, op: Op) -> bool:
        if op.kind in ("convolution", "dot"):
            return True
        inner = self.computations.get(op.called("calls") or "", []) if op.kind == "fusion" else []
        return any(map(self.multiplies, inner))

    def label(self, step: Step) -> str:
        op, found = step.op, re.search(r'op_name="([^"]*)"', step.op.rest)
        parts = found[1].split("/")[:-1] if found else []
        scopes = [part for part in parts if not re.fullmatch(SCAFFOLDING, part) and "->" not in part]
        kind = "fetched ahead" if step.ahead else "products" if self.multiplies(op) else "vectors"
        kind = "exchanged" if op.kind.startswith(EXCHANGES) else "copies" if op.kind in ("copy", "transpose") else kind
        return f"{'/'.join(scopes) or '-'}: {op.kind if op.kind == 'custom-call' else kind}"

    def table(self, tokens: int) -> dict[str, Cost]:
        out: dict[str, Cost] = collections.defaultdict(Cost)
        dear = lambda step: self.cost(step).time  # noqa: E731
        for step in compiled.steps_of(self.computations, self.entry, cost=dear):
            out[self.label(step)] += self.cost(step) * (step.times / tokens)
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
    if args.only == "layer":
        lowered, device = layer_update(config, model, devices[0]), devices[0]
        table, compiled_ = costs(lowered, args.topology, device)
        title = f"one layer of an update, {sum(programs.lengths(config)):,} tokens, train.remat: {config.train.remat}"
        flops = compiled.figures_of(compiled_).flops / (chip_of(device).peak * 1e12)
        show(title, table, args.rows)
        return print(f"FLOPs at the peak {1e3 * flops:.2f} ms")
    for program in programs.programs_of(config, model, *programs.meshes_of(config.mesh, devices)):
        if args.only in program.name and program.unrolled:
            rows, device = whole(program, args), program.mesh.devices.flat[0]
            total = sum(rows.values(), start=Cost())
            kernels = program.kernels / (chip_of(device).peak * 1e12 * programs.KERNEL_EFFICIENCY)
            show(program.name, rows, args.rows)
            print(
                f"{1e3 * (max(total.time, total.memory) + kernels):.2f} ms, of which attention kernels {1e3 * kernels:.2f}"
            )


def costs(lowered: jax.stages.Lowered, topology: str, device, tokens: int = 1) -> tuple[dict[str, Cost], Any]:
    done = lowered.compile()
    text = compiled.hlo_text(done)
    assert text is not None, "libtpu does not print this program"
    return Reader(text, topology, device).table(max(tokens, 1)), done


def whole(program: programs.Program, args) -> dict[str, Cost]:
    """From 1 and 3 layers."""
    tables = []
    for count in (1, 3):
        short = dataclasses.replace(program.model, layers=program.model.layers[:1] * count)
        device = program.mesh.devices.flat[0]
        tables.append(costs(program.lower(short), args.topology, device, program.tokens)[0])
    one, three = tables
    names = [name for name in {**one, **three} if not args.without or args.without not in name]
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
