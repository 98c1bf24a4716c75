"""Filters: which traces are trained on, and why the others are not."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable
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
            raise UserError(
                f"got no answer for problem {trace['problem_id']!r}, want one to grade its traces",
                field="filters.correct",
            )
        if not is_correct(trace["text"], gold):
            return "wrong"
    return None


def keep(traces: list[dict[str, Any]], cfg: config.Filters, seed: int) -> list[dict[str, Any]]:
    """The traces with `drop` set to `surplus` where a problem has more than `cfg.keep` that are not dropped already.

    Its first ones are kept, or with `cfg.choose: random` those that `seed` picks. The order stays.
    """

    def rank(index: int):
        if cfg.choose == "first":
            return index
        return hashlib.sha256(f"{seed}/{traces[index]['problem_id']}/{traces[index]['sample']}".encode()).digest()

    left: dict[str, int] = collections.defaultdict(lambda: len(traces) if cfg.keep == "all" else cfg.keep)
    out = list(traces)
    for index in sorted((i for i, trace in enumerate(traces) if trace["drop"] is None), key=rank):
        left[traces[index]["problem_id"]] -= 1
        if left[traces[index]["problem_id"]] < 0:
            out[index] = {**traces[index], "drop": "surplus"}
    return out


def repetition(ids: list[int]) -> float:
    """The share of a response's 8-grams that occurred in it before; 0 for a response without any."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
