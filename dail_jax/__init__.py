"""Distribution Aligned Imitation Learning (arXiv 2602.02405) in JAX."""

__version__ = "0.1.0"
