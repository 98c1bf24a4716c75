"""How long a compiled program takes, instruction by instruction, with loops multiplied out.

The compiler's own sum, `optimal_seconds`, counts fast memory as if it were main memory, and a loop's body once; for GPUs there
is none. Here an instruction of a TPU takes the longest of

  products   the compiler's estimate of cycles, which includes fetching the operands
  vectors    two cycles for each register of 4 KB that it reads or writes (schedules that the compiler made of sums,
             exponentials and norms have 0.9 to 4)
  memory     bytes to and from main memory, at its bandwidth
  links      bytes received from other devices, at an eighth of that bandwidth, and a wait for each doubling of the
             devices (the assumptions of `mesh: auto`)

and at least what the compiler takes for an instruction that does next to nothing, some 2,100 cycles. What is fetched ahead
of its use counts as memory alone. On a GPU, whose compiler estimates nothing that could be read, products are FLOPs at the
peak, and each instruction is a kernel, whose start is added: a bound that no program reaches. Attention kernels hide what
they do and take no time here: `programs` adds them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Self

from dail_jax.ahead import hlo
from dail_jax.ahead.chips import LATENCY, LINKS, Chip
from dail_jax.ahead.hlo import Op, Step

REGISTER, CYCLES = 4096, 2
START = 2e-6  # seconds between the kernels of a GPU, about, where one follows another
IDLE = 2200  # cycles of an instruction that does next to nothing, at most
EXCHANGES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclass(frozen=True)
class Additive:
    """Figures that add up, field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Self:
        return type(self)(*(factor * x for x in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Cost(Additive):
    """Seconds of instructions, and how many there are; they add up."""

    count: float = 0.0
    products: float = 0.0
    vectors: float = 0.0
    memory: float = 0.0
    links: float = 0.0
    time: float = 0.0


class Reader:
    """Costs of a program's instructions on a kind of chip."""

    def __init__(self, text: str, chip: Chip):
        self.computations, self.entry = hlo.computations_of(text)
        self.chip = chip

    def steps(self) -> list[tuple[Step, Cost]]:
        """Every instruction, with what all its runs cost; of branches, the one that takes longest."""
        steps = hlo.steps_of(self.computations, self.entry, cost=lambda step: self.cost(step).time)
        return [(step, self.cost(step) * step.times) for step in steps]

    def cost(self, step: Step) -> Cost:
        """Of one run of an instruction."""
        memory = step.moved / (self.chip.bandwidth * 1e9)
        if step.ahead:
            return Cost(1, memory=memory)
        if step.op.kind.startswith(EXCHANGES):
            links = self.exchange(step.op)
            return Cost(1, memory=memory, links=links, time=max(memory, links))
        return self.kernel(step, memory) if self.chip.clock is None else self.instruction(step, memory, self.chip.clock)

    def kernel(self, step: Step, memory: float) -> Cost:
        """Of a GPU."""
        products = step.flops / (self.chip.peak * 1e12)
        return Cost(1, products, memory=memory, time=max(products, memory) + START)

    def instruction(self, step: Step, memory: float, clock: float) -> Cost:
        """Of a TPU with so many GHz."""
        op, cycle = step.op, 1e-9 / clock
        if op.kind == "custom-call":  # a kernel, or the name of something that needs no work
            return Cost(1, memory=memory, time=memory)
        found = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        estimate = int(found[1]) * cycle if found else 0.0
        products = estimate if self.multiplies(op) else 0.0
        vectors = 0.0 if products else CYCLES * step.touched / REGISTER * cycle
        time = max(products, vectors, memory, min(estimate, IDLE * cycle))
        return Cost(1, products, vectors, memory, 0.0, time)

    def exchange(self, op: Op) -> float:
        size, group = hlo.type_bytes(hlo.results_of(op), everywhere=True), _group(op)
        share = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1.0}
        received = size * next((x for kind, x in share.items() if op.kind.startswith(kind)), (group - 1) / group)
        return received / (LINKS * self.chip.bandwidth * 1e9) + LATENCY * math.log2(group)

    def multiplies(self, op: Op) -> bool:
        """Whether an instruction is a product of matrices, or a fusion that has one."""
        if op.kind in ("convolution", "dot"):
            return True
        inner = self.computations.get(op.called("calls") or "", []) if op.kind == "fusion" else []
        return any(map(self.multiplies, inner))


def _group(op: Op) -> int:
    """How many devices exchange something with each other."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", op.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", op.rest):
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", op.rest)
    return found[1].count(",") + 1 if found else 2
