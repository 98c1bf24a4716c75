"""Losses over response tokens, in chunks: of the logits [B, T, V], only one chunk exists at a time.

One pass over the chunks computes both the loss and its gradient with respect to the hidden states: within a chunk, the
loss is differentiated with respect to the student's logits, and the unembedding, which is frozen and gets no gradient,
takes the result back to hidden states. The backward pass only scales it, so no chunk is computed twice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dail_jax import mesh as mesh_lib
from dail_jax.model import int8
from dail_jax.model.int8 import Int8, Matrix
from dail_jax.train.methods import BoundLoss

Arrays = dict[str, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(
    loss: BoundLoss,
    chunk: int,
    hidden: jax.Array,
    frozen: Arrays,
    tokens: Arrays,
    weights: jax.Array,
    unembed: Matrix,
) -> tuple[jax.Array, Arrays]:
    """(the weighted sum of the loss over tokens, the same sums of its parts), float32, differentiable in `hidden` alone.

    Args:
      chunk: the most tokens whose logits exist at one time.
      hidden: [B,T,D], the student's final states where response tokens are predicted.
      frozen: [B,T,D] by role, the same of the roles that the loss compares the student with.
      tokens: [B,T] by name, the loss's other arrays.
      weights: [B,T] float32, 0 where there is no response token.
      unembed: [V,D].
    """
    return _over_chunks(loss, chunk, hidden, frozen, tokens, weights, unembed)[0]


def _forward(*args):
    return _over_chunks(*args)


def _backward(loss, chunk, gradient, cotangents):
    return (gradient * cotangents[0].astype(gradient.dtype), None, None, None, None)


summed.defvjp(_forward, _backward)


def _over_chunks(loss, chunk, hidden, frozen, tokens, weights, unembed):
    """((loss, parts), dloss/dhidden) by a scan over chunks of T, with every row in each chunk."""
    b, t, _ = hidden.shape
    width = max(1, min(t, chunk // b))
    count = -(-t // width)
    if isinstance(unembed, Int8):
        unembed = Int8(_constrain(unembed.values, "u_"), _constrain(unembed.scale, "u"))
    else:
        unembed = _constrain(unembed, "u_")

    def split(x):  # [B,T,...] -> [count,B,width,...]
        x = jnp.pad(x, [(0, 0), (0, count * width - t)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(b, count, width, *x.shape[2:]).swapaxes(0, 1)

    def logits(states):
        return _constrain(int8.logits(_constrain(states, "x__"), unembed), "x_u")

    @jax.named_scope("loss_chunk")
    def one_chunk(hidden, frozen, tokens, weights):
        log = {role: jax.nn.log_softmax(logits(states)) for role, states in frozen.items()}

        def of_logits(z):
            m = jax.nn.log_softmax(z)
            value, parts = loss({"student": m, **log}, tokens)
            return value, {**parts, "entropy": -(jnp.exp(m) * m).sum(-1)}

        value, pull_back, parts = jax.vjp(of_logits, logits(hidden), has_aux=True)
        live = weights > 0
        by_logits = jnp.where(live[..., None], pull_back(weights)[0], 0)
        gradient = int8.by_states(by_logits, unembed)
        sums = {name: jnp.where(live, x * weights, 0).sum() for name, x in {"loss": value, **parts}.items()}
        return sums, gradient.astype(hidden.dtype)

    def body(sums, inputs):
        more, gradient = one_chunk(*inputs)
        return jax.tree.map(jnp.add, sums, more), gradient

    chunks = jax.tree.map(split, (hidden, frozen, tokens, weights))
    shapes = jax.eval_shape(lambda: one_chunk(*jax.tree.map(lambda x: x[0], chunks))[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, gradient = jax.lax.scan(body, zeros, chunks)
    gradient = gradient.swapaxes(0, 1).reshape(b, count * width, -1)[:, :t]
    return (sums.pop("loss"), sums), gradient


def cross_entropy(hidden: jax.Array, targets: jax.Array, mask: jax.Array, unembed: Matrix) -> jax.Array:
    """The sum of -log p(target) over unmasked tokens, differentiable in `hidden` and `unembed` alike, for pretraining.

    hidden [B,T,D], targets and mask [B,T], unembed [V,D].
    """
    z = int8.logits(hidden, unembed)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), targets[..., None], -1)[..., 0]
    return jnp.where(mask, nll, 0).sum()


def _constrain(x: jax.Array, axes: str) -> jax.Array:
    """Like `mesh.constrain`, but also shards axes that do not divide evenly, so that logits are never left whole."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, mesh_lib.spec(axes))
