"""The optimisers and schedules that a configuration can name, from optax."""

from __future__ import annotations

import jax
import optax

from dail_jax import config as config_lib
from dail_jax.model.families import ModelConfig
from dail_jax.model.weights import declare


def schedule(cfg: config_lib.Optimizer, steps: int, peak: float | None = None) -> optax.Schedule:
    """The learning rate by update: a linear warm-up, then a linear decay to 0, a constant, or one and then the other.

    `peak` takes the place of `cfg.learning_rate`.
    """
    peak = cfg.learning_rate if peak is None else peak
    warmup = min(cfg.warmup_steps, max(steps - 1, 0))
    parts = [optax.linear_schedule(peak / (warmup + 1), peak, warmup)] if warmup else []
    joints = [warmup] if warmup else []
    if cfg.schedule == "constant":
        parts.append(optax.constant_schedule(peak))
    elif cfg.schedule == "linear":
        parts.append(optax.linear_schedule(peak, 0.0, max(steps - warmup, 1)))
    else:
        decay = max(int(steps * cfg.decay_fraction), 1)
        parts += [optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, decay)]
        joints.append(max(steps - decay, warmup))
    return optax.join_schedules(parts, joints)


def adamw(cfg: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW on gradients clipped by their global norm."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.adamw(schedule(cfg, steps), cfg.b1, cfg.b2, weight_decay=cfg.weight_decay),
    )


def for_all_weights(cfg: config_lib.Optimizer, steps: int, model: ModelConfig) -> optax.GradientTransformation:
    """The optimiser for training all weights: AdamW, or Muon on linear maps and Adam on the rest."""
    if cfg.name == "adamw":
        return adamw(cfg, steps)
    table = declare(model)

    def dimensions(params):
        def one(path, _):
            weight = table[path[-1].key]
            if not weight.inputs:
                return None
            axes = range(1, 1 + len(weight.axes))  # axis 0 is the layers
            return optax.contrib.MuonDimensionNumbers(tuple(axes[: weight.inputs]), tuple(axes[weight.inputs :]))

        return jax.tree_util.tree_map_with_path(one, params)

    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.contrib.muon(
            schedule(cfg, steps, cfg.matrix_learning_rate),
            weight_decay=cfg.weight_decay,
            adam_learning_rate=schedule(cfg, steps),
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            muon_weight_dimension_numbers=dimensions,
        ),
    )
