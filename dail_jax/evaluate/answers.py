"""Answer types: how to find an answer in a completion, and when it equals the gold answer.

A configuration names one per benchmark (`answer: math`). A new one is a subclass of `AnswerType` and an entry in
`ANSWERS`: docs/extending.md shows one from outside this package.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from dail_jax import latex
from dail_jax.errors import registered
from dail_jax.evaluate import rules
from dail_jax.evaluate.rules import Verdict


class Algebra(Protocol):
    """Equality of formulas in LaTeX, decided in worker processes under limits (`grading.Grader`)."""

    def equal(self, gold: str, formula: str) -> Verdict:
        """Whether two formulas have the same value."""
        ...

    def unreadable(self, formula: str) -> str | None:
        """Why nothing can be compared with a formula (the reason of a verdict), or None if it can."""
        ...

    def size(self, formula: str) -> tuple[str, tuple[float, ...]] | None:
        """A formula's kind and its numbers, taken at a fixed point if it has variables; None if they are unknown."""
        ...


class AnswerType:
    """How answers of one kind are read and compared. Methods may be called from several threads."""

    is_graded = True  # False: samples are drawn and kept, but not graded

    def extract(self, part: str) -> str | None:
        """The answer in the answer part of a completion (what follows its thoughts), or None."""
        raise NotImplementedError

    def complete(self, part: str, is_cut: bool) -> str | None:
        """The first answer in an answer part that nothing which may follow it can change, or None: then it is asked for.

        A part that `is_cut` may go on. Whatever is complete there must be returned for every longer part as well, so
        that a larger budget takes back no answer.
        """
        return None if is_cut else self.extract(part)

    def gold_problem(self, gold: str, algebra: Algebra) -> str | None:
        """Why a text cannot be a gold answer, as in "want one letter"; None if it can. Called before sampling."""
        return None if gold.strip() else "want an answer"

    def compare(self, gold: str, answer: str, algebra: Algebra) -> Verdict:
        """Whether an answer, which is not blank, equals the gold answer; the reason is counted in results.json."""
        raise NotImplementedError

    def key(self, answer: str) -> Hashable:
        """A key for majority votes, where answers with equal keys are the same. It must be cheap: no algebra."""
        return answer.strip()

    def neighbourhood(self, answer: str, algebra: Algebra) -> Hashable | None:
        """A second key for majority votes: answers that share it may be equal although their keys differ.

        Such answers are compared with each other; an answer whose neighbourhood is None is not.
        """
        return None


class Boxed(AnswerType):
    """Answers that are asked for in a box."""

    def complete(self, part: str, is_cut: bool) -> str | None:
        """The first box that can be read; in a part that is cut, with its brace closed, and that of every box before."""
        outer, rest = 0, "}" * (part.count("{") + 1) if is_cut else ""  # an open box is one that ends in the rest
        found = latex.boxes(part + rest)
        for box in found:
            if box.end > len(part):
                return None
            if box.start < outer:  # inside of one that was looked at
                continue
            outer, braced = box.end, box.last < box.end
            if braced and (answer := self.extract(part[box.start : box.end])) is not None:
                return answer
        return self.extract(part) if found and not is_cut else None


class Math(Boxed):
    """Mathematics in the last box, compared by value."""

    def extract(self, part: str) -> str | None:
        return latex.last_boxed(part)

    def gold_problem(self, gold: str, algebra: Algebra) -> str | None:
        text = rules.spelled(gold)
        reason = rules.refusal(gold) if text else "no answer"
        if reason is None and not rules.is_certain(text):
            reason = algebra.unreadable(text)
        return reason and f"want mathematics that can be read ({reason})"

    def compare(self, gold: str, answer: str, algebra: Algebra) -> Verdict:
        return rules.quick(gold, answer) or algebra.equal(rules.spelled(gold), rules.spelled(answer))

    def key(self, answer: str) -> Hashable:
        return rules.key(answer)

    def neighbourhood(self, answer: str, algebra: Algebra) -> Hashable | None:
        if not rules.is_small(answer):
            return None
        text = rules.spelled(answer)
        exact = latex.approximate(text)
        found = ("number", (exact, 0.0)) if exact is not None else algebra.size(text)
        return found and (found[0], tuple(map(_rough, found[1])))


def _rough(number: float) -> str:
    """Four digits of an arbitrary multiple, so that no answer that people write lies on the border of rounding."""
    return f"{number * 1.0372953:.4g}" if abs(number) > 1e-9 else "0"


class Integer(Math):
    """An integer in the last box, or in a statement such as "the answer is 3 + 9 = 12."."""

    def extract(self, part: str) -> str | None:
        box = latex.last_boxed(part)
        if box is not None or "\\boxed" in part:  # an unclosed box: its answer may have been cut
            return box
        return rules.stated_integer(part)

    def gold_problem(self, gold: str, algebra: Algebra) -> str | None:
        return None if rules.canonical_integer(rules.normalise(gold)) else "want an integer"


class Choice(Boxed):
    """A capital letter, in the last box or in a statement such as "Answer: (C)"."""

    def extract(self, part: str) -> str | None:
        box = latex.last_boxed(part)
        if box is not None:
            return rules.choice_letter(box)
        return None if "\\boxed" in part else rules.stated_choice(part)

    def gold_problem(self, gold: str, algebra: Algebra) -> str | None:
        return None if rules.choice_letter(gold) else "want one letter"

    def compare(self, gold: str, answer: str, algebra: Algebra) -> Verdict:
        one, other = rules.choice_letter(gold), rules.choice_letter(answer)
        if one is None or other is None:
            return Verdict(False, "gold" if one is None else "unparseable")
        return Verdict(one == other, "equal" if one == other else "different")

    def key(self, answer: str) -> Hashable:
        return rules.choice_letter(answer) or answer.strip()


class Ungraded(AnswerType):
    """No answers: samples are drawn and kept, but not graded."""

    is_graded = False

    def extract(self, part: str) -> str | None:
        return None


ANSWERS: dict[str, AnswerType] = {"math": Math(), "integer": Integer(), "choice": Choice(), "none": Ungraded()}


def named(name: str, field: str = "answer") -> AnswerType:
    """The answer type of that name; raises UserError, with the configuration's `field`, for one not registered."""
    return registered(ANSWERS, name, field)


def extract(text: str, answer: str = "math", *, forced: str | None = None, tag: str = "think") -> str | None:
    """The answer in a completion, for the answer type of that name; None if there is none.

    The answer part follows the last `</think>` (or other `tag`). A text that opens its thoughts and never closes them
    has none, since what stands among thoughts is not an answer. `forced` is the text that closed the thoughts of a cut
    sample, with what was drawn after it; if it is given, only it counts.
    """
    _, closed, after = text.rpartition(f"</{tag}>")
    if forced is None and not closed and f"<{tag}>" in text:
        return None
    return named(answer).extract(forced if forced is not None else after)
