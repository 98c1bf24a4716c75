"""The command line with an objective that benchmarks/study.py compares and the package does without.

python benchmarks/study_methods.py run --config FILE train.objective=scheduled
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from dail_jax import launch
from dail_jax.stages import train
from dail_jax.train.methods import CONTRAST, METHODS, Method, contrast, sharpened


def scheduled(log, tokens, cfg):
    """From sharp's loss, at the start of training, to dail's at its end, in equal steps."""
    forward, _ = sharpened(log, tokens, cfg)
    reverse, parts = contrast(log, tokens, cfg)
    return (1 - tokens["progress"]) * forward + tokens["progress"] * reverse, parts


class Scheduled(Method):
    """A method whose loss also gets `progress` [B,T], the share of training that is done."""

    @property
    def tokens(self):
        return {**super().tokens, "progress": jnp.float32}


class Epochs(train.Epochs):
    """Batches with `progress`."""

    def next(self, step, state, interrupt):
        batch = super().next(step, state, interrupt)
        progress = np.full(batch.arrays["targets"].shape, step / self.steps, np.float32)
        return dataclasses.replace(batch, arrays={**batch.arrays, "progress": progress})


METHODS["scheduled"] = Scheduled("scheduled", "traces", scheduled, CONTRAST, settings={"temperature": 1.0})
train.Epochs = Epochs

if __name__ == "__main__":
    raise SystemExit(launch.main())
