"""What a compiled program takes: memory and FLOPs by the compiler, bytes and time from its text where there is one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from dail_jax.ahead.chips import Chip
from dail_jax.ahead.hlo import hbm_bytes
from dail_jax.ahead.timing import Additive, Reader


@dataclass(frozen=True)
class Figures(Additive):
    """What one run takes on one device; they add up over layers.

    Attributes:
      flops: the compiler's. `kernels` are FLOPs that it does not see.
      modelled: seconds by the compiler's model, which takes fast memory for main memory.
      seconds: the same by instructions (`timing`); NaN where these cannot be read.
      arguments, temporaries, fresh, aliased: memory in bytes; `fresh` are results that reuse no argument.
      moved: bytes to and from main memory; NaN where the program's text is not to be had.
    """

    flops: float = 0.0
    modelled: float = 0.0
    seconds: float = 0.0
    kernels: float = 0.0
    arguments: float = 0.0
    temporaries: float = 0.0
    fresh: float = 0.0
    aliased: float = 0.0
    moved: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes of memory."""
        return self.arguments + self.temporaries + max(self.fresh, 0.0)


def figures_of(compiled: jax.stages.Compiled, chip: Chip | None = None) -> Figures:
    """What the compiler and the program's text say; its time by instructions for a chip that is known.

    An operation that the compiler's model cannot time is -1 s there, so whole negative seconds are left out. For GPUs that
    are not there the compiler has no model, and FLOPs are those of the text as well.
    """
    found: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    cost, text = found or {}, hlo_text(compiled)
    modelled, flops = cost.get("optimal_seconds", 0.0), cost.get("flops", 0.0)
    seconds = moved = math.nan
    if text is not None and chip is not None:
        steps = Reader(text, chip).steps()
        seconds = math.fsum(cost.time for _, cost in steps)
        moved = math.fsum(step.times * step.moved for step, _ in steps)
        flops = flops if found else math.fsum(step.times * step.flops for step, _ in steps)
    elif text is not None:
        moved = hbm_bytes(text)
    return Figures(
        flops=flops,
        modelled=modelled - min(math.floor(modelled), 0),
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        fresh=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        moved=moved,
    )


def hlo_text(compiled: jax.stages.Compiled) -> str | None:
    """The program's text; None where libtpu cannot print what it compiled (0.0.51: what exchanges while it
    computes, as training under `fsdp` and long prefills do)."""
    try:
        return compiled.as_text() or None
    except jax.errors.JaxRuntimeError:
        return None


def copies_of(text: str, parts: Sequence[tuple[int, ...]]) -> int:
    """How many operations of a program copy an array of one of these shapes, a device's part."""
    shapes = {",".join(map(str, part)) for part in parts}
    return sum(len(re.findall(rf"= \w+\[{shape}\]\S* (?:copy|transpose)\(", text)) for shape in shapes)
