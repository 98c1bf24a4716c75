"""The train step: three roles' states at the response tokens, the chunked loss, one guarded update of the LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.model import lora as lora_lib
from dail_jax.model import transformer
from dail_jax.model.families import ModelConfig
from dail_jax.model.weights import Params
from dail_jax.train import objectives

REFERENCES = ("privileged", "negative")


@struct.dataclass
class State:
    """What training changes. `step` counts updates tried, `skipped` those in a row that were not finite."""

    lora: lora_lib.Lora
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


@dataclass(frozen=True)
class Recipe:
    """What is static in a step's program."""

    model: ModelConfig
    objective: objectives.Objective
    chunk: int
    remat: str


def recipe(model: ModelConfig, cfg: config_lib.Train) -> Recipe:
    if cfg.objective in ("dail", "onpolicy"):
        objective = objectives.Objective("dail", cfg.gamma, cfg.kl == "forward")
    elif cfg.objective in ("grpo", "nurl"):
        objective = objectives.Objective("grpo", clip=cfg.online.clip, kl=cfg.online.kl)
    else:
        objective = objectives.Objective("nll")
    return Recipe(model, objective, cfg.chunk, cfg.remat)


def response_states(
    recipe: Recipe, params: Params, lora: lora_lib.Lora | None, tokens: jax.Array, positions: jax.Array, length: int
) -> jax.Array:
    """Final states [B, length, D] that predict the response, the last `length` columns of tokens [B, W]."""
    hidden = transformer.encode(params, tokens, positions, recipe.model, lora=lora, remat=recipe.remat)
    start = tokens.shape[1] - length - 1
    return hidden[:, start : start + length]


def make_states(mesh: jax.sharding.Mesh):
    """`response_states` jitted, rows laid out over the mesh."""
    return jax.jit(
        response_states,
        static_argnums=(0, 5),
        out_shardings=mesh_lib.sharding(mesh, "b"),
        compiler_options=mesh_lib.compiler_options(mesh),
    )


def init(key: jax.Array, model: ModelConfig, cfg: config_lib.Train, tx: optax.GradientTransformation, mesh) -> State:
    """A fresh state, laid out over the mesh."""

    def make(key):
        lora = lora_lib.init(key, model, cfg.lora)
        return State(lora, tx.init(lora), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))  # pyright: ignore

    return jax.jit(make, out_shardings=shardings(model, cfg, tx, mesh))(key)


def shardings(model: ModelConfig, cfg: config_lib.Train, tx: optax.GradientTransformation, mesh) -> State:
    """The NamedSharding of every leaf of the state: moments lie as the weights that they belong to."""
    lora = lora_lib.shardings(model, cfg.lora, mesh)
    whole = mesh_lib.replicated(mesh)
    shapes = jax.eval_shape(lambda: tx.init(lora_lib.init(jax.random.key(0), model, cfg.lora)))  # pyright: ignore
    opt = optax.tree_map_params(tx, lambda _, where: where, shapes, lora, transform_non_params=lambda _: whole)
    return State(lora, opt, whole, whole)  # pyright: ignore[reportArgumentType]  (a tree of shardings)


def make_update(recipe: Recipe, tx: optax.GradientTransformation, layout: State):
    """A jitted (params, state, batch) -> (state, metrics) with the state donated.

    batch: arrays of `data.batches.Assemble`, [A, b, ...]. The gradient is of the token mean over the whole
    batch, whatever A and the devices. An update that is not finite leaves everything but the counters as it was.
    """

    def micro(lora, params, batch):
        length = batch["mask"].shape[-1]
        hidden = response_states(recipe, params, lora, batch["student_tokens"], batch["student_positions"], length)
        extras: objectives.Arrays
        if recipe.objective.kind == "nll":
            extras = {"targets": batch["targets"]}
        elif recipe.objective.kind == "grpo":
            base = response_states(recipe, params, None, batch["student_tokens"], batch["student_positions"], length)
            extras = {"base": jax.lax.stop_gradient(base), **{k: batch[k] for k in ("targets", "logq", "advantage")}}
        else:
            extras = {}
            for role in REFERENCES:
                states = batch.get(f"ref_{role}")
                if states is None:
                    states = response_states(
                        recipe, params, None, batch[f"{role}_tokens"], batch[f"{role}_positions"], length
                    )
                extras[role] = jax.lax.stop_gradient(states).astype(hidden.dtype)
        summed: Any = objectives.summed(
            recipe.objective, recipe.chunk, hidden, extras, batch["mask"], transformer.unembedding(params)
        )
        loss, parts = summed
        live, states = batch["mask"][..., None], [hidden, *(x for x in extras.values() if x.ndim == 3)]
        bad = ~jnp.stack([jnp.isfinite(jnp.where(live, x, 0)).all((1, 2)) for x in states]).all(0)
        return loss, (parts, bad)

    def update(params: Params, state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        count = jnp.maximum(batch["mask"].sum(), 1).astype(jnp.float32)

        def accumulate(grads, one):
            (loss, (parts, bad)), more = jax.value_and_grad(micro, has_aux=True)(state.lora, params, one)
            return jax.tree.map(jnp.add, grads, more), ({"loss": loss, **parts}, bad)

        zeros = jax.tree.map(jnp.zeros_like, state.lora)
        if batch["mask"].shape[0] == 1:  # no loop: XLA then counts and overlaps everything
            grads, (sums, bad) = accumulate(zeros, {k: v[0] for k, v in batch.items()})
            bad = bad[None]
        else:
            grads, (sums, bad) = jax.lax.scan(accumulate, zeros, batch)
        grads = jax.tree.map(lambda g: g / count, grads)
        metrics = {name: x.sum() / count for name, x in sums.items()}
        norm = optax.global_norm(grads)
        ok = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        updates, opt_state = tx.update(grads, state.opt_state, state.lora)  # pyright: ignore
        fresh = State(optax.apply_updates(state.lora, updates), opt_state, state.step, state.skipped)  # pyright: ignore
        kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), fresh, state)
        kept = kept.replace(step=state.step + 1, skipped=jnp.where(ok, 0, state.skipped + 1))
        return kept, {**metrics, "grad_norm": norm, "tokens": count, "finite": ok, "bad_rows": bad}

    whole = jax.tree.leaves(layout.step)[0]
    options = mesh_lib.compiler_options(whole.mesh)
    return jax.jit(update, donate_argnums=1, out_shardings=(layout, whole), compiler_options=options)
