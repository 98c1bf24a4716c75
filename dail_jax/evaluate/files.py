"""Reads samples.jsonl and results.json, which may be damaged or from another program: see docs/results.md.

The readers return plain dicts that have every key of the shapes below, with its type; other keys are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, model_validator

from dail_jax import strict_json
from dail_jax.errors import UserError
from dail_jax.provenance import Drawn
from dail_jax.shapes import Count, Natural, Shape, Text, check

SCHEMA = 1  # of results.json: raised when the name or the meaning of an existing key changes

Whole = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]  # a number as a key


VERDICT = ("answer", "vote", "correct", "reason")  # what grading puts into a row


class SampleRow(Shape):
    """A row of samples.jsonl."""

    benchmark: str
    problem_id: str
    sample: Natural
    budget: Count
    tokens: Natural
    answer_tokens: Natural = 0
    forced_tokens: Natural
    text: Text
    forced_text: Text | None
    answer: Text | None
    gold: Text
    finish: str
    correct: bool | None
    reason: str
    vote: Natural | None = None  # missing from files of earlier versions; `grade` adds it


class StoredInterval(Shape):
    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class Cell(Shape):
    """One benchmark at one budget."""

    problems: Count
    samples: Count
    pass_at_k: dict[Whole, StoredInterval] = Field(alias="pass@k")
    maj_at_k: dict[Whole, StoredInterval] = Field(alias="maj@k")
    tokens: StoredInterval
    mean_tokens: FiniteFloat
    median_tokens: FiniteFloat
    forced: FiniteFloat
    forced_tokens: FiniteFloat
    answered: FiniteFloat
    reasons: dict[str, Natural]
    per_problem: dict[str, Annotated[list[Natural], Field(min_length=2, max_length=2)]]

    @model_validator(mode="after")
    def _possible(self):
        if any(int(k) > self.samples for k in self.pass_at_k):
            raise ValueError(f"got pass@k for a larger k, want it up to the {self.samples} samples")
        if any(right > n or n != self.samples for right, n in self.per_problem.values()):
            raise ValueError(f"got impossible counts in per_problem, want [right samples, {self.samples}]")
        if len(self.per_problem) != (self.problems if self.pass_at_k else 0):
            raise ValueError(f"got {len(self.per_problem)} in per_problem, want one for each problem with pass@k")
        return self


UNTRAINED = "none"  # `objective` in the results of an untrained model


class Results(Shape):
    arm: str = ""
    objective: str = ""
    benchmarks: dict[str, dict[Whole, Cell]]


class Samples(Drawn):
    """samples.jsonl as an output of `evaluate`, which can be graded again."""

    def drawn(self, path: Path) -> Iterator[dict[str, Any]]:
        for row in read_samples(path):
            yield {key: value for key, value in row.items() if key not in VERDICT}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """All rows. A torn last line is refused as well: without its sample, every figure would differ."""
    lines = strict_json.read_lines(path, own=True, torn="refuse", advice="evaluate again")
    rows = [check(line.value, SampleRow, path, line.number) for line in lines]
    if not rows:
        raise UserError("got an empty file, want samples: evaluate again", file=path)
    return rows


def read_results(path: Path) -> dict[str, Any]:
    tree = strict_json.read_object(path, own=True)
    schema = tree.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise UserError(f"got schema {schema!r:.40}, want {SCHEMA}: another version wrote it", file=path)
    return check(tree, Results, path)
