"""Filters: which traces are trained on, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dail_jax import config
from dail_jax.errors import UserError
from dail_jax.text import mention

GRAM = 8  # tokens


def drop_reason(
    trace: dict[str, Any],
    cfg: config.Filters,
    gold: str | None = None,
    is_correct: Callable[[str, str], bool] | None = None,
) -> str | None:
    """Why a trace is dropped: `unfinished`, `short`, `artefact: PHRASE`, `repetition` or `wrong`; None = it is kept.

    `trace` is a row of traces.jsonl (response_ids, text, finish); `is_correct(text, gold)` grades, last because it
    costs most. Raises UserError where `cfg.correct` asks for grades and the row has no answer.
    """
    if cfg.finished and trace["finish"] != "stop":
        return "unfinished"
    if len(trace["response_ids"]) < cfg.min_tokens:
        return "short"
    if phrase := mention(trace["text"], cfg.artefacts):
        return f"artefact: {phrase}"
    if repetition(trace["response_ids"]) > cfg.max_repetition:
        return "repetition"
    if cfg.correct:
        if gold is None or is_correct is None:
            raise UserError(f"got no answer for problem {trace['problem_id']!r}, want one to grade its traces",
                            field="filters.correct")  # fmt: skip
        if not is_correct(trace["text"], gold):
            return "wrong"
    return None


def keep(traces: Iterable[dict[str, Any]], cfg: config.Filters) -> list[dict[str, Any]]:
    """The traces with `drop` set to `duplicate` where `cfg.keep` is `first` and an earlier trace of the same problem
    is kept; traces that are dropped already do not count. The order stays."""
    if cfg.keep == "all":
        return list(traces)
    kept: set[str] = set()
    marked = []
    for trace in traces:
        duplicate = trace["drop"] is None and trace["problem_id"] in kept
        if trace["drop"] is None:
            kept.add(trace["problem_id"])
        marked.append({**trace, "drop": "duplicate"} if duplicate else trace)
    return marked


def repetition(ids: list[int]) -> float:
    """The share of a response's 8-grams that occurred in it before; 0 for a response without any."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
