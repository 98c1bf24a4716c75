"""Checks, before any work is done, the names in a configuration that only a registry can verify."""

from __future__ import annotations

from dail_jax import config as config_lib
from dail_jax.data import filters, waypoints
from dail_jax.evaluate import answers
from dail_jax.evaluate.answers import AnswerType
from dail_jax.train import methods


def check(config: config_lib.Config) -> None:
    """Raises UserError for the first name that is not registered."""
    methods.of(config)
    waypoints.named(config.waypoints.extractor)
    filters.chosen(config.filters)
    if config.data:
        answers.named(config.data.answer, "data.answer")
    answer_types(config.evaluate)


def answer_types(cfg: config_lib.Evaluate) -> dict[str, AnswerType]:
    """The answer type of each benchmark, by the benchmark's name."""
    return {b.name: answers.named(b.answer, f"evaluate.benchmarks.{i}.answer") for i, b in enumerate(cfg.benchmarks)}
