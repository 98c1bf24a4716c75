"""Waypoints: the coarse intermediate results of an expert solution, which the negative reference is given.

An extractor is a function from a Row to texts in a sensible order; once it is in EXTRACTORS, configs can name it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable

from dail_jax import config, latex
from dail_jax.data.formulas import WORDS, collapsed, mathematical
from dail_jax.data.prose import salient
from dail_jax.data.records import Row
from dail_jax.errors import UserError, registered


def waypoints(row: Row, cfg: config.Waypoints) -> list[str]:
    """The waypoints of a row's (first) solution, each once and without the final answer: the row's own, or the extractor's.

    At most `cfg.limit`, spread evenly over all of them.
    """
    extract = named(cfg.extractor) if row.waypoints is None else given
    answer = final_answer(row)
    final = _values(answer) if answer else set()
    found = [item for item in dict.fromkeys(extract(row)) if item.strip() and final.isdisjoint(_values(item))]
    if cfg.limit and len(found) > cfg.limit:
        last = len(found) - 1
        found = [found[i * last // max(cfg.limit - 1, 1)] for i in range(cfg.limit)]
    return found


def named(name: str) -> Callable[[Row], list[str]]:
    """The extractor of that name; raises UserError for one that is not registered."""
    return registered(EXTRACTORS, name, "waypoints.extractor")


def final_answer(row: Row) -> str | None:
    """The row's answer, otherwise the last box in its solution, otherwise None."""
    return row.answer.strip() if row.answer else latex.last_boxed(row.solution)


_STATES = re.compile(
    r"[=<>]|\\(?:approx|equiv|[lg]eq?|implies|(?:Long|long)?[rR]ightarrow|to)(?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z]{2,}[\s:]|(?<!\\)\$"
)
_FORMULA = re.compile(r"(?<!\\)\$([^$]*)\$")  # inside prose
_UNIT = re.compile(
    r"\\pmod\s*\{[^{}]*\}|\^\s*\{?\s*\\circ\s*\}?|\\[%$]|%|(?<=\d)\s+(?:[a-zA-Z]+/[a-zA-Z]|[a-zA-Z]{2})(?s:.*)\Z"
)


def _values(text: str) -> set[Hashable]:
    """The keys of every value that a text, an answer or a waypoint, can be read to state.

    These are the values of the text as such, of each formula in it, and of what follows a relation or a word near the end
    of either, each with and without its unit, since `v = 19.8\\text{ m/s}` gives away `19.8`.
    """
    text = collapsed(text).strip()
    parts = [text, *_FORMULA.findall(text)]
    ends = set(parts)
    for part in parts:
        ends |= {part[match.end() :].strip("$ .,;:") for match in _STATES.finditer(part, max(0, len(part) - 80))}
    ends |= {_UNIT.sub(" ", WORDS.sub(_digits, latex.tidy(end))).strip() for end in ends}
    return {latex.canonical(end) for end in ends if end}


def _digits(match: re.Match[str]) -> str:
    return match[1] if match[1].strip().isdecimal() else " "


# ---------------------------------------------------------------------------------------------------
# `reference`: the categories of the paper's reference implementation, sorted as text
# ---------------------------------------------------------------------------------------------------

# A number or a term must not touch a letter, digit or underscore; a power may be anywhere. No character is scanned twice,
# since every run of characters is matched possessively.
_NUMBER = re.compile(
    r"""(?<!\w)[-+]?
    (?: \d*+\.\d++ (?:[eE][-+]?\d++)?+ (?!\w)  # 3.5, .5, 1.5e-3
      | \d++ (?:[eE][-+]?\d++)?+ (?!\w)  # 12, 2e6; of 3.5cm, the 3
    )""",
    re.VERBOSE,
)
_POWER = re.compile(  # x^2, 2^{10}, e^{-x}; of x^{a b}, x^{a; of (n+1)^2, nothing
    r"""(?<![a-zA-Z0-9.])[a-zA-Z0-9.]++ \^ \{?+ [a-zA-Z0-9.+-]++ \}?+""",
    re.VERBOSE,
)
_TERM = re.compile(  # a letter, optionally with a coefficient before it and a constant after it
    r"""(?<!\w)(?P<product> \d*+[a-zA-Z] ) (?!\w) (?: [-+]\d++(?!\w) )?+""",
    re.VERBOSE,
)


def reference(row: Row) -> list[str]:
    """Numbers, powers, coefficient-variable products and small linear terms, each once, sorted as text.

    They overlap, as in the reference implementation: `2x+1` comes with `2x` and `1`.
    """
    found = {match[0] for pattern in (_NUMBER, _POWER) for match in pattern.finditer(row.solution)}
    for term in _TERM.finditer(row.solution):
        found.update(text for text in (term["product"], term[0]) if len(text) > 1)
    return sorted(found)


def given(row: Row) -> list[str]:
    """The row's own waypoints, one per line; raises UserError if it has none."""
    if row.waypoints is None:
        raise UserError(
            "got no waypoints, want one per line, as the extractor 'file' reads them",
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
