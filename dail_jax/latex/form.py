"""The canonical form of a formula: a key that is the same for all formulas of equal value."""

from __future__ import annotations

import re
from collections.abc import Hashable

from dail_jax.latex.scan import split_top
from dail_jax.latex.spell import tidy
from dail_jax.latex.value import MAX_LENGTH, polynomial

_RELATION = re.compile(r"(<=|>=|[=<>]|\\(?:[lg]eq?|neq?|equiv|approx)(?![a-zA-Z]))")


def canonical(formula: str) -> Hashable:
    """A key for a formula's value: exact for polynomials over square roots, otherwise made of its characters.

    Formulas of different values never share a key. A statement such as `x = 3` is not the same as the value 3: its key
    holds every side and the relations between them. Pairs and longer tuples are keyed part by part.
    """
    poly = polynomial(formula)
    if poly is not None:
        return frozenset(poly.items())
    text = tidy(formula)
    if len(text) <= MAX_LENGTH:
        if re.fullmatch(r"\(.*,.*\)", text):
            return tuple(canonical(part) for part in split_top(text[1:-1], ","))
        sides = _RELATION.split(text)
        if len(sides) > 1 and all(_is_balanced(side) for side in sides[::2]):
            return ("statement", *(side if i % 2 else canonical(side) for i, side in enumerate(sides)))
    return re.sub(r"\{(.)\}", r"\1", re.sub(r"(?<![0-9]) | (?![0-9])", "", text))


def _is_balanced(side: str) -> bool:
    depth = 0
    for char in side:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return False
    return depth == 0
