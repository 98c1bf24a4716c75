"""The filters as a run applies them: with its rows' answers, the grader, and what its method asks for."""

from __future__ import annotations

import collections
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


def grades(config: config_lib.Config) -> bool:
    """Whether traces or samples of the training data are graded."""
    return "wrong" in filters.chosen(filters_of(config)) or methods.of(config).graded


def check_golds(config: config_lib.Config, rows: list[Row]) -> None:
    """Raises UserError for the first row without an answer to grade against, if anything is graded."""
    if config.data and grades(config):
        for problem in golds.problems(config, rows):
            raise problem


def nothing_left(traces: Sequence[Trace], too_long: int, config: config_lib.Config) -> str:
    """Why no trace is trained on: how many are dropped for which reason, and the key that decides it."""
    counts = collections.Counter(filters.reason_of(trace) for trace in traces if trace.drop)
    found = [f"{count} {reason} ({filters.KEYS.get(reason, 'filters.also')})" for reason, count in counts.most_common()]
    found += [f"{too_long} above train.max_tokens={config.train.max_tokens}"] if too_long else []
    return f"nothing to train on: all {len(traces)} traces are dropped: {', '.join(found)}"
