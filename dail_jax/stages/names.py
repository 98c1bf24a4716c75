"""The names in a configuration that only a registry can verify."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dail_jax import config as config_lib
from dail_jax.data import filters, waypoints
from dail_jax.errors import UserError
from dail_jax.evaluate import answers
from dail_jax.evaluate.answers import AnswerType
from dail_jax.train import methods


def problems(config: config_lib.Config) -> Iterator[UserError]:
    """An error for every name that is not registered, and for what a method says of its settings."""
    looks: list[Callable[[], Any]] = [
        lambda: methods.of(config),
        lambda: waypoints.named(config.waypoints.extractor),
        lambda: filters.chosen(config.filters),
        lambda: config.data and answers.named(config.data.answer, "data.answer"),
        lambda: answer_types(config.evaluate),
    ]
    for look in looks:
        try:
            look()
        except UserError as error:
            yield error


def check(config: config_lib.Config) -> None:
    """Raises UserError for the first name that is not registered."""
    for problem in problems(config):
        raise problem


def answer_types(cfg: config_lib.Evaluate) -> dict[str, AnswerType]:
    """The answer type of each benchmark, by the benchmark's name."""
    return {b.name: answers.named(b.answer, f"evaluate.benchmarks.{i}.answer") for i, b in enumerate(cfg.benchmarks)}
