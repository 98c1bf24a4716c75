"""Judges traces of the micro-world from their text, sharing no code with what writes them.

The method is read from the expert's solution and the registers from the problem, as the data set has them. Then every
step of a trace is computed again, and every column of its work is checked. A re-check repeats the step before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PROBLEM = re.compile(r".*: A=(\d{3}) B=(\d{3})", re.DOTALL)
STEP = re.compile(r"(again )?([a-z]{3}) (\d{3})(?: (\d{3}|\d))?(?: : (\d\d=\d\d(?: \d\d=\d\d)*))? > (\d{3})")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
MEANINGS = {"+": "add", "-": "sub", "*": "mul", "~": "rev", "@": "rot", "#": "inv"}


@dataclass(frozen=True)
class Judgement:
    """A judgement of one trace: `due` counts the steps that need column work, `shortcuts` those that leave it out.

    Re-checks are none of the steps.
    """

    right: bool  # the last boxed answer is the answer
    sound: bool  # every step follows the method or repeats the last and has the right value; any work it shows is right
    due: int
    shortcuts: int
    steps: int
    rechecks: int


@dataclass(frozen=True)
class Tally:
    """Sums over traces."""

    traces: int = 0
    right: int = 0
    sound: int = 0
    complete: int = 0  # sound, and no step is a shortcut
    due: int = 0
    shortcuts: int = 0
    steps: int = 0
    rechecks: int = 0

    def add(self, v: Judgement) -> Tally:
        complete = v.sound and not v.shortcuts
        return Tally(
            self.traces + 1,
            self.right + v.right,
            self.sound + v.sound,
            self.complete + complete,
            self.due + v.due,
            self.shortcuts + v.shortcuts,
            self.steps + v.steps,
            self.rechecks + v.rechecks,
        )


def judge(text: str, problem: str, solution: str) -> Judgement:
    """Judges a response to a problem; raises ValueError if the problem or the solution is not of the micro-world."""
    registers = PROBLEM.fullmatch(problem)
    *steps, last = solution.split("; ")
    gold = BOXED.fullmatch(last)
    if registers is None or gold is None or not all(step[0] in MEANINGS for step in steps):
        raise ValueError("not a problem of the micro-world")
    b = int(registers[2])
    *written, final = text.removesuffix("<|end|>").strip().split(" ; ")
    boxes = BOXED.findall(text)
    sound = BOXED.fullmatch(final) is not None and boxes == [gold[1]]
    # The step that was written last, as (word, register, operand, result), and where it leaves the register.
    last, value = None, int(registers[1])
    made = due = shortcuts = rechecks = 0
    for line in written:
        found = STEP.fullmatch(line)
        if found is None:
            sound = False
            continue
        again, word, before, operand, work, after = found.groups()
        owes = word in ("add", "sub", "mul")
        step = (word, int(before), operand or "", int(after))
        if again:
            rechecks += 1
            sound = sound and step == last and (work is not None) == owes
        else:
            due += owes
            shortcuts += owes and work is None
            sound = sound and made < len(steps) and step == _step(steps[made], value, b) and (owes or work is None)
            made, last, value = made + 1, step, int(after)
        sound = sound and (work is None or _is_right_work(word, before, operand, work, after))
    sound = sound and made == len(steps)
    return Judgement(bool(boxes) and boxes[-1] == gold[1], sound, due, shortcuts, made, rechecks)


def _step(terse: str, value: int, b: int) -> tuple[str, int, str, int | None]:
    """(word, register, operand, result) of the expert's step, from the register before it."""
    word, meant = MEANINGS[terse[0]], terse[1:].partition("=")[0]
    operand = f"{b:03d}" if meant == "B" else meant
    return word, value, operand, _result(word, value, int(operand or 0))


def _result(word: str, value: int, operand: int) -> int | None:
    """The register after a step, computed digit by digit; None for an unknown operation."""
    hundreds, tens, ones = value // 100, value // 10 % 10, value % 10
    table = {
        "add": value + operand,
        "sub": value - operand,
        "mul": value * operand,
        "rev": 100 * ones + 10 * tens + hundreds,
        "rot": 100 * tens + 10 * ones + hundreds,
        "inv": 999 - value,
    }
    return table[word] % 1000 if word in table else None


def _is_right_work(word: str, x: str, y: str, work: str, z: str) -> bool:
    """Whether `work` holds three correct columns, ones first, that compute z from x and y."""
    cells = work.split(" ")
    carry = 0
    for place, cell in zip((2, 1, 0), cells, strict=False):
        p, q, out, digit = (int(cell[i]) for i in (0, 1, 3, 4))
        if (cell[0], cell[1]) != (x[place], y if word == "mul" else y[place]) or cell[4] != z[place]:
            return False
        before, carry = carry, out
        match word:
            case "add" if p + q + before == 10 * out + digit:
                continue
            case "sub" if p - q - before == digit - 10 * out:
                continue
            case "mul" if p * q + before == 10 * out + digit:
                continue
        return False
    return len(cells) == 3


def group(problem_id: str) -> str:
    """`hard-zib` of `hard-zib-0017`."""
    return problem_id.rpartition("-")[0]


def tally(judged: Iterable[tuple[str, Judgement]]) -> dict[str, Tally]:
    """Sums by kind (`hard`) and by kind and operator (`hard-zib`), sorted, from pairs of problem id and verdict."""
    out: dict[str, Tally] = {}
    for problem_id, verdict in judged:
        for key in {group(problem_id), problem_id.partition("-")[0]}:
            out[key] = out.get(key, Tally()).add(verdict)
    return dict(sorted(out.items()))
