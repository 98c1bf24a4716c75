"""The train step: each role's states at the response tokens, the loss in chunks, one guarded update of the LoRA."""

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
from dail_jax.train import methods, objectives


@struct.dataclass
class TrainState:
    """What training changes. `step` counts the updates tried, `skipped` the latest ones in a row that were not finite."""

    lora: lora_lib.Lora
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


@dataclass(frozen=True)
class StepSpec:
    """The static arguments of the step's program."""

    model: ModelConfig
    loss: methods.BoundLoss
    roles: tuple[str, ...]  # the roles that the loss compares the student with
    tokens: tuple[str, ...]  # names of the loss's other arrays
    chunk: int
    remat: str
    reduce: str


def spec_of(model: ModelConfig, cfg: config_lib.Train) -> StepSpec:
    method = methods.find(cfg)
    return StepSpec(model, method.bind(cfg), method.roles, tuple(method.tokens), cfg.chunk, cfg.remat, cfg.reduce)


def response_states(
    model: ModelConfig,
    remat: str,
    params: Params,
    lora: lora_lib.Lora | None,
    tokens: jax.Array,
    positions: jax.Array,
    length: int,
) -> jax.Array:
    """Final states [B,T,D] that predict the response, which is the last T = `length` columns of tokens [B,W].

    `positions` [B,W] are -1 on padding.
    """
    hidden = transformer.encode(params, tokens, positions, model, lora=lora, remat=remat)
    start = tokens.shape[1] - length - 1
    return hidden[:, start : start + length]


def make_states(mesh: jax.sharding.Mesh):
    """`response_states`, jitted, with its rows sharded over the mesh."""
    return jax.jit(
        response_states,
        static_argnums=(0, 1, 6),
        out_shardings=mesh_lib.sharding(mesh, "b"),
        compiler_options=mesh_lib.compiler_options(mesh),
    )


def init(
    key: jax.Array, model: ModelConfig, cfg: config_lib.Train, tx: optax.GradientTransformation, mesh
) -> TrainState:
    """A fresh state, laid out over the mesh."""

    def make(key):
        lora = lora_lib.init(key, model, cfg.lora)
        return TrainState(lora, tx.init(lora), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))  # pyright: ignore

    return jax.jit(make, out_shardings=shardings(model, cfg, tx, mesh))(key)


def shardings(model: ModelConfig, cfg: config_lib.Train, tx: optax.GradientTransformation, mesh) -> TrainState:
    """The NamedSharding of every leaf of the state. Moments are sharded like the weights they belong to."""
    lora = lora_lib.shardings(model, cfg.lora, mesh)
    whole = mesh_lib.replicated(mesh)
    shapes = jax.eval_shape(lambda: tx.init(lora_lib.init(jax.random.key(0), model, cfg.lora)))  # pyright: ignore
    opt = optax.tree_map_params(tx, lambda _, where: where, shapes, lora, transform_non_params=lambda _: whole)
    return TrainState(lora, opt, whole, whole)  # pyright: ignore[reportArgumentType]  (a tree of shardings)


def abstract(model: ModelConfig, cfg: config_lib.Train, tx: optax.GradientTransformation, mesh) -> TrainState:
    """Shapes, types and shardings of the state, for restoring checkpoints and for compiling ahead of time."""
    shapes = jax.eval_shape(lambda key: init(key, model, cfg, tx, mesh), jax.random.key(0))
    layout = shardings(model, cfg, tx, mesh)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)


def token_weights(mask: jax.Array, reduce: str) -> jax.Array:
    """Each token's weight [B,T] in an update's loss, before division by `total_weight`, from the mask [B,T].

    `token`: every response token counts the same. `sequence`: every response does, so that long ones weigh no more.
    """
    weights = mask.astype(jnp.float32)
    if reduce == "sequence":
        weights = weights / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    return weights


def total_weight(mask: jax.Array, reduce: str) -> jax.Array:
    """The sum of `token_weights` over an update with mask [A,B,T]: its number of tokens, or of responses."""
    counted = mask.any(-1) if reduce == "sequence" else mask
    return jnp.maximum(counted.sum(), 1).astype(jnp.float32)


def micro_loss(
    lora: lora_lib.Lora | None, spec: StepSpec, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, tuple[objectives.Arrays, jax.Array]]:
    """(the weighted sum of the loss over a micro-batch, (the same sums of its parts, which rows [B] are not finite)).

    `batch` has the arrays [B,...] of `data.batches.Assemble` for one micro-batch; differentiable in `lora`.
    """

    def states_of(lora, role: str) -> jax.Array:
        tokens, positions = batch[f"{role}_tokens"], batch[f"{role}_positions"]
        length = batch["mask"].shape[-1]
        return response_states(spec.model, spec.remat, params, lora, tokens, positions, length)

    with jax.named_scope("student"):
        hidden = states_of(lora, "student")
    frozen: objectives.Arrays = {}
    for role in spec.roles:
        states = batch.get(f"ref_{role}")
        if states is None:
            with jax.named_scope(role):
                states = states_of(None, methods.prompt_of(role))
        frozen[role] = jax.lax.stop_gradient(states).astype(hidden.dtype)
    tokens = {name: batch[name] for name in spec.tokens}
    weights = token_weights(batch["mask"], spec.reduce)
    summed: Any = objectives.summed(
        spec.loss, spec.chunk, hidden, frozen, tokens, weights, transformer.unembedding(params)
    )
    loss, parts = summed
    live = batch["mask"][..., None]
    finite = [jnp.isfinite(jnp.where(live, x, 0)).all((1, 2)) for x in (hidden, *frozen.values())]
    return loss, (parts, ~jnp.stack(finite).all(0))


def gradients(
    spec: StepSpec, params: Params, lora: lora_lib.Lora, batch: dict[str, jax.Array]
) -> tuple[lora_lib.Lora, objectives.Arrays, jax.Array]:
    """(the gradient in the LoRA of a batch's mean loss, the mean loss and parts, which rows [A,B] are not finite).

    `batch` has the arrays of `data.batches.Assemble`, [A,B,...]. The mean is over the whole batch, as `spec.reduce`
    defines it, whatever A and the devices.
    """
    count = total_weight(batch["mask"], spec.reduce)

    def accumulate(grads, one):
        (loss, (parts, bad)), more = jax.value_and_grad(micro_loss, has_aux=True)(lora, spec, params, one)
        return jax.tree.map(jnp.add, grads, more), ({"loss": loss, **parts}, bad)

    zeros = jax.tree.map(jnp.zeros_like, lora)
    if batch["mask"].shape[0] == 1:  # no loop: XLA then counts and overlaps everything
        grads, (sums, bad) = accumulate(zeros, {k: v[0] for k, v in batch.items()})
        bad = bad[None]
    else:
        grads, (sums, bad) = jax.lax.scan(accumulate, zeros, batch)
    grads = jax.tree.map(lambda g: g / count, grads)
    return grads, {name: x.sum() / count for name, x in sums.items()}, bad


def make_loss(spec: StepSpec, mesh: jax.sharding.Mesh):
    """Two jitted functions of (params, lora, batch), for batches of one micro-batch, [1,B,...].

    The first returns (mean loss, means of its parts) and is differentiable in `lora`; the second returns `gradients`.
    Both may be called while JAX traces, where no mesh can be set, so they bring theirs.
    """

    def loss(params: Params, lora: lora_lib.Lora, batch: dict[str, jax.Array]):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            count = total_weight(batch["mask"], spec.reduce)
            total, (parts, _) = micro_loss(lora, spec, params, {k: v[0] for k, v in batch.items()})
            return total / count, {name: x / count for name, x in parts.items()}

    def gradient(params: Params, lora: lora_lib.Lora, batch: dict[str, jax.Array]):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradients(spec, params, lora, batch)

    # Whoever differentiates the loss makes it part of another program, and only whole programs have options.
    return jax.jit(loss), jax.jit(gradient, compiler_options=mesh_lib.compiler_options(mesh))


def make_update(spec: StepSpec, tx: optax.GradientTransformation, layout: TrainState):
    """A jitted (params, state, batch) -> (state, metrics) with the state donated: one step down `gradients`.

    An update that is not finite changes the counters alone.
    """

    @jax.named_scope("train_step")
    def update(params: Params, state: TrainState, batch: dict[str, jax.Array]):
        grads, metrics, bad = gradients(spec, params, state.lora, batch)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.lora)  # pyright: ignore
            lora = optax.apply_updates(state.lora, updates)  # pyright: ignore
        fresh = TrainState(lora, opt_state, state.step, state.skipped)  # pyright: ignore
        kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), fresh, state)
        kept = kept.replace(step=state.step + 1, skipped=jnp.where(ok, 0, state.skipped + 1))
        tokens = batch["mask"].sum().astype(jnp.float32)
        return kept, {**metrics, "grad_norm": norm, "tokens": tokens, "finite": ok, "bad_rows": bad}

    whole = jax.tree.leaves(layout.step)[0]
    options = mesh_lib.compiler_options(whole.mesh)
    return jax.jit(update, donate_argnums=1, out_shardings=(layout, whole), compiler_options=options)
