"""What blocks are built of: products with weights and adapters, norms, rotary embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dail_jax.model import int8
from dail_jax.model.int8 import Int8, Matrix

Angles = tuple[jax.Array, jax.Array]  # cos and sin [B,T,1,H/2], float32; fewer where a part of each head is rotated


def linear(x: jax.Array, weights: dict, name: str, pair: tuple[dict, float] | None) -> jax.Array:
    """x [B,T,*inputs] times weight `name` [*inputs,*outputs], plus its bias, plus its LoRA term: [B,T,*outputs]."""
    y = times(x, weights[name])
    if f"{name}_bias" in weights:
        y = y + weights[f"{name}_bias"]
    if pair is not None and name in pair[0]:
        tree, scale = pair
        a, b = tree[name]["a"].astype(x.dtype), tree[name]["b"].astype(x.dtype)
        with jax.named_scope("lora"):
            term = scale * _expand(times(x, a), b)
        y = y + term
    return y


def times(x: jax.Array, w: Matrix) -> jax.Array:
    """x [B,T,*inputs] times w [*inputs,*outputs]. Inputs are flattened first: with two axes XLA may transpose w."""
    if isinstance(w, Int8):
        return int8.times(x, w)
    return jnp.tensordot(x.reshape(*x.shape[:2], -1), w.reshape(-1, *w.shape[x.ndim - 2 :]), 1)


@jax.custom_vjp
def _expand(z: jax.Array, b: jax.Array) -> jax.Array:
    """z [B,T,R] times b [R,*outputs], with a custom gradient.

    JAX's own gradient for b puts the wide cotangent first in the product. XLA on a CPU then transposes it (and
    recomputes it, transposed), which takes 25% of a training step.
    """
    return jnp.tensordot(z, b, 1)


def _expand_backward(saved, g):
    z, b = saved
    by_z = jnp.einsum("bto,ro->btr", g.reshape(*g.shape[:2], -1), b.reshape(b.shape[0], -1))
    return by_z, jnp.tensordot(z, g, ((0, 1), (0, 1)))


_expand.defvjp(lambda z, b: (_expand(z, b), (z, b)), _expand_backward)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, kind: str = "cast") -> jax.Array:
    """Root-mean-square norm in float32, over as many of the last axes as its weight has.

    The weight multiplies what has been cast back to x's type (`cast`), or comes before: `float32`, and `one_plus`, where
    it is the difference from one. In float32 the former two are the same.
    """
    y = x.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + eps)
    if kind == "cast":
        return weight * y.astype(x.dtype)
    scale = weight.astype(jnp.float32)
    return ((1 + scale if kind == "one_plus" else scale) * y).astype(x.dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": gelu_tanh}


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """RoPE on [B,T,N,H] or [B,T,K,H], with halves paired as in Hugging Face; dimensions beyond the angles' are left alone."""
    cos, sin = angles
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    a, b = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
