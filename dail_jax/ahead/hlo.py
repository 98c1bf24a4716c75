"""A compiled program's text: its instructions, with loops multiplied out, and the bytes that each moves.

The compiler's own "bytes accessed" counts a loop's body once, and on a TPU also what stays in fast memory (`S(1)` in
a layout). Here only main memory counts: what instructions read and write, of slices and gathers only the slice, of updates
in place only the update. What a kernel fetches of an array that it is given whole is not in the text: KERNELS count as
nothing here, and `programs` adds what they fetch.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
KERNELS = ("ragged_paged_attention", "write_pages")  # fetch what they need of an operand themselves: a TPU's, by name
TRITON = 'custom_call_target="__gpu$xla.gpu.triton"'  # and a GPU's, by what calls them
AHEAD = {"copy-start", "slice-start"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update that is written in place
SLICING = {"dynamic-slice", "slice", "gather"}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Op:
    name: str
    type: str
    kind: str
    rest: str  # from the operands on
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


def type_bytes(type_text: str, everywhere: bool = False) -> int:
    """Bytes of a type's arrays that lie in main memory, or of all."""
    return sum(
        WIDTHS[kind] * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape, layout in _ARRAY.findall(type_text)
        if kind in WIDTHS and (everywhere or "S(" not in layout)
    )


def results_of(op: Op) -> str:
    """The type of what an instruction makes; where an exchange starts, its type lists its operands first."""
    if not op.kind.endswith("-start") or op.kind == "all-reduce-start":
        return op.type
    arrays = [found[0] for found in _ARRAY.finditer(op.type)]
    return ", ".join(arrays[len(arrays) // 2 :])


def computations_of(text: str) -> tuple[dict[str, list[Op]], str]:
    """The computations of a program by name, and the entry's name."""
    found: dict[str, list[Op]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head[2]
            found[current] = []
            entry = current if head[1] else entry
        elif current and (op := _LINE.match(line)):
            found[current].append(Op(op[2], op[3], op[4], op[5], bool(op[1])))
    return found, entry


@dataclass(frozen=True)
class Step:
    """An instruction of one run.

    Attributes:
      times: how often it runs.
      moved: bytes to and from main memory each time.
      touched: the same, fast memory included.
      flops: of its products of matrices, where they are written as `dot`s, which they are not on a TPU.
      ahead: whether it copies what a later instruction reads from fast memory, while others run.
    """

    op: Op
    times: int
    moved: float
    touched: float
    flops: float
    ahead: bool


def hbm_bytes(text: str) -> float:
    """Bytes that one run of the program moves to and from main memory, on one device."""
    computations, entry = computations_of(text)
    return math.fsum(step.times * step.moved for step in steps_of(computations, entry))


def steps_of(
    computations: dict[str, list[Op]],
    name: str,
    times: int = 1,
    cost: Callable[[Step], float] = lambda step: step.moved,
) -> list[Step]:
    """What one run of a computation does on one device, loops multiplied out; of branches, the one with the highest cost."""
    types = {op.name: op.type for op in computations[name]}
    steps = functools.partial(steps_of, computations, cost=cost)
    out: list[Step] = []
    for op in computations[name]:
        if op.kind in FREE or op.kind.endswith("-done"):
            continue
        if op.kind == "while":
            out += steps(op.called("body") or "", times * _trips(computations, op))
        elif op.kind == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
            branches = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
            taken = [steps(branch, times) for branch in branches]
            out += max(taken, key=lambda branch: sum(x.times * cost(x) for x in branch), default=[])
        elif op.kind in ("call", "async-start"):
            out += steps(op.called("to_apply") or op.called("calls") or "", times)
        else:
            moved, touched = (_bytes(computations, op, types, everywhere) for everywhere in (False, True))
            out.append(Step(op, times, moved, touched, _flops(computations, op, types), op.kind in AHEAD))
    return out


def _bytes(computations: dict[str, list[Op]], op: Op, types: dict[str, str], everywhere: bool) -> float:
    """What one instruction reads and writes."""
    if op.name.startswith(KERNELS) or TRITON in op.rest:
        return 0.0
    if op.kind in AHEAD:
        # Of a copy the target comes first, of a slice after the operands.
        results = op.type.split("), ", 1)[1] if op.kind == "slice-start" else op.type
        target = (_ARRAY.search(results) or [""])[0]
        read = type_bytes(target, everywhere=True) if type_bytes(types.get(op.operands[0], ""), everywhere) else 0
        return type_bytes(target, everywhere) + read
    if op.kind in UPDATES:
        return 2 * type_bytes(types.get(op.operands[UPDATES[op.kind]], ""), everywhere)
    if op.kind in SLICING:
        return 2 * type_bytes(op.type, everywhere)
    if op.kind == "fusion":
        return _fusion(computations, op, types, everywhere)
    operands = dict.fromkeys(op.operands)
    return type_bytes(results_of(op), everywhere) + sum(type_bytes(types.get(x, ""), everywhere) for x in operands)


def _flops(computations: dict[str, list[Op]], op: Op, types: dict[str, str]) -> float:
    """Of the products in an instruction, or in what it fuses."""
    if op.kind == "fusion":
        inner = computations.get(op.called("calls") or "", [])
        local = {x.name: x.type for x in inner}
        return sum(_flops(computations, x, local) for x in inner)
    found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d",]*)', op.rest)  # of a dot; of a call of cuBLAS
    if not found:
        return 0.0
    left, result = (_shape(types.get(op.operands[0], "")), _shape(op.type))
    return 2.0 * math.prod(result) * math.prod(left[int(d)] for d in re.findall(r"\d+", found[1]))


def _shape(type_text: str) -> list[int]:
    """Of a type's first array."""
    found = _ARRAY.search(type_text)
    return [int(n) for n in found[2].split(",") if n] if found else []


def _fusion(computations: dict[str, list[Op]], op: Op, types: dict[str, str], everywhere: bool) -> float:
    """What a fusion reads and writes: slices of what it slices, and of what it updates in place the update."""
    inner = computations.get(op.called("calls") or "", [])
    local = {x.name: x.type for x in inner}
    read = 0
    for index, operand in enumerate(op.operands):
        if whole := type_bytes(types.get(operand, ""), everywhere):
            read += _used(computations, inner, _parameter(inner, index), whole)
    written = type_bytes(op.type, everywhere)
    for x in inner:
        in_place = x.kind in UPDATES and type_bytes(x.type, True) == type_bytes(op.type, True)
        if in_place and written:
            written = type_bytes(local.get(x.operands[UPDATES[x.kind]], ""), everywhere=True)
    return read + written


def _parameter(inner: list[Op], index: int) -> str | None:
    return next((x.name for x in inner if x.kind == "parameter" and x.rest.startswith(f"{index})")), None)


def _used(computations: dict[str, list[Op]], inner: list[Op], name: str | None, whole: int) -> int:
    """How many bytes of an input of a fused computation are looked at: slices of it, nothing where it is updated."""
    users = [x for x in inner if name in x.operands]
    total = 0 if users else whole
    for x in users:
        nested = computations.get(x.called("calls") or "", []) if x.kind == "fusion" else []
        if x.kind == "bitcast" or (nested and all(y.kind in ("parameter", "bitcast") for y in nested)):
            total += _used(computations, inner, x.name, whole)
        elif nested:
            total += _used(computations, nested, _parameter(nested, x.operands.index(name or "")), whole)
        elif x.kind in SLICING and x.operands[0] == name:
            total += type_bytes(x.type, everywhere=True)
        elif x.kind not in UPDATES or x.operands[0] != name:
            total += whole
    return min(total, whole)


def _trips(computations: dict[str, list[Op]], op: Op) -> int:
    """How often a loop runs: the only constant in its condition, or 1 where there is no such constant."""
    found = re.findall(r'known_trip_count"?:\{"n":"(\d+)"', op.rest)
    if not found:
        condition = computations.get(op.called("condition") or "", [])
        found = [x.rest.split(")")[0] for x in condition if x.kind == "constant" and x.rest.split(")")[0].isdigit()]
    return int(found[0]) if len(set(found)) == 1 else 1
