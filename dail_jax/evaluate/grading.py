"""Deciding whether an answer equals the gold answer, however hostile it is.

An answer type (`answers.py`) decides most comparisons by a few certain rules (the same string, two integers, marks such
as units, rows of integers, words: `rules.py`). The others go to math-verify in worker processes with limits on memory
and CPU time, so that no answer can stop or bring down the caller. A verdict is right or wrong with a reason:

    equal, different   the comparison was made
    no answer          nothing was extracted
    unparseable        not mathematics that can be read
    incomparable       it can be read, but the comparison fails
    too long, too deep, too large    refused because of its text alone
    timeout, memory, crash           the worker reached its limit, or died
    gold               the gold answer cannot be read: see `Grader.check_gold`
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dail_jax.evaluate import answers
from dail_jax.evaluate.answers import AnswerType, Verdict, extract
from dail_jax.worker import Lost, Worker

__all__ = ["Grader", "Limits", "Verdict", "check_gold", "extract"]

_T = TypeVar("_T")
_R = TypeVar("_R")

FAILURES = {"timeout", "memory", "crash"}  # of a worker
MAX_REPRESENTATIVES = 8  # values of one neighbourhood that an answer is compared with
MAX_FAILURES = 3  # of workers, per problem: after that, keys alone decide


@dataclass(frozen=True)
class Limits:
    """What one comparison may use. The wall clock only ends workers that hang: busy ones reach the CPU limit first."""

    memory_mib: int = 1024
    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    comparisons: int = 500  # per worker, which is then replaced: sympy's caches grow


_GOLDS: dict[tuple[AnswerType, str], str | None] = {}  # what is wrong with a gold answer

Question = tuple[str, str, str | None]  # what to do, a formula, and for some a second one


class _Judge:
    """A worker process that compares answers, replaced from time to time."""

    def __init__(self, limits: Limits):
        self.limits, self.served = limits, 0
        script = Path(__file__).with_name("verify_worker.py")
        self.worker = Worker(script, [str(limits.memory_mib), str(limits.cpu_seconds)], limits.wall_seconds)

    def ask(self, question: Question) -> str:
        """The worker's reply: see `verify_worker`."""
        while True:
            if self.served >= self.limits.comparisons:
                self.worker.stop()
            fresh = self.worker.process is None
            self.served = 1 if fresh else self.served + 1
            try:
                reason = self.worker.ask(question)
            except Lost as lost:
                reason = lost.reason
            if reason == "memory":
                self.worker.stop()
            # Memory may have been used up by earlier answers: only a fresh process can tell.
            if reason in ("memory", "crash") and not fresh:
                continue
            return reason


class _Failed(Exception):
    """Raised when a worker reached its limit, or died."""


@dataclass(frozen=True)
class _Algebra:
    """`answers.Algebra` by way of `ask`, which passes questions on to the workers."""

    ask: Callable[[Question], str]

    def equal(self, gold: str, formula: str) -> Verdict:
        reason = self.ask(("equal", gold, formula))
        return Verdict(reason == "equal", reason)

    def unreadable(self, formula: str) -> str | None:
        reason = self.ask(("read", formula, None))
        return None if reason == "equal" else reason

    def size(self, formula: str) -> tuple[str, tuple[float, ...]] | None:
        kind, *numbers = self.ask(("size", formula, None)).split(" ")
        return (kind, tuple(map(float, numbers))) if numbers else None


@dataclass
class Grader:
    """Grades answers; a context manager, since it may start processes (at most `workers`).

    `grade`, `grade_many` and `votes` must be called from one thread at a time. Replies of workers are cached.
    """

    workers: int = 2
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._all = [_Judge(self.limits) for _ in range(max(1, self.workers))]
        self._free: queue.LifoQueue[_Judge] = queue.LifoQueue()  # last in, first out: serial use starts one process
        for judge in reversed(self._all):
            self._free.put(judge)
        self._threads: ThreadPoolExecutor | None = None
        self._known: dict[Question, str] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        for judge in self._all:
            judge.worker.close()  # ends the reply that a thread may still be waiting for
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for judge in self._all:
            judge.worker.stop()

    @property
    def processes(self) -> int:
        """How many worker processes are alive."""
        return sum(judge.worker.process is not None for judge in self._all)

    # Grading, for all answer types

    def grade(self, prediction: str | None, gold: str, answer_type: str = "math") -> Verdict:
        return self.grade_many([(prediction, gold, answer_type)])[0]

    def grade_many(self, items: Sequence[tuple[str | None, str, str]]) -> list[Verdict]:
        """One verdict for each (prediction, gold, name of an answer type), in order."""
        unique = list(dict.fromkeys(items))
        found = dict(zip(unique, self._map(self._grade, unique), strict=True))
        return [found[item] for item in items]

    def check_gold(self, gold: str, answer_type: str = "math") -> str | None:
        """Why a gold answer is of no use for grading, worded for an error message; None if it can be used.

        This process remembers what it has found, since golds are checked before a command starts and again by its stages.
        """
        kind = answers.named(answer_type)
        if (kind, gold) not in _GOLDS:
            _GOLDS[kind, gold] = kind.gold_problem(gold, _Algebra(self._ask))
        problem = _GOLDS[kind, gold]
        return problem and f"got {gold if len(gold) <= 60 else gold[:57] + '...'!r}, {problem}"

    def votes(self, problems: Sequence[tuple[str, Sequence[str | None], Sequence[Verdict]]]) -> list[list[int | None]]:
        """For each problem (name of an answer type, answers, their verdicts), the value that each answer votes for.

        0 is the gold answer; 1, 2, ... are other values in order of first appearance; None is no answer. Wrong answers
        vote for the same value if one would be graded right with the other as the gold answer, under the same limits.
        Those that a worker failed on, or that could not be read, share a value only if their keys are equal.
        """
        return self._map(self._votes, problems)

    def _grade(self, item: tuple[str | None, str, str]) -> Verdict:
        prediction, gold, name = item
        if prediction is None or not prediction.strip():
            return Verdict(False, "no answer")
        return answers.named(name).compare(gold, prediction, _Algebra(self._ask))

    def _votes(self, problem: tuple[str, Sequence[str | None], Sequence[Verdict]]) -> list[int | None]:
        kind = answers.named(problem[0])
        chosen: dict[Hashable, int] = {}  # key of a wrong answer -> its value's number
        near: dict[Hashable, list[tuple[str, int]]] = {}  # neighbourhood -> (first answer, number) of its values
        failures = 0
        found: list[int | None] = []
        for answer, verdict in zip(*problem[1:], strict=True):
            if verdict.correct or answer is None or not answer.strip():
                found.append(0 if verdict.correct else None)
                continue
            key = kind.key(answer)
            if key not in chosen:
                chosen[key] = len(set(chosen.values())) + 1
                if verdict.reason == "different" and failures < MAX_FAILURES:
                    try:
                        number = self._value(kind, answer, near, chosen[key])
                    except _Failed:
                        failures += 1
                    else:
                        chosen[key] = number
            found.append(chosen[key])
        return found

    def _value(self, kind: AnswerType, answer: str, near: dict[Hashable, list[tuple[str, int]]], number: int) -> int:
        """The number of the known value that an answer equals, or `number` if its value is new."""
        algebra = _Algebra(self._ask_or_fail)
        place = kind.neighbourhood(answer, algebra)
        if place is None:
            return number
        values = near.setdefault(place, [])
        for other, known in values[:MAX_REPRESENTATIVES]:
            if any(kind.compare(*pair, algebra).correct for pair in ((other, answer), (answer, other))):
                return known
        values.append((answer, number))
        return number

    def _ask(self, question: Question) -> str:
        if question not in self._known:
            judge = self._free.get()
            try:
                self._known[question] = judge.ask(question)
            finally:
                self._free.put(judge)
        return self._known[question]

    def _ask_or_fail(self, question: Question) -> str:
        reply = self._ask(question)
        if reply in FAILURES:
            raise _Failed
        return reply

    def _map(self, function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """Applies `function` to all items, in one thread per worker, so that items that need no worker do not wait."""
        if len(items) < 2 or len(self._all) < 2:
            return [function(item) for item in items]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(len(self._all), thread_name_prefix="grading")
        left, found = iter(enumerate(items)), {}

        def work() -> None:
            for index, item in left:
                found[index] = function(item)

        for thread in [self._threads.submit(work) for _ in self._all]:
            thread.result()
        return [found[index] for index in range(len(items))]


def check_gold(gold: str, answer_type: str = "math") -> str | None:
    """`Grader.check_gold` for a single answer."""
    with Grader(workers=1) as grader:
        return grader.check_gold(gold, answer_type)
