"""Attention. Who sees whom follows from positions alone: -1 marks padding, and a query sees positions <= its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that a row that sees nothing gives zeros and not NaN


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Causal self-attention within rows. q [B,T,N,H], k and v [B,T,K,H], positions [B,T] -> [B,T,N,H].

    On a GPU in half precision this is cuDNN's flash attention; elsewhere an einsum with a float32 softmax.
    The choice follows the mesh that the program is compiled for, not the host.
    """
    if _target() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        mask = visible(positions, positions)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return _merge(q, [(_by_row(k), _by_row(v), visible(positions, positions))])


def attend_cached(
    q: jax.Array,
    positions: jax.Array,
    own: tuple[jax.Array, jax.Array, jax.Array],
    shared: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of new tokens to their row's cache and to a prompt cache that rows share.

    q [B,T,N,H] at positions [B,T]. own = keys, values [B,K,S,H] and the positions [B,S] that they hold.
    shared = keys, values [P,K,C,H] and mask [B,C]; rows are in P consecutive blocks of B/P, one a prompt.
    The shared keys are read once a block: this is what makes n samples of one problem cheap.
    """
    k, v, held = own
    parts = [(k, v, visible(positions, held))]
    if shared is not None:
        k, v, mask = shared
        parts.append((k, v, jnp.broadcast_to(mask[:, None], (*q.shape[:2], mask.shape[-1])) & (positions >= 0)[..., None]))
    return _merge(q, parts)


def visible(query: jax.Array, key: jax.Array) -> jax.Array:
    """mask [B,T,S] from positions [B,T] and [B,S]."""
    return (key[:, None, :] <= query[:, :, None]) & (key >= 0)[:, None, :]


def _by_row(x: jax.Array) -> jax.Array:
    return x.swapaxes(1, 2)


def _merge(q: jax.Array, parts: list[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """Softmax attention over the union of several key sets [P,K,S,H] with masks [B,T,S]; P divides B."""
    b, t, n, h = q.shape
    scale = h**-0.5
    logits = []
    for k, _, mask in parts:
        p, heads = k.shape[:2]
        query = q.reshape(p, b // p, t, heads, n // heads, h)
        x = jnp.einsum("pmtkgh,pksh->pmktgs", query, k, preferred_element_type=jnp.float32) * scale
        mask = mask.reshape(p, b // p, 1, t, 1, -1)
        logits.append(jnp.where(mask, x, NEGATIVE).reshape(b, heads, t, n // heads, -1))
    top = jnp.maximum(jnp.max(jnp.stack([x.max(-1) for x in logits]), 0), NEGATIVE / 2)[..., None]
    exps = [jnp.exp(x - top) for x in logits]
    total = jnp.maximum(sum(e.sum(-1) for e in exps), 1e-30)
    out = jnp.zeros((), jnp.float32)
    for (k, v, _), e in zip(parts, exps, strict=True):
        p, heads = k.shape[:2]
        weights = e.astype(v.dtype).reshape(p, b // p, heads, t, n // heads, -1)
        y = jnp.einsum("pmktgs,pksh->pmktgh", weights, v, preferred_element_type=jnp.float32)
        out = out + y.reshape(b, heads, t, n // heads, h)
    out = out / total[..., None]
    return out.swapaxes(1, 2).reshape(b, t, n, h).astype(q.dtype)


def _target() -> str:
    """The platform of the mesh in force, else the default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    kind = getattr(getattr(mesh, "abstract_device", None), "device_kind", None) if not mesh.empty else None
    if kind is None:
        return jax.default_backend()
    return "tpu" if "TPU" in kind else "cpu" if kind == "cpu" else "gpu"
