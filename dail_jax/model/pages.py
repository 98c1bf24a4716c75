"""Keys and values in pages, of which a row has as many as its text fills.

A layer's pool lies as the kernel that reads it wants it: `Joined` for a TPU, `Apart` for a GPU. A table [B, W] lists each
row's pages in the order of its text; rows that continue one prompt list the same pages. Pages are divided among devices
as rows are, and each device numbers its own from 0, a page that belongs to no row. Who has which page is decided on the
host (`sample.pool`).

What a token reads is its row's text and not the room that the row might need. Where there is no kernel, an einsum over
gathered pages takes its place.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from dail_jax import mesh as mesh_lib
from dail_jax.model import attention, kv_int8
from dail_jax.model.families import Layer, ModelConfig
from dail_jax.model.int8 import Int8

PAGE = 64  # tokens
KEYS = {"tpu": 512, "gpu": PAGE}  # tokens that the kernel fetches at a time
SPLIT = 1024  # tokens of a text that one program of the GPU's kernel reads at most
LANES = 128


@struct.dataclass
class Joined:
    """A pool that is one array: of every token the keys and values of all heads in turn, as JAX's ragged paged attention
    for TPUs reads them.

    Attributes:
      tokens: [pages, tokens of a page, 2K, H].
    """

    tokens: jax.Array
    axes: ClassVar[str] = "b_k"  # of each array, from the first on

    @classmethod
    def empty(cls, heads: int, pages: int, page: int, size: int, dtype) -> Joined:
        assert dtype != jnp.int8, "the kernel has one scale for all tokens"
        return cls(jnp.zeros((pages, page, 2 * heads, size), dtype))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Pages, tokens of a page, heads."""
        pages, page, heads, _ = self.tokens.shape
        return pages, page, heads // 2

    def in_pages(self, k: jax.Array, v: jax.Array) -> Joined:
        """Keys and values [roles,K,P,H] in pages of their own, with an axis of roles before the others."""
        shape = self.tokens.shape[1:]
        new = jnp.stack([k, v], 2).reshape(len(k), shape[1], *k.shape[2:]).swapaxes(1, 2)  # [roles,P,2K,H]
        new = jnp.pad(new, ((0, 0), (0, -new.shape[1] % shape[0]), (0, 0), (0, 0)))
        return Joined(new.reshape(len(k), -1, *shape).astype(self.tokens.dtype))

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, number: jax.Array, at: jax.Array, table: jax.Array, scale
    ) -> tuple[jax.Array, Joined]:
        """`attend` on one device, with each row's token `at` [B] of its text in page `number` [B]."""
        pool, page = self.tokens, self.tokens.shape[1]
        new = jnp.stack([k, v], 3).reshape(-1, *pool.shape[2:]).astype(pool.dtype)
        if kernel() == "tpu":
            pool = _write(pool, number, at % page, new)
            return _ragged(q, pool, table, at + 1, scale), Joined(pool)
        pool = pool.at[number, at % page].set(new)
        keys = pool[table].reshape(len(q), -1, *pool.shape[2:]).swapaxes(1, 2)  # [B,2K,S,H]
        mask = jnp.arange(keys.shape[2]) <= at[:, None, None]
        return attention.attend_cached(q, [(keys[:, 0::2], keys[:, 1::2], mask, 1)], scale), Joined(pool)


@struct.dataclass
class Apart:
    """A pool of two arrays, as JAX's paged attention for GPUs reads them.

    Attributes:
      keys, values: [K, pages, tokens of a page, H], or their int8 form (`kv_int8`), with scales [K, pages, tokens of a page].
    """

    keys: jax.Array | Int8
    values: jax.Array | Int8
    axes: ClassVar[str] = "kb"

    @classmethod
    def empty(cls, heads: int, pages: int, page: int, size: int, dtype) -> Apart:
        shape = (heads, pages, page, size)
        return cls(*(kv_int8.empty(shape) if dtype == jnp.int8 else jnp.zeros(shape, dtype) for _ in range(2)))

    @property
    def sizes(self) -> tuple[int, int, int]:
        heads, pages, page, _ = self.keys.shape
        return pages, page, heads

    def in_pages(self, k: jax.Array, v: jax.Array) -> Apart:
        _, page, _ = self.sizes

        def paged(pool, x):  # [roles,K,P,...]
            x = jnp.pad(x, [(0, -size % page if axis == 2 else 0) for axis, size in enumerate(x.shape)])
            return x.reshape(*x.shape[:2], -1, page, *x.shape[3:]).astype(pool.dtype)

        return jax.tree.map(paged, self, Apart(k, v))

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, number: jax.Array, at: jax.Array, table: jax.Array, scale
    ) -> tuple[jax.Array, Apart]:
        _, page, _ = self.sizes

        def written(pool, new):
            return pool.at[:, number, at % page].set(new[:, 0].swapaxes(0, 1).astype(pool.dtype))

        pool = jax.tree.map(written, self, Apart(k, v))
        return _paged(q, pool, table, at + 1, scale), pool


Pool = Joined | Apart
Pools = tuple[Pool | None, ...]  # by layer


def is_paged(layer: Layer) -> bool:
    """Whether a layer's keys can lie in pages: what has a window or a state needs no more room as a text grows."""
    return layer.mixer == "attention" and layer.window is None


def refusal(cfg: ModelConfig, device: Any, tensor: int, kv_dtype: str | None = None) -> str | None:
    """Why a model cannot be sampled from pages on such a JAX device, with heads divided by `tensor` and keys and values of
    such a type; None: it can."""
    if not any(map(is_paged, cfg.layers)):
        return "every layer of the model has a window or a state"
    if device.platform == "gpu":
        return _refusal_gpu(cfg, device.compute_capability)
    if kv_dtype is not None:
        return f"only a GPU's kernel reads keys and values in {kv_dtype}, and kv_dtype asks for it"
    if device.platform == "cpu":
        return None
    if cfg.H != LANES:
        return f"the kernel wants heads of {LANES} channels, the model's have {cfg.H}"
    heads = 2 * (cfg.K // tensor if cfg.K % tensor == 0 else cfg.K)
    if heads not in (2, 4, 8) and heads % 16:
        return f"the kernel wants 1, 2, 4 or a multiple of 8 kv heads a device, here are {heads // 2}"
    return None


def _refusal_gpu(cfg: ModelConfig, capability: str) -> str | None:
    """`refusal` on a GPU of such a compute capability: 9.0, or gfx942 where it is AMD's."""
    try:
        importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    except ImportError:  # deprecated since jax 0.11
        return f"jax {jax.__version__} has no kernel that reads pages on a GPU, which jax 0.10 and 0.11 have"
    if not re.fullmatch(r"\d+\.\d", capability) or float(capability) < 8:
        return f"the kernel wants an NVIDIA GPU of compute capability 8.0 or more, here is {capability}"
    if cfg.H not in (16, 32, 64, 128, 256):
        return f"the kernel wants heads of 16, 32, 64, 128 or 256 channels, the model's have {cfg.H}"
    return None


def empty(cfg: ModelConfig, pages: int, page: int, dtype) -> Pools:
    """A pool of so many pages, those of all devices, for each layer that is paged; of int8 with its scales."""
    form = Apart if kernel() == "gpu" else Joined
    return tuple(form.empty(cfg.K, pages, page, cfg.H, dtype) if is_paged(x) else None for x in cfg.layers)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: Pool,
    table: jax.Array,
    positions: jax.Array,
    scale: float | None = None,
) -> tuple[jax.Array, Pool]:
    """Adds one token per row, and attends from it to itself and to all before it.

    q [B,1,N,H], k and v [B,1,K,H], in the pool's form, table [B,W], positions [B,1], -1 where a row has ended ->
    [B,1,N,H] and the pool. The output of a row that has ended is finite and meaningless.
    """
    _, page, _ = pool.sizes

    def local(q, k, v, pool, table, positions):
        at = jnp.maximum(positions[:, 0], 0)
        number = jnp.take_along_axis(table, at[:, None] // page, 1)[:, 0]
        number = jnp.where(positions[:, 0] < 0, 0, number)
        return pool.attend(q, k, v, number, at, table, scale)

    whole, rows, heads = _layout(pool)
    by_head, by_row = PartitionSpec(rows, None, heads), PartitionSpec(rows, None)
    specs = (by_head, by_head, by_head, whole, by_row, by_row)
    return _on_devices(local, specs, (by_head, whole))(q, k, v, pool, table, positions)


def copied(pools: Pools, source: jax.Array, target: jax.Array) -> Pools:
    """The pools with each row's page `source` [B] copied to its page `target` [B], one row after another.

    It is a loop, like `transformer.commit`, so that pools are changed in place.
    """
    axis = _first(pools).axes.index("b")

    def local(pools, source, target):
        def move(row, pools):
            one = lambda x: jax.lax.dynamic_slice_in_dim(x, source[row], 1, axis)  # noqa: E731
            put = lambda x: jax.lax.dynamic_update_slice_in_dim(x, one(x), target[row], axis)  # noqa: E731
            return jax.tree.map(put, pools)

        return jax.lax.fori_loop(0, len(source), move, pools)

    whole, rows, _ = _layout(_first(pools))
    row = PartitionSpec(rows)
    return _on_devices(local, (whole, row, row), whole)(pools, source, target)


def loaded(pools: Pools, keys: list, values: list, first: jax.Array, device: jax.Array) -> Pools:
    """The pools with prompts, whose keys and values are L arrays [roles,K,P,H], in the pages from `first` [roles] on.

    Each device that holds rows writes, or writes back what is there: the pages are those of the `device`-th.
    """
    axis = _first(pools).axes.index("b")

    def local(pools, keys, values, here):
        def put(pool, new):
            for role, x in enumerate(new):
                place = [0] * x.ndim
                place[axis] = first[role]
                old = jax.lax.dynamic_slice(pool, place, x.shape)
                pool = jax.lax.dynamic_update_slice(pool, jnp.where(here[0] == device, x, old), place)
            return pool

        each = zip(pools, keys, values, strict=True)
        return tuple(pool and jax.tree.map(put, pool, pool.in_pages(k, v)) for pool, k, v in each)

    whole, rows, heads = _layout(_first(pools))
    prompts, here = PartitionSpec(None, heads), jnp.arange(devices())
    return _on_devices(local, (whole, prompts, prompts, PartitionSpec(rows)), whole)(pools, keys, values, here)


def laid_out(pools: Pools) -> Pools:
    """Asks the compiler to keep pools where they are."""
    if jax.sharding.get_abstract_mesh().empty or not any(pools):
        return pools
    whole, _, _ = _layout(_first(pools))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), pools)


def devices() -> int:
    """How many parts the current mesh divides rows into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh_lib.axis_size(mesh, "b")


def is_int8(pool: Pool) -> bool:
    return isinstance(pool, Apart) and isinstance(pool.keys, Int8)


def kernel() -> str:
    """The platform whose kernel reads pages here; there is none for a CPU."""
    return attention.target()


def _ragged(q: jax.Array, pool: jax.Array, table: jax.Array, lengths: jax.Array, scale: float | None) -> jax.Array:
    """JAX's kernel for TPUs: each row's query sees the first `lengths` [B] tokens of its pages, and no more are fetched,
    but for the rest of a block of KEYS."""
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
        num_kv_pages_per_block=min(max(KEYS["tpu"] // pool.shape[1], 1), table.shape[1]),
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


def _paged(q: jax.Array, pool: Apart, table: jax.Array, lengths: jax.Array, scale: float | None) -> jax.Array:
    """JAX's kernel for GPUs, which fetches page by page. Every row and kv head has as many programs as it takes to read
    the longest text with SPLIT tokens each; one that begins behind its row's text reads nothing."""
    from jax.experimental.pallas.ops.gpu import paged_attention as kernels

    (_, page, _), width = pool.sizes, table.shape[1]
    splits = -(-width * page // SPLIT)
    keys, values, scales = pool.keys, pool.values, (None, None)
    if isinstance(keys, Int8) and isinstance(values, Int8):
        q = kv_int8.turned(q).astype(q.dtype)
        keys, values, scales = keys.values, values.values, (keys.scale, values.scale)
    out = kernels.paged_attention(
        q[:, 0] * (q.shape[-1] ** -0.5 if scale is None else scale),
        keys,
        values,
        jnp.pad(table, ((0, 0), (0, -width % splits))),
        lengths,
        *scales,
        pages_per_compute_block=1,
        k_splits=splits,
    )
    return out[:, None]


def _first(pools: Pools) -> Pool:
    return next(x for x in pools if x is not None)


def _layout(pool: Pool) -> tuple[PartitionSpec, Any, Any]:
    """How a pool's arrays lie on the current mesh, and what divides its pages, as rows, and its heads."""
    mesh = jax.sharding.get_abstract_mesh()
    pages, _, heads = pool.sizes
    by = (None, None) if mesh.empty else mesh_lib.fitting(mesh, "bk", (pages, heads))
    of = {"b": by[0], "k": by[1], "_": None}
    return PartitionSpec(*(of[letter] for letter in pool.axes)), by[0], by[1]


def _on_devices(fn: Any, in_specs: Any, out_specs: Any) -> Any:
    """`fn` on each device's own parts."""
    if jax.sharding.get_abstract_mesh().empty:
        return fn
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
