"""Waypoints: the coarse intermediate results of an expert solution, which the negative reference is told.

An extractor is a function from a Row to texts in a sensible order; name it in EXTRACTORS and configs can use it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable

from dail_jax import config, latex
from dail_jax.data.formulas import WORDS, mathematical
from dail_jax.data.prose import salient
from dail_jax.data.records import Row
from dail_jax.errors import UserError


def waypoints(row: Row, cfg: config.Waypoints) -> list[str]:
    """The row's waypoints without its final answer, equal ones merged, at most `cfg.limit` spread over all of them."""
    extract = EXTRACTORS.get(cfg.extractor)
    if extract is None:
        near = difflib.get_close_matches(cfg.extractor, EXTRACTORS, 1, 0.0)
        raise UserError(
            f"got {cfg.extractor!r}, want one of {', '.join(EXTRACTORS)}; did you mean {near[0]!r}?",
            field="waypoints.extractor",
        )
    answer = final_answer(row)
    final = _values(answer) if answer else set()
    simplest: dict[Hashable, str] = {}  # in order of first appearance
    for item in dict.fromkeys(extract(row)):
        key = latex.canonical(item)
        if item.strip() and final.isdisjoint(_values(item)) and len(item) < len(simplest.get(key, item + " ")):
            simplest[key] = item
    found = list(simplest.values())
    if cfg.limit and len(found) > cfg.limit:
        last = len(found) - 1
        found = [found[i * last // max(cfg.limit - 1, 1)] for i in range(cfg.limit)]
    return found


def final_answer(row: Row) -> str | None:
    """The row's answer, else what its solution boxes last, else None."""
    return row.answer.strip() if row.answer else latex.last_boxed(row.solution)


_STATES = re.compile(
    r"[=<>]|\\(?:approx|equiv|[lg]eq?|implies|(?:Long|long)?[rR]ightarrow|to)(?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z]{2,}[\s:]|(?<!\\)\$"
)
_FORMULA = re.compile(r"(?<!\\)\$([^$]*)\$")  # inside of prose
_UNIT = re.compile(
    r"\\pmod\s*\{[^{}]*\}|\^\s*\{?\s*\\circ\s*\}?|\\[%$]|%|(?<=\d)\s+(?:[a-zA-Z]+/[a-zA-Z]+|[a-zA-Z]{2,})\s*\Z"
)


def _values(text: str) -> set[Hashable]:
    """Keys of what a text, be it an answer or a waypoint, can be read to state.

    That is all of it, a formula in it, or the end of these behind a relation or a word; and each without its unit, for
    `19.8` gives away `v = 19.8\\text{ m/s}`.
    """
    parts = [text.strip(), *_FORMULA.findall(text)]
    ends = set(parts)
    for part in parts:
        ends |= {part[match.end() :].strip("$ .,;:") for match in _STATES.finditer(part, max(0, len(part) - 80))}
    ends |= {_UNIT.sub(" ", WORDS.sub(_digits, latex.tidy(end))).strip() for end in ends}
    return {latex.canonical(end) for end in ends if end}


def _digits(match: re.Match[str]) -> str:
    return match[1] if match[1].strip().isdecimal() else " "


# ---------------------------------------------------------------------------------------------------
# `reference`: the categories of the reference implementation (method.md), sorted as text
# ---------------------------------------------------------------------------------------------------

_REFERENCE = re.compile(
    r"""(?<![\w.])(?:
        [a-zA-Z]\^\{[^{}]*\}                    # x^{n}
      | (?:\d+\ ?)?[a-zA-Z]\ ?[+-]\ ?\d+(?!\w)  # n+1, 2x+1
      | \d+[a-zA-Z](?![a-zA-Z])                 # 2x
      | -?\d+(?:\.\d+)?                         # numbers
    )""",
    re.VERBOSE,
)


def reference(row: Row) -> list[str]:
    """Numbers, powers, coefficient-variable products and small linear terms, sorted as text."""
    return sorted({match[0] for match in _REFERENCE.finditer(row.solution)})


def given(row: Row) -> list[str]:
    """The row's own waypoints, one a line; raises UserError where it has none."""
    if row.waypoints is None:
        raise UserError(
            "got no waypoints, want one a line, as the extractor 'file' reads them",
            row=row.problem_id,
            field="waypoints",
        )
    return [line.strip() for line in row.waypoints.splitlines() if line.strip()]


EXTRACTORS: dict[str, Callable[[Row], list[str]]] = {
    "reference": reference,
    "math": mathematical,
    "text": salient,
    "file": given,
}
