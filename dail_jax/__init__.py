"""Distribution Aligned Imitation Learning (arXiv 2602.02405) in JAX: `dail_jax.load` opens a model (docs/python.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dail_jax.api import Evaluation, Model, Response, Row, Trace, UserError, load

__all__ = ["Evaluation", "Model", "Response", "Row", "Trace", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """The names above, at first use: importing the package imports neither JAX nor anything else."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dail_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
