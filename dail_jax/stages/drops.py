"""The filters as a run applies them: with its rows' answers, the grader, and what its method asks for."""

from __future__ import annotations

from collections.abc import Sequence

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.data import filters
from dail_jax.data.records import Row
from dail_jax.data.traces import Trace
from dail_jax.data.waypoints import final_answer
from dail_jax.errors import UserError
from dail_jax.evaluate.grading import Grader, extract
from dail_jax.train import methods


def mark(traces: Sequence[Trace], rows: list[Row], config: config_lib.Config) -> list[Trace]:
    """The traces with `drop` set. The first process decides for all: a grader's time limit may strike in one alone."""
    golds = {row.problem_id: final_answer(row) for row in rows}

    def reasons() -> list[str | None]:
        with Grader() as grader:

            def is_correct(text: str, gold: str) -> bool:
                return grader.grade(extract(text), gold).correct

            marked = filters.mark(traces, filters_of(config), config.seed, golds, is_correct)
        return [trace.drop for trace in marked]

    return [t.marked(reason) for t, reason in zip(traces, mesh_lib.from_first(reasons), strict=True)]


def filters_of(config: config_lib.Config) -> config_lib.Filters:
    """The filters; a method that learns from right traces alone never keeps a wrong one, whatever they say."""
    method = methods.of(config)
    right = method.graded and method.source == "traces"
    return config.filters.model_copy(update={"correct": True}) if right else config.filters


def check_golds(config: config_lib.Config, rows: list[Row]) -> None:
    """Raises UserError, before any work, if traces or samples will be graded and a row has no answer that parses."""
    if not (filters_of(config).correct or methods.of(config).graded) or config.data is None:
        return
    with Grader() as grader:
        for row in rows:
            gold = final_answer(row)
            problem = "want an answer: traces are graded" if gold is None else grader.check_gold(gold)
            if problem:
                raise UserError(problem, file=config.data.path, row=row.index + 1, field=config.data.columns.answer)
