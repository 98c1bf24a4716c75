"""LaTeX as people and models write it: a scanner, exact values, and canonical forms.

Waypoints, answers and grading all read LaTeX through this package, so that a text means the same to all of them.
"""

from dail_jax.latex.form import canonical
from dail_jax.latex.scan import boxes, last_boxed, pairs, signs, spans, split_top, tidy, unbox
from dail_jax.latex.value import is_closed, polynomial

__all__ = [
    "boxes",
    "canonical",
    "is_closed",
    "last_boxed",
    "pairs",
    "polynomial",
    "signs",
    "spans",
    "split_top",
    "tidy",
    "unbox",
]
