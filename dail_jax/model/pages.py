"""Keys and values in pages, of which a row has as many as its text fills.

A layer's pool is an array [pages, tokens of a page, 2K, H]: of every token the keys and values of all heads in turn, as
JAX's ragged paged attention reads them. A table [B, W] lists each row's pages in the order of its text; rows that
continue one prompt list the same pages. Pages are divided among devices as rows are, and each device numbers its own
from 0, a page that belongs to no row. Who has which page is decided on the host (`sample.pool`).

What a token reads is its row's text and not the room that the row might need. Where there is no such kernel, an einsum
over gathered pages takes its place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dail_jax import mesh as mesh_lib
from dail_jax.model import attention
from dail_jax.model.families import Layer, ModelConfig

PAGE = 64  # tokens
KEYS = 512  # tokens that the kernel fetches at a time
LANES = 128

Pools = tuple[jax.Array | None, ...]  # by layer


def is_paged(layer: Layer) -> bool:
    """Whether a layer's keys can lie in pages: what has a window or a state needs no more room as a text grows."""
    return layer.mixer == "attention" and layer.window is None


def refusal(cfg: ModelConfig, platform: str, tensor: int) -> str | None:
    """Why a model cannot be sampled from pages on such devices, with heads divided by `tensor`; None: it can."""
    if not any(map(is_paged, cfg.layers)):
        return "every layer of the model has a window or a state"
    if platform not in ("tpu", "cpu"):
        return f"there is no kernel for a {platform}"
    if platform == "cpu":
        return None
    if cfg.H != LANES:
        return f"the kernel wants heads of {LANES} channels, the model's have {cfg.H}"
    heads = 2 * (cfg.K // tensor if cfg.K % tensor == 0 else cfg.K)
    if heads not in (2, 4, 8) and heads % 16:
        return f"the kernel wants 1, 2, 4 or a multiple of 8 kv heads a device, here are {heads // 2}"
    return None


def empty(cfg: ModelConfig, pages: int, page: int, dtype) -> Pools:
    """A pool of so many pages, those of all devices, for each layer that is paged."""
    return tuple(jnp.zeros((pages, page, 2 * cfg.K, cfg.H), dtype) if is_paged(x) else None for x in cfg.layers)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    table: jax.Array,
    positions: jax.Array,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Adds one token per row, and attends from it to itself and to all before it.

    q [B,1,N,H], k and v [B,1,K,H], table [B,W], positions [B,1], -1 where a row has ended -> [B,1,N,H] and the pool. The
    output of a row that has ended is finite and meaningless.
    """
    page, kernel = pool.shape[1], runs_kernel()

    def local(q, k, v, pool, table, positions):
        at = jnp.maximum(positions[:, 0], 0)
        number = jnp.take_along_axis(table, at[:, None] // page, 1)[:, 0]
        number = jnp.where(positions[:, 0] < 0, 0, number)
        new = jnp.stack([k, v], 3).reshape(-1, *pool.shape[2:]).astype(pool.dtype)
        if kernel:
            pool = _write(pool, number, at % page, new)
            return _read(q, pool, table, at + 1, scale), pool
        pool = pool.at[number, at % page].set(new)
        keys = pool[table].reshape(len(q), -1, *pool.shape[2:]).swapaxes(1, 2)  # [B,2K,S,H]
        mask = jnp.arange(keys.shape[2]) <= at[:, None, None]
        return attention.attend_cached(q, [(keys[:, 0::2], keys[:, 1::2], mask, 1)], scale), pool

    rows, _, heads, _ = _spec(pool)
    by_head, by_row = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
    specs = (by_head, by_head, by_head, by_head, by_row, by_row)
    return _on_devices(local, specs, (by_head, by_head))(q, k, v, pool, table, positions)


def copied(pools: Pools, source: jax.Array, target: jax.Array) -> Pools:
    """The pools with each row's page `source` [B] copied to its page `target` [B], one row after another.

    It is a loop, like `transformer.commit`, so that pools are changed in place.
    """

    def local(pools, source, target):
        def move(row, pools):
            one = lambda x: jax.lax.dynamic_slice_in_dim(x, source[row], 1)  # noqa: E731
            put = lambda x: jax.lax.dynamic_update_slice_in_dim(x, one(x), target[row], 0)  # noqa: E731
            return jax.tree.map(put, pools)

        return jax.lax.fori_loop(0, len(source), move, pools)

    whole = PartitionSpec(*_spec(_first(pools)))
    row = PartitionSpec(whole[0])
    return _on_devices(local, (whole, row, row), whole)(pools, source, target)


def loaded(pools: Pools, keys: list, values: list, first: jax.Array, device: jax.Array) -> Pools:
    """The pools with prompts, whose keys and values are L arrays [roles,K,P,H], in the pages from `first` [roles] on.

    Each device that holds rows writes, or writes back what is there: the pages are those of the `device`-th.
    """

    def pages_of(pool, k, v):
        new = jnp.stack([k, v], 2).reshape(len(k), pool.shape[2], *k.shape[2:]).swapaxes(1, 2)  # [roles,P,2K,H]
        new = jnp.pad(new, ((0, 0), (0, -new.shape[1] % pool.shape[1]), (0, 0), (0, 0)))
        return new.reshape(len(k), -1, *pool.shape[1:]).astype(pool.dtype)

    def local(pools, keys, values, here):
        def put(pool, k, v):
            for role, new in enumerate(pages_of(pool, k, v)):
                place = (first[role], 0, 0, 0)
                old = jax.lax.dynamic_slice(pool, place, new.shape)
                pool = jax.lax.dynamic_update_slice(pool, jnp.where(here[0] == device, new, old), place)
            return pool

        return jax.tree.map(put, pools, tuple(keys), tuple(values))

    rows, _, heads, _ = _spec(_first(pools))
    whole, prompts = PartitionSpec(rows, None, heads, None), PartitionSpec(None, heads)
    here = jnp.arange(devices())
    return _on_devices(local, (whole, prompts, prompts, PartitionSpec(rows)), whole)(pools, keys, values, here)


def laid_out(pools: Pools) -> Pools:
    """Asks the compiler to keep pools where they are."""
    place = jax.lax.with_sharding_constraint
    mesh = jax.sharding.get_abstract_mesh()
    return pools if mesh.empty else jax.tree.map(lambda x: place(x, _spec(x)), pools)


def devices() -> int:
    """How many parts the current mesh divides rows into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh_lib.axis_size(mesh, "b")


def runs_kernel() -> bool:
    return attention.target() == "tpu"


def _read(q: jax.Array, pool: jax.Array, table: jax.Array, lengths: jax.Array, scale: float | None) -> jax.Array:
    """JAX's kernel: each row's query sees the first `lengths` [B] tokens of its pages, and no more are fetched, but
    for the rest of a block of KEYS."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    b = len(q)
    out = ragged_paged_attention(
        q[:, 0],
        pool,
        lengths,
        table,
        jnp.arange(b + 1, dtype=jnp.int32),  # every row asks for one token
        jnp.array([b], jnp.int32),
        sm_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        num_kv_pages_per_block=min(max(KEYS // pool.shape[1], 1), table.shape[1]),
        num_queries_per_block=1,
    )
    return out[:, None]


def _write(pool: jax.Array, number: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
    """Writes new [B,2K,H] to slots `at` [B] of pages `number` [B], in place. XLA would write row after row."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def write(number, at, new, _, pool, done):
        copies = [pltpu.make_async_copy(new.at[i], pool.at[number[i], at[i]], done) for i in range(len(new))]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        write,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            grid=(1,),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={3: 0},
        name="write_pages",
    )(number, at, new, pool)


def _first(pools: Pools) -> jax.Array:
    return next(x for x in pools if x is not None)


def _spec(pool: jax.Array) -> PartitionSpec:
    """How a pool lies on the current mesh: pages as rows, heads as kv heads."""
    mesh = jax.sharding.get_abstract_mesh()
    pages, page, heads, size = pool.shape
    return PartitionSpec(*[None] * 4) if mesh.empty else mesh_lib.fitting(mesh, "b_k_", (pages, page, heads // 2, size))


def _on_devices(fn: Any, in_specs: Any, out_specs: Any) -> Any:
    """`fn` on each device's own parts."""
    if jax.sharding.get_abstract_mesh().empty:
        return fn
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
