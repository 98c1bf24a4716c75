"""The gated delta rule (arXiv 2412.06464), the linear attention of Qwen3.5: a state that every token decays and corrects.

A value head keeps a matrix S [H,I], in float32. A token with key k, value v, decay a <= 0 and rate r in (0, 1) makes it

    S <- exp(a) S        S <- S + r k (v - S^T k)^T        and reads S^T q.

`step` is this recurrence, for decoding; `chunked` computes the same over whole rows with products of matrices. K heads
of queries and keys serve N value heads, consecutive ones. A token with decay 0 and rate 0 changes nothing: padding.

Queries, keys and values are first convolved over a few tokens, so that a layer's state has two parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dail_jax.mesh import constrain
from dail_jax.model.families import DeltaNet

CHUNK = 64  # tokens: within a chunk, work grows with its square; a chunk's state is kept for the backward pass
State = tuple[jax.Array, jax.Array]
EXACT = jax.lax.Precision.HIGHEST  # of products: a state carries rounding on from token to token


def shapes(net: DeltaNet, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the two parts of the state of `rows` rows: the tail, [B,K,Z-1,Y], and the memory, [B,N,H,I], in float32.

    The tail is the newest tokens before the convolution, zeros before the first.
    """
    return (rows, net.K, net.Z - 1, net.Y), (rows, net.N, net.H, net.I)


def read(
    positions: jax.Array, net: DeltaNet, x: jax.Array, taps: jax.Array, decay: jax.Array, rate: jax.Array
) -> tuple[jax.Array, State]:
    """What whole rows read, [B,T,N,I] in float32, and their states at the end.

    positions [B,T], -1 on padding, which may be on either side, x [B,T,K,Y], taps [K,Y,Z], decay and rate [B,T,N].
    """
    live = (positions >= 0)[..., None]
    x, (tail, memory) = jnp.where(live[..., None], x, 0), shapes(net, x.shape[0])
    q, k, v = _split(convolve(x, jnp.zeros(tail, x.dtype), taps), net)
    decay, rate = (constrain(jnp.where(live, y, 0), "btn") for y in (decay, rate))
    out, end = chunked(q, k, v, decay, rate, jnp.zeros(memory, jnp.float32))
    return out, (newest(x, positions, net.Z - 1), end)


def read_token(
    positions: jax.Array,
    state: State,
    net: DeltaNet,
    x: jax.Array,
    taps: jax.Array,
    decay: jax.Array,
    rate: jax.Array,
) -> tuple[jax.Array, State]:
    """`read` for one more token of each row, T = 1; where its position is -1, the state stays as it is."""
    tail, memory = state
    q, k, v = _split(convolve(x, tail, taps), net)
    out, fresh = step(q[:, 0], k[:, 0], v[:, 0], decay[:, 0], rate[:, 0], memory)
    live = (positions >= 0)[..., None, None]
    newer = jnp.concatenate([tail[:, :, 1:], x.swapaxes(1, 2).astype(tail.dtype)], 2)
    return out[:, None], (jnp.where(live, newer, tail), jnp.where(live, fresh, memory))


def _split(x: jax.Array, net: DeltaNet) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B,T,K,Y] -> queries and keys [B,T,K,H] of length 1, the queries scaled by H^-1/2, and values [B,T,N,I]."""
    q, k, v = jnp.split(x, (net.H, 2 * net.H), -1)
    q, k, v = _unit(q) * net.H**-0.5, _unit(k), v.reshape(*x.shape[:2], net.N, net.I)
    return constrain(q, "btkh"), constrain(k, "btkh"), constrain(v, "btni")


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, rate: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the tokens of whole rows read, [B,T,N,I], and the state after them, [B,N,H,I].

    q and k [B,T,K,H], v [B,T,N,I], decay and rate [B,T,N], state [B,N,H,I]; all of it in float32.

    Within a chunk that starts with S, the corrections d_t = r_t (v_t - S_t^T k_t) solve one triangular system:
    d_t + r_t sum_{s<t} exp(c_t - c_s) (k_t k_s) d_s = r_t (v_t - exp(c_t) S^T k_t), with c the running sum of the decay.
    """
    b, t, heads, h = k.shape
    n, i = v.shape[2:]
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))

    def split(x: jax.Array, *axes: int) -> jax.Array:  # [B,T,...] -> [chunks,B,CHUNK,*axes]
        x = jnp.pad(x, ((0, 0), (0, -t % CHUNK)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b, -1, CHUNK, *axes).swapaxes(0, 1)

    def einsum(equation: str, *xs: jax.Array) -> jax.Array:
        return jnp.einsum(equation, *xs, precision=EXACT)

    @jax.checkpoint  # a chunk's [CHUNK,CHUNK] matrices are made again for the gradient
    def one(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, decay, rate = chunk  # value heads are [K,M] here: M of them read one key head
        summed = jnp.cumsum(jnp.moveaxis(decay, 1, -1), -1)  # [B,K,M,CHUNK]
        since = jnp.exp(summed)[..., None]
        between = jnp.exp(jnp.where(lower, summed[..., :, None] - summed[..., None, :], -jnp.inf))
        rate = jnp.moveaxis(rate, 1, -1)[..., None]
        system = rate * between * einsum("btkh,bskh->bkts", k, k)[:, :, None]
        wanted = jnp.moveaxis(v, 1, 3) - since * einsum("btkh,bkmhi->bkmti", k, state)
        corrections = jax.lax.linalg.triangular_solve(
            system, rate * wanted, left_side=True, lower=True, unit_diagonal=True
        )
        near = between * einsum("btkh,bskh->bkts", q, k)[:, :, None]
        read = since * einsum("btkh,bkmhi->bkmti", q, state) + einsum("bkmts,bkmsi->bkmti", near, corrections)
        until = jnp.exp(summed[..., -1:] - summed)[..., None]
        state = since[..., -1:, :] * state + einsum("btkh,bkmti->bkmhi", k, until * corrections)
        return state, jnp.moveaxis(read, 3, 1)

    m = n // heads
    inputs = (
        split(q, heads, h),
        split(k, heads, h),
        split(v, heads, m, i),
        split(decay, heads, m),
        split(rate, heads, m),
    )
    state, read = jax.lax.scan(one, state.reshape(b, heads, m, h, i), inputs)
    return read.swapaxes(0, 1).reshape(b, -1, n, i)[:, :t], state.reshape(b, n, h, i)


def step(
    q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, rate: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`chunked` for one token: q and k [B,K,H], v [B,N,I], decay and rate [B,N] -> ([B,N,I], the state [B,N,H,I])."""
    q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], 1) for x in (q, k))
    state = jnp.exp(decay)[..., None, None] * state
    correction = rate[..., None] * (v - jnp.einsum("bnh,bnhi->bni", k, state, precision=EXACT))
    state = state + k[..., None] * correction[..., None, :]
    return jnp.einsum("bnh,bnhi->bni", q, state, precision=EXACT), state


def convolve(x: jax.Array, before: jax.Array, taps: jax.Array) -> jax.Array:
    """SiLU of a causal convolution over time, of each channel alone: x [B,T,K,Y], taps [K,Y,Z] -> [B,T,K,Y], float32.

    `before` [B,K,Z-1,Y] is what precedes x. The last of the Z taps meets a token itself.
    """
    t, size = x.shape[1], taps.shape[-1]
    x = jnp.concatenate([before.swapaxes(1, 2).astype(x.dtype), x], 1).astype(jnp.float32)
    taps = taps.astype(jnp.float32)
    return jax.nn.silu(sum(x[:, z : z + t] * taps[..., z] for z in range(size)))


def newest(x: jax.Array, positions: jax.Array, count: int) -> jax.Array:
    """The last `count` real tokens' x, [B,K,`count`,Y], zeros before the first, of x [B,T,K,Y] at positions [B,T].

    Real tokens are contiguous; padding, on either side, has position -1.
    """
    index = jnp.argmax(positions, 1)[:, None] + jnp.arange(1 - count, 1)  # -1 everywhere gives 0, which is not real
    near = jnp.take_along_axis(positions, jnp.maximum(index, 0), 1)
    real = ((index >= 0) & (near >= 0))[..., None, None]
    found = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None, None], 1)
    return jnp.where(real, found, 0).swapaxes(1, 2)


def _unit(x: jax.Array) -> jax.Array:
    """x with its last axis scaled to length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)
