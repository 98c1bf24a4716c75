"""Weights in eight bits, for a frozen base that takes half the memory of bfloat16.

Each output channel has a scale, with which its largest magnitude is 127: a weight is `values * scale`. It is never formed.
A product is taken with the values, converted to the activations' type as they are read, and the scale multiplies what
comes out. Gradients flow through the product to the activations alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

LARGEST = 127  # not -128, so that the levels are symmetric
BLOCK = 1 << 20  # weights that are quantised at a time: their float32 copies stay in the processor's cache


@struct.dataclass
class Int8:
    """A weight [*inputs, *outputs], a table [V,D] with a scale for every row, or keys or values [...,H] (`kv_int8`).

    Attributes:
      values: int8, in the exact array's own shape.
      scale: [*outputs] or [V] in the type that the weight would have, or [...] in float32.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Matrix = jax.Array | Int8


def quantize(x: np.ndarray, channels: Sequence[int], dtype) -> Int8:
    """The int8 form of a weight, with one scale of type `dtype` for each index of the axes `channels`; arrays of numpy.

    It is exact arithmetic in float32, the same on every machine.
    """
    order = [*channels, *(axis for axis in range(x.ndim) if axis not in channels)]
    moved = x.transpose(order)
    rows = moved.reshape(math.prod(moved.shape[: len(channels)]), -1)
    values, scale = np.empty(rows.shape, np.int8), np.empty(len(rows), dtype)
    step = max(1, BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step].astype(np.float32)
        found = (np.abs(part).max(1) / LARGEST).astype(dtype)
        scale[start : start + step] = found
        divisor = np.where(found > 0, found, 1).astype(np.float32)
        values[start : start + step] = np.clip(np.rint(part / divisor[:, None]), -LARGEST, LARGEST)
    back = np.argsort(order)
    return Int8(values.reshape(moved.shape).transpose(back), scale.reshape(moved.shape[: len(channels)]))  # pyright: ignore


@jax.custom_vjp
def times(x: jax.Array, w: Int8) -> jax.Array:
    """x [B,T,*inputs] times w [*inputs,*outputs]: [B,T,*outputs], in the type of x.

    The custom gradient keeps the values for the backward pass, where JAX would keep what they were converted to.
    """
    outputs = w.scale.shape
    y = jnp.tensordot(x.reshape(*x.shape[:2], -1), w.values.reshape(-1, *outputs).astype(x.dtype), 1)
    return y * w.scale.astype(x.dtype)


def _times_forward(x, w):
    return times(x, w), w


def _times_backward(w, g):
    scaled = (g * w.scale.astype(g.dtype)).reshape(*g.shape[:2], -1)
    inputs = w.values.shape[: w.values.ndim - w.scale.ndim]
    values = w.values.reshape(-1, scaled.shape[-1]).astype(g.dtype)
    return jnp.einsum("bto,do->btd", scaled, values).reshape(*g.shape[:2], *inputs), None


times.defvjp(_times_forward, _times_backward)


def logits(states: jax.Array, table: Matrix) -> jax.Array:
    """Float32 logits [...,V] of states [...,D], by a table [V,D]."""
    values = table.values.astype(states.dtype) if isinstance(table, Int8) else table
    z = jnp.einsum("...d,vd->...v", states, values, preferred_element_type=jnp.float32)
    return z * table.scale.astype(jnp.float32) if isinstance(table, Int8) else z


def by_states(by_logits: jax.Array, table: Matrix) -> jax.Array:
    """The float32 gradient [...,D] in the states of `logits`, of the gradient [...,V] in the logits."""
    if isinstance(table, Int8):
        by_logits, table = by_logits * table.scale.astype(jnp.float32), table.values.astype(table.scale.dtype)
    return jnp.einsum("...v,vd->...d", by_logits.astype(table.dtype), table, preferred_element_type=jnp.float32)
