"""What blocks are built of: products with weights and adapters, norms, rotary embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Angles = tuple[jax.Array, jax.Array]  # cos and sin [B,T,1,H/2], float32; fewer where a part of each head is rotated


def linear(x: jax.Array, weights: dict, name: str, pair: tuple[dict, float] | None) -> jax.Array:
    """x [B,T,*inputs] times weight `name` [*inputs,*outputs], plus its bias, plus its LoRA term: [B,T,*outputs]."""
    y = times(x, weights[name])
    if f"{name}_bias" in weights:
        y = y + weights[f"{name}_bias"]
    if pair is not None and name in pair[0]:
        tree, scale = pair
        a, b = tree[name]["a"].astype(x.dtype), tree[name]["b"].astype(x.dtype)
        y = y + scale * _expand(times(x, a), b)
    return y


def times(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B,T,*inputs] times w [*inputs,*outputs]. Inputs are flattened first: with two axes XLA may transpose w."""
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


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, centred: bool = False) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32; with `centred` it multiplies by 1 + weight."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return ((1 + weight.astype(jnp.float32)) * y).astype(x.dtype) if centred else weight * y.astype(x.dtype)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """RoPE on [B,T,N,H] or [B,T,K,H], with halves paired as in Hugging Face."""
    cos, sin = angles
    size = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (size, 2 * size), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)
