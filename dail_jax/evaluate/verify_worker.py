"""The process that compares answers with math-verify; started by `grading.Grader`, which may kill it at any time.

It is run as a file, so that nothing else of this package is imported. Each question is one JSON line, and so is each
reply:

    ["equal", gold, answer]    the reason of the verdict
    ["read", formula, null]    "equal" if the formula can be read, otherwise the reason why not
    ["size", formula, null]    its kind and numbers, as in "number 0.5 0.0" (real and imaginary part), or a reason

The kernel enforces the limits: on address space, and on CPU time per question. When that is used up comes SIGXCPU, even
in the middle of C code. `argv`: address space in MiB, CPU seconds per question.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import zlib
from typing import Any


def main() -> None:
    memory_mib, cpu_seconds = int(sys.argv[1]), int(sys.argv[2])
    replies = os.dup(1)  # the pipe is for replies only: whatever a library prints goes to stderr
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))

    import math_verify

    logging.disable(logging.CRITICAL)
    os.write(replies, b'"ready"\n')
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        question, formula, other = json.loads(line)
        reason = size(math_verify, formula) if question == "size" else compare(math_verify, formula, other)
        # Most of math-verify and sympy handles a MemoryError like any other failure; the peak memory reveals it.
        if reason != "equal" and peak_mib() > memory_mib / 4:
            reason = "memory"
        os.write(replies, json.dumps(reason).encode() + b"\n")


def peak_mib() -> float:
    """This process's peak address space in MiB; 0 where the system does not report it (only Linux does)."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmPeak"))
    except (OSError, StopIteration):
        return 0.0


def compare(math_verify: Any, gold: str, prediction: str | None) -> str:
    """The reason of a verdict. math-verify is not symmetric: the gold answer goes first."""
    try:
        parsed_gold = parse(math_verify, gold)
        if parsed_gold is None:
            return "gold"
        if prediction is None:
            return "equal"
        parsed = parse(math_verify, prediction)
        if parsed is None:
            return "unparseable"
        pairs = [(parsed_gold, parsed)]
        if has_i(parsed_gold) or has_i(parsed):  # a variable to math-verify, yet e^{i\\pi} is -1
            pairs.append((with_i(parsed_gold), with_i(parsed)))
        equal = any(  # an inequality may also answer for an interval
            math_verify.verify(one, two, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
            for one, two in pairs
        )
        return "equal" if equal else "different"
    except MemoryError:
        return "memory"
    except Exception:  # whatever sympy raises on an answer that parses, it is not equal
        return "incomparable"


def has_i(parsed: Any) -> bool:
    return any(symbol.name == "i" for symbol in getattr(parsed, "free_symbols", ()))


def with_i(parsed: Any) -> Any:
    """The formula with the imaginary unit in place of the letter i."""
    import sympy

    letters = {symbol: sympy.I for symbol in getattr(parsed, "free_symbols", ()) if symbol.name == "i"}
    return parsed.subs(letters).doit() if letters else parsed


def size(math_verify: Any, text: str) -> str:
    """A formula's kind and its numbers, or a reason; equal formulas have nearly equal numbers."""
    try:
        parsed = parse(math_verify, text)
        if parsed is None:
            return "unparseable"
        kind, values = sizes(parsed)
        return " ".join([kind, *(repr(part) for value in values for part in (value.real, value.imag))])
    except MemoryError:
        return "memory"
    except Exception:
        return "incomparable"


def sizes(parsed: Any) -> tuple[str, list[complex]]:
    """(`number`, its value) or (`set`, the sorted values of its members); anything else is (`other`, 0).

    Each variable has a fixed value that depends on its name alone. As in math-verify, an equation counts as its right
    side, and a set of one member as that member.
    """
    import sympy

    if isinstance(parsed, sympy.Equality):
        return sizes(parsed.rhs)
    if isinstance(parsed, sympy.FiniteSet | sympy.Tuple | sympy.MatrixBase):
        members = [sizes(member) for member in parsed]
        if len(members) == 1:
            return members[0]
        values = [value for _, several in members for value in several]
        return "set", sorted(values, key=lambda value: (value.real, value.imag))
    if not isinstance(parsed, sympy.Expr):
        return "other", [0j]
    parsed = with_i(parsed)
    point = {s: 0.5 + zlib.crc32(s.name.encode()) / 2**32 for s in parsed.free_symbols}  # pyright: ignore
    return "number", [complex(parsed.subs(point).evalf(15))]


def parse(math_verify: Any, text: str) -> Any:
    """A sympy object, or None. math-verify's own timeouts, which are alarms, are off: the kernel limits CPU time."""
    # Only what is in the box counts: the looser patterns would pick one fraction out of a sentence.
    latex = math_verify.LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    try:
        found = math_verify.parse(
            f"\\boxed{{{text}}}", [latex], extraction_mode="first_match", parsing_timeout=None, raise_on_error=True
        )
    except MemoryError:
        raise
    except Exception:
        return None
    return found[0] if found and not isinstance(found[0], str) else None


if __name__ == "__main__":
    main()
