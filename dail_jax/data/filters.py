"""Filters: which traces are trained on, and why the others are not.

A filter is a function of a trace; once it is in FILTERS, configurations can name it. docs/extending.md shows one from
outside this package.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dail_jax import config
from dail_jax.data.records import Row
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError, registered
from dail_jax.text import mention

GRAM = 8  # tokens


@dataclass(frozen=True)
class Context:
    """What a filter may look at besides the trace."""

    cfg: config.Filters
    row: Row  # the problem, with its expert solution
    is_correct: Callable[[str], bool] | None = None  # grades a text; None where the row has no answer

    def of(self, trace: Trace) -> Context:
        """The same with the one solution that the trace was drawn with."""
        return dataclasses.replace(self, row=self.row.views[trace.solution or 0])


# Returns None for a trace to keep, otherwise why it is dropped, which may be empty.
Filter = Callable[[Trace, Context], str | None]


def drop_reason(trace: Trace, context: Context) -> str | None:
    """Why a trace is dropped, whatever the others: `FILTER` or `FILTER: DETAIL`, of the first filter that drops it."""
    for name, drops in chosen(context.cfg).items():
        detail = drops(trace, context)
        if detail is not None:
            return f"{name}: {detail}" if detail else name
    return None


def reason_of(trace: Trace) -> str:
    """The name of the filter that dropped a trace."""
    return (trace.drop or "").split(":")[0]


def chosen(cfg: config.Filters) -> dict[str, Filter]:
    """The filters that a configuration asks for, by name and in order: `wrong` comes last, since it costs most.

    Raises UserError for one that is not registered.
    """
    names = [*["unfinished"] * cfg.finished, "short", "artefact", "repetition", *cfg.also, *["wrong"] * cfg.correct]
    ordered = sorted(dict.fromkeys(names), key=lambda name: name == "wrong")
    return {name: registered(FILTERS, name, "filters.also") for name in ordered}


def mark(traces: Sequence[Trace], contexts: Mapping[str, Context], cfg: config.Filters, seed: int) -> list[Trace]:
    """The traces with `drop` set anew, in the same order: the only place that decides what is dropped, and why.

    `contexts` are by problem id. A trace that passes the filters by itself is still `surplus` if its problem has
    `cfg.keep` others: the first ones are kept, or with `cfg.choose: random` those that `seed` picks. Raises UserError
    for a filter that is not registered, and if `wrong` is asked of a row without an answer.
    """
    marked = [t.marked(drop_reason(t, contexts[t.problem_id].of(t))) for t in traces]

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


# ---------------------------------------------------------------------------------------------------
# The filters
# ---------------------------------------------------------------------------------------------------


def unfinished(trace: Trace, context: Context) -> str | None:
    return None if trace.finish == "stop" else ""


def short(trace: Trace, context: Context) -> str | None:
    return "" if len(trace.response_ids) < context.cfg.min_tokens else None


def artefact(trace: Trace, context: Context) -> str | None:
    return mention(trace.text, context.cfg.artefacts)


def repetitive(trace: Trace, context: Context) -> str | None:
    return "" if repetition(trace.response_ids) > context.cfg.max_repetition else None


def repetition(ids: Sequence[int]) -> float:
    """The share of a response's 8-grams that occurred in it before; 0 for a response without any."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def wrong(trace: Trace, context: Context) -> str | None:
    if context.is_correct is None:
        raise UserError(
            f"got no answer for problem {trace.problem_id!r}, want one to grade its traces", field="filters.correct"
        )
    return None if context.is_correct(trace.text) else ""


# The keys of the configuration that decide what our own filters drop.
KEYS = {
    "unfinished": "filters.finished, generate.sampling.max_tokens",
    "short": "filters.min_tokens",
    "artefact": "filters.artefacts",
    "repetition": "filters.max_repetition",
    "wrong": "filters.correct",
    "surplus": "filters.keep",
}

FILTERS: dict[str, Filter] = {
    "unfinished": unfinished,
    "short": short,
    "artefact": artefact,
    "repetition": repetitive,
    "wrong": wrong,
}
