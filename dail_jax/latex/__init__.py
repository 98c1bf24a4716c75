"""LaTeX as people and models write it: a scanner, spellings, exact values, and canonical forms.

Waypoints, answers and grading all read LaTeX through this package, so that a text means the same to each of them.
"""

from dail_jax.latex.form import canonical
from dail_jax.latex.scan import Box, boxes, last_boxed, spans, split_top, unbox
from dail_jax.latex.spell import plain, signs, tidy
from dail_jax.latex.value import approximate, is_closed, polynomial

__all__ = [
    "Box",
    "approximate",
    "boxes",
    "canonical",
    "is_closed",
    "last_boxed",
    "plain",
    "polynomial",
    "signs",
    "spans",
    "split_top",
    "tidy",
    "unbox",
]
