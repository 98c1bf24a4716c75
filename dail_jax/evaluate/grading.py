"""Deciding whether an answer equals the gold answer, however hostile it is.

Most comparisons are decided here by a few certain rules (the same string, two integers, marks such as units, rows of
integers, words). The others go to math-verify in worker processes with limits on memory and CPU time, so that no
answer can stop or bring down the caller. A verdict is right or wrong with a reason:

    equal, different   the comparison was made
    no answer          nothing was extracted
    unparseable        not mathematics that can be read
    incomparable       it can be read, but the comparison fails
    too long, too deep, too large    refused by a look at the text
    timeout, memory, crash           the worker met its limit, or died
    gold               the gold answer cannot be read: see `Grader.check_gold`
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dail_jax.evaluate.answers import (
    MAX_LENGTH,
    AnswerType,
    canonical_integer,
    choice_letter,
    extract,
    marks_agree,
    normalise,
    refusal,
    rows_agree,
    tidy,
    words_agree,
)
from dail_jax.worker import Lost, Worker

__all__ = ["AnswerType", "Grader", "Limits", "Verdict", "check_gold", "extract", "normalise", "quick_verdict"]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and why (see the module's list of reasons)."""

    correct: bool
    reason: str


def quick_verdict(prediction: str | None, gold: str, answer_type: AnswerType = "math") -> Verdict | None:
    """The verdict where no algebra is needed, or None."""
    if prediction is None or not prediction.strip():
        return Verdict(False, "no answer")
    if prediction.strip() == gold.strip():
        return Verdict(True, "equal")
    if len(prediction) > MAX_LENGTH:
        return Verdict(False, "too long")
    if answer_type == "choice":
        letters = choice_letter(gold), choice_letter(prediction)
        if None in letters:
            return Verdict(False, "gold" if letters[0] is None else "unparseable")
        return _verdict(letters[0] == letters[1])
    one, other = normalise(gold), normalise(prediction)
    if one == other and one:
        return Verdict(True, "equal")
    reason = refusal(prediction)
    if reason is None and refusal(gold) is not None:
        reason = "gold"
    if reason is not None:
        return Verdict(False, reason)
    if canonical_integer(one) and canonical_integer(other):
        return Verdict(False, "different")
    for rule in (marks_agree, rows_agree, words_agree):
        agree = rule(tidy(gold), tidy(prediction))
        if agree is not None:
            return _verdict(agree)
    return None


def _verdict(agree: bool) -> Verdict:
    return Verdict(agree, "equal" if agree else "different")


@dataclass(frozen=True)
class Limits:
    """What one comparison may use. The wall clock only ends what sleeps: busy work meets the CPU limit first."""

    memory_mib: int = 1024
    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    comparisons: int = 500  # then the worker is replaced, since sympy's caches grow


class _Judge:
    """A worker process that compares answers, replaced from time to time."""

    def __init__(self, limits: Limits):
        self.limits, self.served = limits, 0
        script = Path(__file__).with_name("verify_worker.py")
        self.worker = Worker(script, [str(limits.memory_mib), str(limits.cpu_seconds)], limits.wall_seconds)

    def ask(self, gold: str, prediction: str | None) -> str:
        """The reason of a verdict; with `prediction=None`, `equal` where the gold answer can be read."""
        while True:
            if self.served >= self.limits.comparisons:
                self.worker.stop()
            fresh = self.worker.process is None
            self.served = 1 if fresh else self.served + 1
            try:
                reason = self.worker.ask([gold, prediction])
            except Lost as lost:
                reason = lost.reason
            if reason == "memory":
                self.worker.stop()
            # Memory may have been used up by earlier answers: only a fresh process can tell.
            if reason in ("memory", "crash") and not fresh:
                continue
            return reason


@dataclass
class Grader:
    """Grades answers; a context manager, since it may have started processes (never more than `workers`).

    `grade` and `grade_many` may be called from one thread at a time. Verdicts are remembered.
    """

    workers: int = 2
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._all = [_Judge(self.limits) for _ in range(max(1, self.workers))]
        self._free: queue.LifoQueue[_Judge] = queue.LifoQueue()  # last in, first out: one at a time needs one process
        for judge in reversed(self._all):
            self._free.put(judge)
        self._threads: ThreadPoolExecutor | None = None
        self._known: dict[tuple[str, str | None], str] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        for judge in self._all:
            judge.worker.close()  # ends what a thread may still be waiting for
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for judge in self._all:
            judge.worker.stop()

    @property
    def processes(self) -> int:
        """How many worker processes are alive."""
        return sum(judge.worker.process is not None for judge in self._all)

    def grade(self, prediction: str | None, gold: str, answer_type: AnswerType = "math") -> Verdict:
        return self.grade_many([(prediction, gold, answer_type)])[0]

    def grade_many(self, items: Sequence[tuple[str | None, str, AnswerType]]) -> list[Verdict]:
        """One verdict for each (prediction, gold, answer type), in order."""
        verdicts = [quick_verdict(*item) for item in items]
        keys = {i: (tidy(items[i][1]), tidy(items[i][0] or "")) for i, known in enumerate(verdicts) if known is None}
        self._learn(list(keys.values()))
        for i, key in keys.items():
            verdicts[i] = Verdict(self._known[key] == "equal", self._known[key])
        return [verdict for verdict in verdicts if verdict is not None]

    def check_gold(self, gold: str, answer_type: AnswerType = "math") -> str | None:
        """Why a gold answer cannot be graded against, in words for an error message; None where it can."""
        shown = repr(gold if len(gold) <= 60 else gold[:57] + "...")
        if answer_type == "choice":
            return None if choice_letter(gold) else f"got {shown}, want one letter"
        if answer_type == "integer":
            return None if canonical_integer(normalise(gold)) else f"got {shown}, want an integer"
        reason = "no answer" if not gold.strip() else refusal(gold)
        if reason is None:
            text = tidy(gold)
            if canonical_integer(normalise(gold)) or rows_agree(text, text) or words_agree(text, text):
                return None
            self._learn([(text, None)])
            reason = self._known[text, None]
        return None if reason == "equal" else f"got {shown}, want mathematics that can be read ({reason})"

    def _learn(self, keys: Sequence[tuple[str, str | None]]) -> None:
        """Has the workers compare what is not yet known."""
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if len(new) == 1:
            self._known[new[0]] = self._ask(new[0])
        elif new:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(len(self._all), thread_name_prefix="grading")
            self._known.update(zip(new, self._threads.map(self._ask, new), strict=True))

    def _ask(self, key: tuple[str, str | None]) -> str:
        judge = self._free.get()
        try:
            return judge.ask(*key)
        finally:
            self._free.put(judge)


def check_gold(gold: str, answer_type: AnswerType = "math") -> str | None:
    """`Grader.check_gold` for a single answer."""
    with Grader(workers=1) as grader:
        return grader.check_gold(gold, answer_type)
