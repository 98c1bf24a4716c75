"""A 3-digit register machine with named operators: problems, expert solutions, traces, pre-training rows.

The register starts at A; a step adds or subtracts B, multiplies by a digit, reverses or rotates the digits, or
takes the 9's complement, modulo 1000. For `zib: A=241 B=310`, where zib is "add B, reverse, times 3":

    expert   +B=551; ~=155; *3=465; \\boxed{465}
    trace    add 241 310 : 10=01 41=05 23=05 > 551 ; rev 551 > 155 ; mul 155 3 : 53=15 53=16 13=04 > 465 ; \\boxed{465}

The expert writes other symbols, leaves out the work, and hides some results; the trace shows every column, least
significant digit first, as `x y = carry digit`. Neither the names nor the exact methods of *hard* operators occur in
pre-training; those of *known* operators do. A *chain* problem gives its method instead of a name. A *composed* problem
asks for an operator with one more step before or after it, as in `zib; rev: A=241 B=310`; no training problem does.
A model that rambles writes some steps again to check them, as in `rev 551 > 155 ; again rev 551 > 155`.

Everything is a pure function of a numpy Generator, of which only `integers`, `random` and `permutation` are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dail_jax.microworld.tokenizer import CONSONANTS, VOWELS

T = TypeVar("T")
Step = tuple[str, str]  # word, operand ("B", a digit, or "")
Procedure = tuple[Step, ...]
Rates = dict[str, float]  # by word, the probability that a step is a shortcut
Laziness = dict[str, Rates]  # by role
Rambling = dict[str, float]  # by role, the probability that a step is checked again

SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "rev": "~", "rot": "@", "inv": "#"}
WORDS = tuple(SYMBOLS)
WORK = ("add", "sub", "mul")  # the steps that owe column work


def procedure(text: str) -> Procedure:
    """The steps of e.g. `add B; rev; mul 3`."""
    return tuple((word, operand) for word, _, operand in (step.partition(" ") for step in text.split("; ")))


def spelt(steps: Procedure) -> str:
    """The text that `procedure` reads."""
    return "; ".join(f"{word} {operand}".strip() for word, operand in steps)


HARD: dict[str, Procedure] = {
    "zib": procedure("add B; rev; mul 3"),
    "vok": procedure("mul 7; sub B; rot"),
    "dun": procedure("rot; add B; inv; mul 4"),
    "gal": procedure("sub B; mul 6; add B"),
    "pem": procedure("inv; mul 3; add B"),
    "tuf": procedure("rev; sub B; mul 3; rot"),
    "kos": procedure("mul 9; rot; add B; rev"),
    "nid": procedure("add B; mul 7; inv"),
}
KNOWN: dict[str, Procedure] = {
    "bam": procedure("mul 2; add B; rev"),
    "fel": procedure("rev; mul 5; sub B"),
    "gor": procedure("add B; rot; mul 3"),
    "kip": procedure("inv; sub B; mul 4"),
    "lod": procedure("mul 6; rot; add B"),
    "mer": procedure("sub B; inv; mul 7"),
    "nat": procedure("rot; mul 8; sub B; inv"),
    "sov": procedure("add B; mul 9; rev"),
}
LENGTHS = {2: 0.2, 3: 0.45, 4: 0.35}  # number of steps of a random method: probability
# Weights of a random method's steps; those with work are more frequent, as in HARD.
FREQUENCY = {word: 2.0 if word in WORK else 1.0 for word in WORDS}
SHOWN = 0.7  # probability that an expert shows an intermediate result

# Rows of the pre-training mixture, by weight. Guesses (a fresh name, some method, nothing in context) give the
# model its broad prior over what an unknown operator may be.
MIXTURE = {"primitive": 0.5, "chain": 2.5, "known": 1.2, "guess": 0.4, "privileged": 4.5, "waypoints": 0.9}
# Shares of chain problems and known operators among the rows with a solution or waypoints in context.
FAMILIAR = {"chain": 0.1, "known": 0.1}
# The role whose template a row has; without an entry, it is the student's.
ROLES = {"privileged": "privileged", "waypoints": "negative"}
# Probability that a step whose result is in context is written without its work. This is built in here; in large
# models it emerges. The student, with nothing in context, is never lazy.
LAZINESS: Laziness = {
    "student": {},
    "privileged": {"add": 0.15, "sub": 0.15, "mul": 0.3},
    "negative": {"add": 0.97, "sub": 0.97, "mul": 0.97},
}
RAMBLING: Rambling = {"student": 0.0, "privileged": 0.0, "negative": 0.0}
AGAIN = "again "  # before a step that is written once more, with all its work


@dataclass(frozen=True)
class Problem:
    """A question: an operator (or "" for a chain, which spells out its method) applied to registers A and B.

    The name of a composed problem is that of its operator and a step, in their order.
    """

    name: str
    method: Procedure
    a: int
    b: int

    @property
    def text(self) -> str:
        what = self.name or spelt(self.method)
        return f"{what}: A={self.a:03d} B={self.b:03d}"


@dataclass(frozen=True)
class CorpusRow:
    """A pre-training row: its kind, its problem, the role whose template it uses, the template's fields, the target."""

    kind: str
    problem: str
    role: str
    fields: dict[str, str]
    response: str


# ---------------------------------------------------------------------------------------------------
# The machine and its texts
# ---------------------------------------------------------------------------------------------------


def operate(step: Step, value: int, b: int) -> int:
    """The register after one step; all values lie in 0..999."""
    word, operand = step
    digits = f"{value:03d}"
    match word:
        case "add":
            return (value + b) % 1000
        case "sub":
            return (value - b) % 1000
        case "mul":
            return value * int(operand) % 1000
        case "rev":
            return int(digits[::-1])
        case "rot":
            return int(digits[1:] + digits[0])
        case "inv":
            return 999 - value
    raise ValueError(f"no step {word!r}")


def results(problem: Problem) -> list[int]:
    """The register after each step; the last is the answer."""
    out = [problem.a]
    for step in problem.method:
        out.append(operate(step, out[-1], problem.b))
    return out[1:]


def columns(word: str, x: int, y: int) -> str:
    """The column work of `x word y`, three columns from the right; for mul, `y` is one digit."""
    out, carry = [], 0
    for place in (1, 10, 100):
        p, q = x // place % 10, y if word == "mul" else y // place % 10
        total = p * q + carry if word == "mul" else p + q + carry if word == "add" else p - q - carry
        carry, digit = (int(total < 0), total % 10) if word == "sub" else divmod(total, 10)
        out.append(f"{p}{q}={carry}{digit}")
    return " ".join(out)


def draw_shown(rng: np.random.Generator, problem: Problem, share: float = SHOWN) -> tuple[bool, ...]:
    """Which results the expert shows; always the last."""
    return (*(bool(rng.random() < share) for _ in problem.method[:-1]), True)


def expert(problem: Problem, shown: tuple[bool, ...]) -> str:
    """The expert's solution: terse symbols, some of the results, no work."""
    found = results(problem)
    steps = [
        SYMBOLS[word] + operand + (f"={value:03d}" if show else "")
        for (word, operand), value, show in zip(problem.method, found, shown, strict=True)
    ]
    return "; ".join([*steps, boxed(problem)])


def waypoints(problem: Problem, shown: tuple[bool, ...]) -> list[str]:
    """The results that the expert shows, each once, without the answer."""
    found = results(problem)
    seen = dict.fromkeys(f"{value:03d}" for value, show in zip(found, shown, strict=True) if show)
    seen.pop(answer(problem), None)
    return list(seen)


def constructive(problem: Problem, skipped: Collection[int] = (), rechecked: Collection[int] = ()) -> str:
    """The constructive solution; steps are numbered from 0.

    Those in `skipped` jump to their result without work; those in `rechecked` are followed by themselves, with all work.
    """
    steps, value = [], problem.a
    for i, (step, result) in enumerate(zip(problem.method, results(problem), strict=True)):
        word, operand = step
        asked, work = f"{word} {value:03d}", ""
        if word in WORK:
            asked += f" {problem.b:03d}" if operand == "B" else f" {operand}"
            work = " : " + columns(word, value, problem.b if operand == "B" else int(operand))
        whole = f"{asked}{work} > {result:03d}"
        steps.append(f"{asked} > {result:03d}" if i in skipped else whole)
        if i in rechecked:
            steps.append(AGAIN + whole)
        value = result
    return " ; ".join([*steps, boxed(problem)])


def answer(problem: Problem) -> str:
    return f"{results(problem)[-1]:03d}"


def boxed(problem: Problem) -> str:
    return f"\\boxed{{{answer(problem)}}}"


# ---------------------------------------------------------------------------------------------------
# Random methods, names and problems
# ---------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, weights: dict[T, float]) -> T:
    """Draws a key with probability proportional to its weight."""
    point = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return next(reversed(weights.keys()))  # reached only through rounding


def _among(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def draw_method(rng: np.random.Generator, length: int | None = None) -> Procedure:
    """A random method other than the hard ones, of `length` steps or a random number of them."""
    while True:
        count = length or _pick(rng, LENGTHS)
        words = [_pick(rng, FREQUENCY) for _ in range(count)]
        made = tuple((w, "B" if w in ("add", "sub") else str(rng.integers(2, 10)) if w == "mul" else "") for w in words)
        if made not in HARD.values():
            return made


def draw_name(rng: np.random.Generator) -> str:
    """A random name (consonant, vowel, consonant) that no operator or step has."""
    while True:
        name = _among(rng, CONSONANTS) + _among(rng, VOWELS) + _among(rng, CONSONANTS)
        if name not in HARD and name not in KNOWN and name not in WORDS:
            return name


def draw_problem(rng: np.random.Generator, kind: str, name: str | None = None) -> Problem:
    """A random problem: chain, primitive (one step), fresh (new name), hard or known (with operator `name` if given).

    hard_composed and known_composed have one more step, before or after the operator's own.
    """
    match kind.split("_"):
        case [("hard" | "known") as familiarity, *composed]:
            operators = HARD if familiarity == "hard" else KNOWN
            name = name or _among(rng, list(operators))
            steps = operators[name]
            if composed:
                more = draw_method(rng, 1)
                name, steps = _among(
                    rng, [(f"{name}; {spelt(more)}", steps + more), (f"{spelt(more)}; {name}", more + steps)]
                )
        case ["fresh"]:
            name, steps = draw_name(rng), draw_method(rng)
        case _:
            name, steps = "", draw_method(rng, 1 if kind == "primitive" else None)
    return Problem(name, steps, int(rng.integers(1000)), int(rng.integers(1000)))


# ---------------------------------------------------------------------------------------------------
# Pre-training rows and data sets
# ---------------------------------------------------------------------------------------------------


def draw_row(
    rng: np.random.Generator, laziness: Laziness = LAZINESS, rambling: Rambling = RAMBLING, composed: float = 0.0
) -> CorpusRow:
    """One row of the pre-training mixture, or with probability `composed` a composed problem of a known operator."""
    kind = "known_composed" if composed and rng.random() < composed else _pick(rng, MIXTURE)
    role = ROLES.get(kind, "student")
    rates = laziness[role]
    if role == "student":
        problem = draw_problem(rng, "fresh" if kind == "guess" else kind)
        shown = (any(rates.values()),) * len(problem.method)
    else:
        problem = draw_problem(rng, _pick(rng, {**FAMILIAR, "fresh": 1 - sum(FAMILIAR.values())}))
        shown = draw_shown(rng, problem)
    skipped = [i for i, (word, _) in enumerate(problem.method) if shown[i] and rng.random() < rates.get(word, 0.0)]
    rechecked = [i for i, _ in enumerate(problem.method) if rambling[role] and rng.random() < rambling[role]]
    fields = {"problem": problem.text}
    if role == "privileged":
        fields["solution"] = expert(problem, shown)
    elif role == "negative":
        fields |= {"waypoints": " ".join(waypoints(problem, shown)), "answer": answer(problem)}
    return CorpusRow(kind, problem.text, role, fields, constructive(problem, skipped, rechecked))


def corpus(
    seed: int,
    rows: int,
    held_out: Collection[str] = (),
    laziness: Laziness = LAZINESS,
    rambling: Rambling = RAMBLING,
    composed: float = 0.0,
) -> Iterator[CorpusRow]:
    """The pre-training mixture, without the problems whose text is in `held_out`."""
    rng, made = np.random.default_rng(seed), 0
    while made < rows:
        row = draw_row(rng, laziness, rambling, composed)
        if row.problem not in held_out:
            made += 1
            yield row


SIZES: dict[str, dict[str, int]] = {
    "train": {"hard": 600, "chain": 100, "known": 100},
    "hard": {"hard": 64},
    "chain": {"chain": 64},
    "known": {"known": 64},
    "hard_composed": {"hard_composed": 64},
    "known_composed": {"known_composed": 64},
}


def datasets(seed: int, shown: float = SHOWN) -> dict[str, list[dict[str, str]]]:
    """The data sets of SIZES: rows of problem_id, problem, solution, answer; no problem occurs twice.

    The experts show a share `shown` of the intermediate results; the problems do not depend on it. Operators are used in
    rotation. An id is kind-operator-number; a chain has its number of steps for an operator.
    """
    rng, seen = np.random.default_rng(seed), set()
    numbers: dict[str, int] = {}
    out = {}
    for name, sizes in SIZES.items():
        rows = []
        for kind, count in sizes.items():
            operators = {"hard": list(HARD), "known": list(KNOWN)}.get(kind.partition("_")[0], [None])
            for i in range(count):
                operator = operators[i % len(operators)]
                problem = draw_problem(rng, kind, operator)
                while problem.text in seen:
                    problem = draw_problem(rng, kind, operator)
                seen.add(problem.text)
                rows.append(
                    {
                        "problem_id": f"{kind}-{operator or f'{len(problem.method)}steps'}-{numbers.get(kind, 0):04d}",
                        "problem": problem.text,
                        "solution": expert(problem, draw_shown(rng, problem, shown)),
                        "answer": answer(problem),
                    }
                )
                numbers[kind] = numbers.get(kind, 0) + 1
        out[name] = [rows[i] for i in rng.permutation(len(rows))]
    return out
