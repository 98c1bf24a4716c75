"""Attention. Masks follow from positions alone: -1 marks padding, and a query sees the positions up to its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dail_jax import mesh as mesh_lib
from dail_jax.model import kv_int8
from dail_jax.model.int8 import Int8

NEGATIVE = -1e30  # finite, so that a row that sees nothing yields zeros and not NaN
QUERIES = 2048  # per einsum
LANES, BLOCKS = 128, (512, 384, 256, 128)  # tile sizes of the splash kernel, in tokens
ROW = 128  # cuDNN is given rows of a multiple of this, in tokens: of other lengths, some versions return NaN
BLOCK_SIZES = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Causal self-attention within rows. q [B,T,N,H], k and v [B,T,K,H], positions [B,T] -> [B,T,N,H].

    With a window, a token sees as many, itself among them. `scale` multiplies logits; None: H to the power of -0.5. A row's
    real tokens are contiguous. The output at padding is finite and meaningless.
    It runs the splash kernel on a TPU, cuDNN's flash attention on a GPU in half precision if `cudnn_takes` the heads, and
    otherwise an einsum with a float32 softmax. The choice depends on the mesh that the program is compiled for, not on
    the host.
    """
    platform = target()
    if platform == "tpu":
        return splash(q, k, v, positions, window, scale)
    if platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and cudnn_takes(q.shape[-1]):
        return cudnn(q, k, v, positions, window, scale)

    def attend_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, at = chunk
        return attend_cached(queries, [(_by_row(k), _by_row(v), causal_mask(at, positions, window), 1)], scale)

    b, t = positions.shape
    if t <= QUERIES:
        return attend_chunk((q, positions))
    padding = -t % QUERIES  # long rows in chunks: [T,T] logits of 16,384 tokens take gigabytes per head
    at = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1).reshape(b, -1, QUERIES)
    queries = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(b, -1, QUERIES, *q.shape[2:])
    out = jax.lax.map(jax.checkpoint(attend_chunk), (queries.swapaxes(0, 1), at.swapaxes(0, 1)))
    return out.swapaxes(0, 1).reshape(b, -1, *q.shape[2:])[:, :t]


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    window: int | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attend` by the TPU's splash kernel: no [T,T] logits, no repeated keys, no work above the diagonal or below a window.

    It runs under manual sharding, with rows and heads placed by the mesh's rules; where rows are too few, each device
    takes a part of their queries and all of their keys. `interpret` emulates the kernel on other platforms.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, segments = q.shape[1], (positions >= 0).astype(jnp.int32)  # real tokens see only real ones
    mesh = jax.sharding.get_abstract_mesh()
    rows, split, heads, _ = (None,) * 4 if mesh.empty else mesh_lib.fitting(mesh, "btnh", q.shape)
    shards = 1 if split is None else mesh_lib.axis_size(mesh, "b")
    if t % (shards * LANES):  # parts of the queries would not be whole tiles: every device takes all of them
        split, shards = None, 1
    block = min(BLOCKS[0], -(-t // LANES) * LANES)
    if shards > 1:  # whole rows are padded to whole tiles, and parts must be tiled as they are
        block = next(size for size in BLOCKS if t // shards % size == 0)
    padding = -t % block
    sizes = kernels.BlockSizes(**dict.fromkeys(BLOCK_SIZES, block))
    here = q.shape[2] if heads is None else q.shape[2] // mesh_lib.axis_size(mesh, "n")
    square = (t + padding, t + padding)
    mask = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    mask = masks.MultiHeadMask([mask] * here)
    kernel = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=shards, interpret=interpret)

    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def local(kernel, q, k, v, queries, keys):
        by_head = (jnp.pad(_by_row(x), ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q * factor, k, v))
        ids = kernels.SegmentIds(*(jnp.pad(x, ((0, 0), (0, padding))) for x in (queries, keys)))
        out: jax.Array = jax.vmap(kernel)(*by_head, segment_ids=ids)  # pyright: ignore
        return out.swapaxes(1, 2)[:, : q.shape[1]].astype(q.dtype)

    if mesh.empty:
        return local(kernel, q, k, v, segments, segments)
    whole, part = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, split, heads, None)
    spread = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, split)))
    return jax.shard_map(
        local,
        in_specs=(spread, part, whole, whole, PartitionSpec(rows, split), PartitionSpec(rows, None)),
        out_specs=part,
        check_vma=False,
    )(kernel, q, k, v, segments, segments)


def cudnn_takes(size: int) -> bool:
    """Whether cuDNN has a kernel for heads of this size: for multiples of 8 up to 128, and up to 256 since Hopper. AMD's GPUs
    have no cuDNN.

    JAX looks at this process's own GPU, whatever it compiles for. Where there is none, 128 is the limit.
    """
    largest = 128
    if jax.default_backend() == "gpu":
        major = jax.local_devices()[0].compute_capability.partition(".")[0]  # 9 of 9.0; gfx942
        largest = {"8": 128}.get(major, 256 if major.isdigit() and int(major) >= 9 else 0)
    return size % 8 == 0 and size <= largest


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """`attend` by cuDNN's flash attention, which takes rows' lengths instead of a mask: no [T,T] bias, and no work above
    the diagonal.

    cuDNN counts a length from a row's start, so each row is rolled until its first real token comes first. What it leaves
    at padding, in outputs and gradients alike, may be anything, so selections on both sides replace it by zeros.
    It runs under manual sharding and takes no parts of rows. Where rows are too few to divide, heads are divided further
    if there are enough; otherwise devices repeat each other's work.
    """
    t = q.shape[1]
    band = None if window is None or window >= t else (window - 1, 0)

    def local(q, k, v, positions):
        real = positions >= 0
        start, length = jnp.argmax(real, 1), real.sum(1, dtype=jnp.int32)
        inside = (jnp.arange(t) < length[:, None])[..., None, None]
        tail = ((0, 0), (0, -t % ROW), (0, 0), (0, 0))
        q, k, v = (jnp.pad(jnp.where(inside, rolled(x, -start), 0), tail) for x in (q, k, v))
        count = jnp.maximum(length, 1)  # a row without a real token has one all the same
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            query_seq_lengths=count,
            key_value_seq_lengths=count,
            local_window_size=band,
            implementation="cudnn",
        )
        return rolled(jnp.where(inside, out[:, :t], 0), start)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, positions)
    q = mesh_lib.constrain(q, "btnh")  # so that devices exchange it here, and not the halves that it is rotated by
    rows, _, heads, _ = mesh_lib.fitting(mesh, "b_kh", k.shape)
    if rows is None and k.shape[2] % mesh.size == 0:
        heads = (mesh_lib.RULES["k"], *mesh_lib.RULES["b"])
    whole = PartitionSpec(rows, None, heads, None)
    specs = (whole, whole, whole, PartitionSpec(rows, None))
    return jax.shard_map(local, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, positions)


@jax.custom_vjp
def rolled(x: jax.Array, by: jax.Array) -> jax.Array:
    """x [B,T,N,H] with the tokens of each row moved `by` [B] places to the right, those at the end to the start.

    Its derivative moves them back, where that of a gather would be a scatter.
    """
    t = x.shape[1]
    source = (jnp.arange(t) - by[:, None]) % t
    return jnp.take_along_axis(x, source[..., None, None], axis=1, mode="promise_in_bounds")


rolled.defvjp(lambda x, by: (rolled(x, by), by), lambda by, g: (rolled(g, -by), None))


def attend_cached(
    q: jax.Array,
    parts: list[tuple[jax.Array | Int8, jax.Array | Int8, jax.Array, int]],
    scale: float | None = None,
) -> jax.Array:
    """Attention of q [B,T,N,H] to the union of several sets: keys and values [G,K,S,H], mask [B,T,S], entries E.

    Rows form G consecutive blocks of M = B/G rows that share a set's keys. The keys are read once per block, which is
    what makes n samples of one problem cheap. A set is E entries of S/E keys side by side, of which a row sees one.
    Sums are taken within each entry and only then across entries, one by one, so that a row gets the same bits wherever
    its entry is placed: one sum over all of S would round differently depending on where the visible keys are.
    All sets are exact, or all are int8.
    """
    b, t, n, h = q.shape
    heads = parts[0][0].shape[1]
    factor = h**-0.5 if scale is None else scale
    each = t * n // heads  # queries per row and kv head: they share its keys

    def by_block(x, g):  # [B,K,...] -> [G,K,M,...]
        return x.reshape(g, b // g, *x.shape[1:]).swapaxes(1, 2)

    def by_row(x):  # its inverse
        return x.swapaxes(1, 2).reshape(b, heads, *x.shape[3:])

    # These are batched matrix products, [Q, H] x [H, S] and [Q, S] x [S, H], so that no cache is transposed.
    if isinstance(parts[0][0], Int8):
        q = kv_int8.turned(q).astype(q.dtype)
    query = q.reshape(b, t, heads, -1, h).swapaxes(1, 2).reshape(b, heads, each, h)
    logits = []
    for k, _, mask, e in parts:
        g = k.shape[0]
        k, by_key = _opened(k, q.dtype)
        x = jnp.einsum("gkmqh,gksh->gkmqs", by_block(query, g), k, preferred_element_type=jnp.float32)
        x = x * factor if by_key is None else x * factor * by_key
        mask = by_block(jnp.repeat(mask, n // heads, axis=1)[:, None], g)
        logits.append(jnp.where(mask, x, NEGATIVE).reshape(*x.shape[:-1], e, -1))
    top = jnp.max(jnp.stack([by_row(x.max((-2, -1))) for x in logits]), 0)
    top = jax.lax.stop_gradient(jnp.maximum(top, NEGATIVE / 2))  # [B,K,Q]; any value gives the same result
    total, out = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    for (_, v, _, e), x in zip(parts, logits, strict=True):
        x = jnp.exp(x - by_block(top, v.shape[0])[..., None, None])
        v, by_value = _opened(v, q.dtype)
        p = x if by_value is None else x * by_value.reshape(*by_value.shape[:-1], e, -1)
        y = jnp.einsum(
            "gkmqes,gkesh->gkemqh", p.astype(v.dtype), _split_entries(v, e), preferred_element_type=jnp.float32
        )
        total = total + by_row(_sum_in_order(x.sum(-1, keepdims=True)))
        out = out + by_row(_sum_in_order(jnp.moveaxis(y, 2, -2)))
    out = out / jnp.maximum(total, 1e-30)
    return out.reshape(b, heads, t, -1, h).swapaxes(1, 2).reshape(b, t, n, h).astype(q.dtype)


def causal_mask(query: jax.Array, key: jax.Array, window: int | None = None) -> jax.Array:
    """The mask [B,T,S] of which keys each query sees, from the positions of queries [B,T] and keys [B,S]."""
    query, key = query[:, :, None], key[:, None, :]
    mask = (key <= query) & (key >= 0)
    return mask if window is None else mask & (key > query - window)


def _by_row(x: jax.Array) -> jax.Array:
    return x.swapaxes(1, 2)


def _opened(x: jax.Array | Int8, dtype) -> tuple[jax.Array, jax.Array | None]:
    """What products are taken with, and the float32 scales [G,K,1,1,S] by which they are then multiplied, if any."""
    if not isinstance(x, Int8):
        return x, None
    return x.values.astype(dtype), x.scale[:, :, None, None]


def _split_entries(x: jax.Array, entries: int) -> jax.Array:
    """[G,K,S,H] -> [G,K,E,S/E,H]."""
    g, heads, s, h = x.shape
    return x.reshape(g, heads, entries, s // entries, h)


def _sum_in_order(x: jax.Array) -> jax.Array:
    """The sum over the second-to-last axis, which is short, unrolled so that XLA cannot reassociate it."""
    return sum((x[..., i, :] for i in range(1, x.shape[-2])), start=x[..., 0, :])


def target() -> str:
    """The platform (cpu, tpu, gpu) of the current mesh, or of the default backend if there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform
