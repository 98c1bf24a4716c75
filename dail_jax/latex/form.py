"""The canonical form of a formula: a key that equal values share."""

from __future__ import annotations

import re
from collections.abc import Hashable

from dail_jax.latex.scan import split_top, tidy
from dail_jax.latex.value import MAX_LENGTH, polynomial


def canonical(formula: str) -> Hashable:
    """A key that is equal for equal values: exact for polynomials over square roots, else the bare characters."""
    poly = polynomial(formula)
    if poly is not None:
        return frozenset(poly.items())
    text = re.sub(r"\s+", "", tidy(formula))
    if len(text) <= MAX_LENGTH and re.fullmatch(r"\(.*,.*\)", text):
        return tuple(canonical(part) for part in split_top(text[1:-1], ","))
    return re.sub(r"\{(.)\}", r"\1", text)
