"""Keys and values of a sampler's cache in eight bits, with a scale for each token and head.

The scales are never multiplied into what they belong to: those of keys multiply logits, those of values probabilities
(`attention.attend_cached`), so that no cache is there a second time in another type.

A few channels of keys are far larger than the others and would set the scale of all. Two things that change no attention
take care of them. Keys are stored turned by a Hadamard matrix, which spreads every channel over all, and so are queries
when they meet them (QuaRot, arXiv 2404.00456). Before that, what the bias of a key projection adds to all keys alike is
left out: it moves all logits of a query by the same amount. RoPE turns this bias from one position to the next, but
hardly where it is large.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dail_jax.model import layers
from dail_jax.model.families import Rope
from dail_jax.model.int8 import LARGEST, Int8

POSITIONS = 4096  # over which a bias is averaged
PAIR = np.array([[1, 1], [1, -1]])


def empty(shape: tuple[int, ...]) -> Int8:
    """Zeros. Scales are float32: bfloat16 ones are as exact, but a TPU would write out what it converts them to."""
    return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))


def quantized(k: jax.Array, v: jax.Array, centre: jax.Array | None) -> tuple[Int8, Int8]:
    """The int8 form of keys and values [B,K,T,H]; `centre` [K,H] is what all keys have in common (`centre_of`)."""
    keys = k.astype(jnp.float32)
    if centre is not None:
        keys = keys - centre[:, None]
    return _rounded(turned(keys) / _size(k.shape[-1])), _rounded(v.astype(jnp.float32))


def turned(x: jax.Array) -> jax.Array:
    """x [...,H] times a Hadamard matrix of ones and minus ones, in float32.

    It has the size of the largest power of two that divides H, and is repeated along the diagonal. Times itself it is that
    size, by which keys are divided.
    """
    h, size = x.shape[-1], _size(x.shape[-1])
    matrix = functools.reduce(np.kron, [PAIR] * (size.bit_length() - 1), np.eye(h // size))
    return jnp.einsum("...h,hi->...i", x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)


def centre_of(bias: jax.Array, rope: Rope | None) -> jax.Array:
    """What a bias [K,H] of keys is on average, after RoPE: float32."""
    bias = bias.astype(jnp.float32)
    if rope is None:
        return bias
    frequencies, factor = rope.frequencies(bias.shape[-1])
    angles = np.arange(POSITIONS)[:, None] * frequencies
    cos, sin = (np.mean(x, 0, dtype=np.float32) * factor for x in (np.cos(angles), np.sin(angles)))
    return layers.rotate(bias, (jnp.asarray(cos), jnp.asarray(sin)))


def _rounded(x: jax.Array) -> Int8:
    """The int8 form of x [...,H] in float32, with a scale for each vector, whose largest magnitude becomes 127."""
    scale = jnp.abs(x).max(-1) * (1 / LARGEST)
    values = jnp.rint(x / jnp.where(scale > 0, scale, 1)[..., None])
    return Int8(jnp.clip(values, -LARGEST, LARGEST).astype(jnp.int8), scale)


def _size(h: int) -> int:
    return h & -h
