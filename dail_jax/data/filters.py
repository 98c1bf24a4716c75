"""Filters: which traces are trained on, and why the others are not."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Mapping, Sequence

from dail_jax import config
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError
from dail_jax.text import mention

GRAM = 8  # tokens


def mark(
    traces: Sequence[Trace],
    cfg: config.Filters,
    seed: int,
    golds: Mapping[str, str | None],
    is_correct: Callable[[str, str], bool],
) -> list[Trace]:
    """The traces with `drop` set anew, in the same order: the only place that decides what is dropped, and why.

    `golds` has the answers by problem id; `is_correct(text, gold)` grades. A trace that passes the filters by itself is
    still `surplus` if its problem has `cfg.keep` others: the first ones are kept, or with `cfg.choose: random` those
    that `seed` picks. Raises UserError if `cfg.correct` asks for grades and there is no answer.
    """
    marked = [t.marked(drop_reason(t, cfg, golds[t.problem_id], is_correct)) for t in traces]

    def rank(index: int):
        if cfg.choose == "first":
            return index
        return hashlib.sha256(f"{seed}/{marked[index].name}".encode()).digest()

    left: dict[str, int] = collections.defaultdict(lambda: len(marked) if cfg.keep == "all" else cfg.keep)
    for index in sorted((i for i, t in enumerate(marked) if t.drop is None), key=rank):
        left[marked[index].problem_id] -= 1
        if left[marked[index].problem_id] < 0:
            marked[index] = marked[index].marked("surplus")
    return marked


def drop_reason(
    trace: Trace, cfg: config.Filters, gold: str | None, is_correct: Callable[[str, str], bool]
) -> str | None:
    """Why a trace is dropped, whatever the others: `unfinished`, `short`, `artefact: PHRASE`, `repetition` or `wrong`.

    None if it is kept. Grading comes last because it costs most.
    """
    if cfg.finished and trace.finish != "stop":
        return "unfinished"
    if len(trace.response_ids) < cfg.min_tokens:
        return "short"
    if phrase := mention(trace.text, cfg.artefacts):
        return f"artefact: {phrase}"
    if repetition(trace.response_ids) > cfg.max_repetition:
        return "repetition"
    if cfg.correct:
        if gold is None:
            raise UserError(
                f"got no answer for problem {trace.problem_id!r}, want one to grade its traces",
                field="filters.correct",
            )
        if not is_correct(trace.text, gold):
            return "wrong"
    return None


def repetition(ids: Sequence[int]) -> float:
    """The share of a response's 8-grams that occurred in it before; 0 for a response without any."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
