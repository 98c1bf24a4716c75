"""Attention. Who sees whom follows from positions alone: -1 marks padding, and a query sees positions <= its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dail_jax import mesh as mesh_lib

NEGATIVE = -1e30  # finite, so that a row that sees nothing gives zeros and not NaN
QUERIES = 2048  # per einsum
LANES, MAX_BLOCK = 128, 512  # of the splash kernel's tiles, in tokens
BLOCKS = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Causal self-attention within rows. q [B,T,N,H], k and v [B,T,K,H], positions [B,T] -> [B,T,N,H].

    A row's real tokens are contiguous. The output at padding is finite and meaningless.
    On a TPU this is the splash kernel, on a GPU in half precision cuDNN's flash attention, elsewhere an einsum with
    a float32 softmax. The choice follows the mesh that the program is compiled for, not the host.
    """
    target = _target()
    if target == "tpu":
        return splash(q, k, v, positions)
    if target == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        mask = visible(positions, positions)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    def some(turn: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, at = turn
        return attend_cached(queries, [(_by_row(k), _by_row(v), visible(at, positions), 1)])

    b, t = positions.shape
    if t <= QUERIES:
        return some((q, positions))
    more = -t % QUERIES  # long texts in turns: [T,T] logits of 16,384 tokens are gigabytes per head
    at = jnp.pad(positions, ((0, 0), (0, more)), constant_values=-1).reshape(b, -1, QUERIES)
    queries = jnp.pad(q, ((0, 0), (0, more), (0, 0), (0, 0))).reshape(b, -1, QUERIES, *q.shape[2:])
    out = jax.lax.map(jax.checkpoint(some), (queries.swapaxes(0, 1), at.swapaxes(0, 1)))
    return out.swapaxes(0, 1).reshape(b, -1, *q.shape[2:])[:, :t]


def splash(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, interpret: bool = False) -> jax.Array:
    """`attend` by the TPU's splash kernel: no [T,T] logits, no repeated keys, no work above the diagonal.

    It runs in manual sharding, rows and heads where the mesh's rules put them. `interpret` emulates it elsewhere.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t = q.shape[1]
    block = min(MAX_BLOCK, -(-t // LANES) * LANES)
    more = -t % block
    sizes = kernels.BlockSizes(**dict.fromkeys(BLOCKS, block))

    def local(q, k, v, segments):
        causal = masks.MultiHeadMask([masks.CausalMask((t + more, t + more))] * q.shape[2])
        kernel = kernels.make_splash_mha(causal, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        by_head = (jnp.pad(_by_row(x), ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q * q.shape[-1] ** -0.5, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, more)))
        out: jax.Array = jax.vmap(kernel)(*by_head, segment_ids=kernels.SegmentIds(segments, segments))  # pyright: ignore
        return out.swapaxes(1, 2)[:, :t].astype(q.dtype)

    segments = (positions >= 0).astype(jnp.int32)  # real tokens see real tokens, and causal by index is by position
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, segments)
    rows, heads = mesh_lib.spec("bn")
    if q.shape[0] % mesh_lib.axis_size(mesh, "b"):  # the few rows of a prefill
        rows = None
    by_head, by_row = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
    return jax.shard_map(local, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head, check_vma=False)(
        q, k, v, segments
    )


def attend_cached(q: jax.Array, parts: list[tuple[jax.Array, jax.Array, jax.Array, int]]) -> jax.Array:
    """Attention of q [B,T,N,H] to the union of several sets: keys, values [G,K,S,H], mask [B,T,S], entries E.

    Rows stand in G consecutive blocks of M = B/G, which share a set's keys; these are read once per block, which is
    what makes n samples of one problem cheap. A set is E entries of S/E keys side by side, of which a row sees one.
    Sums run over each entry alone and only then over the entries, one by one: so a row gets the same bits wherever
    its entry stands, while one sum over all of S would round differently with the place of the visible keys in S.
    """
    b, t, n, h = q.shape
    heads = parts[0][0].shape[1]
    each = t * n // heads  # queries per row and kv head: they share its keys

    def by_block(x, g):  # [B,K,...] -> [G,K,M,...]
        return x.reshape(g, b // g, *x.shape[1:]).swapaxes(1, 2)

    def by_row(x):  # and back
        return x.swapaxes(1, 2).reshape(b, heads, *x.shape[3:])

    # Products are batched matrices, [Q, H] x [H, S] and [Q, S] x [S, H], so that no cache is transposed.
    query = q.reshape(b, t, heads, -1, h).swapaxes(1, 2).reshape(b, heads, each, h)
    logits = []
    for k, _, mask, e in parts:
        g = k.shape[0]
        x = jnp.einsum("gkmqh,gksh->gkmqs", by_block(query, g), k, preferred_element_type=jnp.float32) * h**-0.5
        mask = by_block(jnp.repeat(mask, n // heads, axis=1)[:, None], g)
        logits.append(jnp.where(mask, x, NEGATIVE).reshape(*x.shape[:-1], e, -1))
    top = jnp.max(jnp.stack([by_row(x.max((-2, -1))) for x in logits]), 0)
    top = jax.lax.stop_gradient(jnp.maximum(top, NEGATIVE / 2))  # [B,K,Q]; any value gives the same result
    total, out = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    for (_, v, _, e), x in zip(parts, logits, strict=True):
        x = jnp.exp(x - by_block(top, v.shape[0])[..., None, None])
        y = jnp.einsum("gkmqes,gkesh->gkemqh", x.astype(v.dtype), _apart(v, e), preferred_element_type=jnp.float32)
        total = total + by_row(_one_by_one(x.sum(-1, keepdims=True)))
        out = out + by_row(_one_by_one(jnp.moveaxis(y, 2, -2)))
    out = out / jnp.maximum(total, 1e-30)
    return out.reshape(b, heads, t, -1, h).swapaxes(1, 2).reshape(b, t, n, h).astype(q.dtype)


def visible(query: jax.Array, key: jax.Array) -> jax.Array:
    """mask [B,T,S] from positions [B,T] and [B,S]."""
    return (key[:, None, :] <= query[:, :, None]) & (key >= 0)[:, None, :]


def _by_row(x: jax.Array) -> jax.Array:
    return x.swapaxes(1, 2)


def _apart(x: jax.Array, entries: int) -> jax.Array:
    """[G,K,S,H] -> [G,K,E,S/E,H]."""
    g, heads, s, h = x.shape
    return x.reshape(g, heads, entries, s // entries, h)


def _one_by_one(x: jax.Array) -> jax.Array:
    """The sum over the last axis but one, which is short, unrolled so that XLA cannot reassociate it."""
    return sum((x[..., i, :] for i in range(1, x.shape[-2])), start=x[..., 0, :])


def _target() -> str:
    """The platform (cpu, tpu, gpu) of the mesh in force, or of the default backend where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform
