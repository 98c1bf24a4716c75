"""The gold answers of the training data, which filters, rewards and calibration grade against."""

from __future__ import annotations

from collections.abc import Iterator

from dail_jax import config as config_lib
from dail_jax.data.records import Row
from dail_jax.errors import UserError
from dail_jax.evaluate import answers
from dail_jax.evaluate.grading import Grader


def answer_type(config: config_lib.Config, *, graded: bool = False) -> str:
    """The name of the training data's answer type; raises UserError unless it is registered and, if need be, graded."""
    assert config.data is not None
    name = config.data.answer
    if graded and not answers.named(name, "data.answer").is_graded:
        raise UserError(f"got {name!r}, want an answer type that is graded", field="data.answer")
    return name


def gold_of(row: Row, kind: str) -> str | None:
    """The row's answer, otherwise the one that its expert solution ends in, otherwise None."""
    return row.answer.strip() if row.answer else answers.named(kind, "data.answer").extract(row.solution)


def is_correct(grader: Grader, text: str, gold: str, kind: str) -> bool:
    """Whether a response's answer equals the gold answer."""
    return grader.grade(answers.extract(text, kind), gold, kind).correct


def problems(config: config_lib.Config, rows: list[Row]) -> Iterator[UserError]:
    """An error for every row without an answer that can be graded against."""
    kind, data = answer_type(config, graded=True), config.data
    assert data is not None
    with Grader() as grader:
        for row in rows:
            gold = gold_of(row, kind)
            problem = "want an answer: traces are graded" if gold is None else grader.check_gold(gold, kind)
            if problem:
                yield UserError(problem, **row.place, field=data.columns.answer)
