"""The filters as a run applies them: with its rows' answers, the grader, and what its method asks for."""

from __future__ import annotations

from collections.abc import Sequence

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.data import filters
from dail_jax.data.records import Row
from dail_jax.data.traces import Trace
from dail_jax.evaluate.grading import Grader
from dail_jax.stages import golds
from dail_jax.train import methods


def mark(traces: Sequence[Trace], rows: list[Row], config: config_lib.Config) -> list[Trace]:
    """The traces with `drop` set. The first process decides for all: a grader's time limit may strike in one alone."""
    cfg, kind = filters_of(config), golds.answer_type(config)

    def context(row: Row, grader: Grader) -> filters.Context:
        gold = golds.gold_of(row, kind)
        is_correct = None if gold is None else lambda text: golds.is_correct(grader, text, gold, kind)
        return filters.Context(cfg, row, is_correct)

    def reasons() -> list[str | None]:
        with Grader() as grader:
            contexts = {row.problem_id: context(row, grader) for row in rows}
            return [trace.drop for trace in filters.mark(traces, contexts, cfg, config.seed)]

    return [t.marked(reason) for t, reason in zip(traces, mesh_lib.from_first(reasons), strict=True)]


def filters_of(config: config_lib.Config) -> config_lib.Filters:
    """The section `filters`, with `correct` set for a method that learns from right traces only."""
    method = methods.of(config)
    right = method.graded and method.source == "traces"
    return config.filters.model_copy(update={"correct": True}) if right else config.filters


def check_golds(config: config_lib.Config, rows: list[Row]) -> None:
    """Raises UserError if traces or samples will be graded and a row has no answer to grade against."""
    if config.data and ("wrong" in filters.chosen(filters_of(config)) or methods.of(config).graded):
        golds.check(config, rows)
