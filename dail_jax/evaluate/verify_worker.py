"""The process that compares answers by math-verify; started by `grading.Grader`, which may kill it at any time.

It is run as a file, so that nothing else of this package is imported. One JSON line comes in for each comparison,
`[gold, prediction]` (prediction null: only parse the gold), and one goes out: the reason of the verdict. The limits
are the kernel's: an address space that holds, and CPU seconds renewed for each line, whose end is SIGXCPU, also in
the middle of C code. `argv`: address space in MiB, CPU seconds for one comparison.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
from typing import Any


def main() -> None:
    memory_mib, cpu_seconds = int(sys.argv[1]), int(sys.argv[2])
    replies = os.dup(1)  # the pipe is ours alone: whatever a library prints goes to stderr
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
        gold, prediction = json.loads(line)
        reason = compare(math_verify, gold, prediction)
        # Most of math-verify and sympy takes a MemoryError for one more way to fail: the peak gives it away.
        if reason != "equal" and peak_mib() > memory_mib / 4:
            reason = "memory"
        os.write(replies, json.dumps(reason).encode() + b"\n")


def peak_mib() -> float:
    """The most address space that this process ever had, where the system tells (Linux)."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmPeak"))
    except (OSError, StopIteration):
        return 0.0


def compare(math_verify: Any, gold: str, prediction: str | None) -> str:
    """The reason of a verdict; math-verify is not symmetric, the gold answer goes first."""
    try:
        parsed_gold = parse(math_verify, gold)
        if parsed_gold is None:
            return "gold"
        if prediction is None:
            return "equal"
        parsed = parse(math_verify, prediction)
        if parsed is None:
            return "unparseable"
        equal = math_verify.verify(  # an interval may be answered by an inequality, too
            parsed_gold, parsed, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
        )
        return "equal" if equal else "different"
    except MemoryError:
        return "memory"
    except Exception:  # whatever sympy raises on an answer that parses, it is not equal
        return "incomparable"


def parse(math_verify: Any, text: str) -> Any:
    """A sympy object, or None. Its own timeouts, which are alarms, are off: ours is the kernel's."""
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
