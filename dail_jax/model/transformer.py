"""The forward pass, three ways through the blocks of `blocks`.

`encode` reads whole rows for training, `prefill` reads prompts and keeps their keys and values, `decode_step` adds one
token to each row of a cache. All return final hidden states; `unembed` is separate, so that sampling projects one
position per row and the loss projects chunks. Positions are -1 on padding, and RoPE and masks follow from them alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dail_jax import mesh as mesh_lib
from dail_jax.mesh import constrain
from dail_jax.model import attention, deltanet, int8, kv_int8, pages
from dail_jax.model.blocks import Bound, block
from dail_jax.model.families import Layer, ModelConfig, Rope
from dail_jax.model.int8 import Int8, Matrix
from dail_jax.model.layers import Angles, rms_norm
from dail_jax.model.lora import Lora
from dail_jax.model.weights import Params, declare, of_layer

TILE = 16  # cache slots come in multiples of this: a TPU lays out other sizes differently and copies them on every call


@struct.dataclass
class Cache:
    """Keys and values of B rows, or the state of a delta net in their place, one pair of arrays per layer.

    Rows form G blocks of M; the rows of a block share one prompt buffer. The buffer may hold several prompts
    (`entries`) side by side: `row_prompt` gives the one that each row continues. A layer with a window has slots for
    what a query may still see (`slots_of`): its own tokens go round in a ring, and of a prompt it has the end.

    Where keys and values lie in pages, `pools` holds those of the layers that `pages.is_paged` names, rows' and prompts'
    alike. Of such layers the other arrays are None.

    Attributes:
      k, v: L arrays [B, K, S, H], the rows' own tokens from slot 0 on, with RoPE already applied to the keys, or their
        int8 form (`kv_int8`), with scales [B, K, S]. Of a delta net, the two parts of the rows' states.
      count: [B] int32, the number of own tokens of each row.
      prompt_k, prompt_v: L arrays [G, K, P, H]. Of a delta net, the states at the prompts' ends: as k and v, but with
        the third axis E times as long.
      prompt_length: [G, E] int32, in tokens; 0 for an entry that holds no prompt.
      row_prompt: [B] int32.
      pools: L pools of pages, or None.
      states: the layers that have a state.
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]
    count: jax.Array
    prompt_k: tuple[Any, ...]
    prompt_v: tuple[Any, ...]
    prompt_length: jax.Array
    row_prompt: jax.Array
    pools: pages.Pools
    states: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def entries(self) -> int:
        return self.prompt_length.shape[1]

    def own_mask(self, layer: int, slot: jax.Array | int, window: int | None) -> jax.Array:
        """[B, S]: which own tokens in a layer's cache a row's next token sees, if it is in slot `slot` of `Recent`."""
        slots, count = self.k[layer].shape[2], self.count[:, None]
        index = jnp.arange(slots)
        index = (
            index + (count - 1 - index) // slots * slots
        )  # of the newest token in each slot, negative if there is none
        return (index >= 0) if window is None else (index >= 0) & (index > count + slot - window)

    def prompt_mask(self, layer: int, positions: jax.Array, window: int | None) -> jax.Array:
        """[B, P]: which prompt slots of a layer's cache a row's token at positions [B, 1] sees."""
        length = jnp.repeat(self.prompt_length, self.row_prompt.shape[0] // self.prompt_length.shape[0], 0)[..., None]
        slots = self.prompt_k[layer].shape[2] // self.entries
        at = jnp.arange(slots) + jnp.maximum(length - slots, 0)  # [B,E,P/E]
        mask = (at < length) & (jnp.arange(self.entries) == self.row_prompt[:, None])[..., None]
        if window is not None:
            mask &= at > positions[..., None] - window
        return mask.reshape(len(mask), -1)


@struct.dataclass
class Recent:
    """The newest tokens of B rows, which `commit` moves to the cache.

    Here all rows write to the same slot, and the cache is only read: on a TPU, writing each row at its own position is
    a loop over rows, too slow to run for every token. Pages have a kernel for it: their pools are here as long as they are
    written to.

    Attributes:
      k, v: L arrays [B, K, C, H]. Of a delta net, the state after the newest token. None where there are pages.
      held: [B, C] int32, the position of the token in each slot, -1 if the slot is empty.
      pools: the cache's.
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]
    held: jax.Array
    pools: pages.Pools


def slots_of(layer: Layer, slots: int) -> int:
    """How many of `slots` cache slots a layer needs: a query sees itself and the window's other tokens, before it."""
    return slots if layer.window is None else min(slots, max(-(-(layer.window - 1) // TILE), 1) * TILE)


def can_rewind(cfg: ModelConfig) -> bool:
    """Whether a row can go back to any of its tokens: all layers keep the keys and values of all tokens, as those do whose
    keys can lie in pages."""
    return all(map(pages.is_paged, cfg.layers))


def empty_cache(
    cfg: ModelConfig,
    rows: int,
    slots: int,
    blocks: int,
    prompt_slots: int,
    dtype,
    entries: int = 1,
    paged: tuple[int, int] | None = None,
    kv_dtype: str | None = None,
) -> Cache:
    """An empty cache. `slots` must hold a row's own tokens, plus room for one `Recent` after the last of them.

    `prompt_slots` are those of one of the `entries` of a prompt buffer. `paged` is how many pages there are and how many
    tokens one has; None: no layer is paged. `kv_dtype` is the form of keys and values: `int8`, or None for exact ones.
    """

    def make(rows: int, slots: int, times: int = 1) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        k, v = [], []
        for layer in cfg.layers:
            if paged and pages.is_paged(layer):
                k.append(None)
                v.append(None)
                continue
            shapes, types, form = ((rows, cfg.K, slots_of(layer, slots), cfg.H),) * 2, (dtype, dtype), kv_dtype
            if cfg.deltanet and layer.mixer == "deltanet":
                shapes, types, form = deltanet.shapes(cfg.deltanet, rows), (dtype, jnp.float32), None
            for arrays, (b, heads, size, h), kind in zip((k, v), shapes, types, strict=True):
                shape = (b, heads, times * size, h)
                arrays.append(kv_int8.empty(shape) if form else jnp.zeros(shape, kind))
        return tuple(k), tuple(v)

    (k, v), (prompt_k, prompt_v) = make(rows, slots), make(blocks, prompt_slots, entries)
    return Cache(
        k=k,
        v=v,
        count=jnp.zeros(rows, jnp.int32),
        prompt_k=prompt_k,
        prompt_v=prompt_v,
        prompt_length=jnp.zeros((blocks, entries), jnp.int32),
        row_prompt=jnp.zeros(rows, jnp.int32),
        pools=pages.empty(cfg, *paged, jnp.dtype(kv_dtype or dtype)) if paged else (None,) * cfg.L,
        states=tuple(i for i, layer in enumerate(cfg.layers) if layer.mixer == "deltanet"),
    )


def begin(cache: Cache, chosen: jax.Array, entry: jax.Array) -> Cache:
    """The cache in which the rows `chosen` [B] bool have no tokens of their own and continue prompt `entry` [B].

    States are copied from the end of the prompt; its keys and values stay shared.
    """
    row_prompt = jnp.where(chosen, entry, cache.row_prompt)
    by_block = row_prompt.reshape(cache.prompt_length.shape[0], -1)

    def copy(own: jax.Array, prompts: jax.Array) -> jax.Array:
        prompts = prompts.reshape(*prompts.shape[:2], cache.entries, -1, prompts.shape[3])
        found = jax.vmap(lambda x, which: x[:, which])(prompts, by_block)  # [G,K,M,...]
        return jnp.where(chosen[:, None, None, None], found.swapaxes(1, 2).reshape(own.shape), own)

    def copies(own: tuple, prompts: tuple) -> tuple:
        return tuple(copy(x, prompts[i]) if i in cache.states else x for i, x in enumerate(own))

    return replace(
        cache,
        k=copies(cache.k, cache.prompt_k),
        v=copies(cache.v, cache.prompt_v),
        count=jnp.where(chosen, 0, cache.count),
        row_prompt=row_prompt,
    )


def rewind(cache: Cache, chosen: jax.Array, kept: jax.Array) -> tuple[Cache, jax.Array]:
    """The cache in which the rows `chosen` [B] bool have only the first `kept` [B] of their own tokens, and [B] how many
    tokens all rows' prompts have. What came after these is overwritten as rows grow again."""
    blocks = len(cache.prompt_length)
    prompts = jnp.take_along_axis(cache.prompt_length, cache.row_prompt.reshape(blocks, -1), 1).reshape(-1)
    return replace(cache, count=jnp.where(chosen, kept, cache.count)), prompts


def empty_recent(cache: Cache, slots: int) -> Recent:
    """Room for `slots` tokens of every row of a cache."""

    def room(x: jax.Array) -> jax.Array:
        return constrain(jnp.zeros((*x.shape[:2], slots, *x.shape[3:]), x.dtype), "bk__"[: x.ndim])

    def rooms(own: tuple) -> tuple:
        return tuple(x if i in cache.states else jax.tree.map(room, x) for i, x in enumerate(own))

    k, v = rooms(cache.k), rooms(cache.v)
    return Recent(k, v, jnp.full((len(cache.count), slots), -1, jnp.int32), cache.pools)


def commit(cache: Cache, recent: Recent) -> Cache:
    """The cache with each row's recent tokens, which fill its first slots of `recent`, appended to its own tokens.

    Where a cache is a ring, rows fill all slots of `recent`, whose number divides the ring's; only a row that has ended
    may not. On a GPU, a scatter moves all rows at once. Elsewhere it is an explicit loop over each device's rows, since XLA
    copies the caches for a scatter.
    """

    def at_once(own, new, count):
        place = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
        return jax.tree.map(lambda x, y: place(x, y, count % x.shape[2]), own, new)

    def one_by_one(own, new, count):
        def move(row, own):
            def put(x, y):
                part, place = jax.lax.dynamic_slice_in_dim(y, row, 1), (row, 0, count[row] % x.shape[2], 0)
                return jax.lax.dynamic_update_slice(x, part, place[: x.ndim])

            return jax.tree.map(put, own, new)

        return jax.lax.fori_loop(0, count.shape[0], move, own)

    local = at_once if attention.target() == "gpu" else one_by_one
    grown = [i for i, x in enumerate(cache.k) if x is not None and i not in cache.states]
    old, new = ([x[i] for x in (pair.k, pair.v) for i in grown] for pair in (cache, recent))
    mesh = jax.sharding.get_abstract_mesh()
    if grown and not mesh.empty:
        arrays = mesh_lib.fitting(mesh, "bk", old[0].shape[:2])
        counts = mesh_lib.fitting(mesh, "b", cache.count.shape)
        local = jax.shard_map(local, in_specs=(arrays, arrays, counts), out_specs=arrays, check_vma=False)
    own = local(old, new, cache.count) if grown else []
    k, v = list(recent.k), list(recent.v)  # of a delta net, the newest state is all that there is
    for row, i in enumerate(grown):
        k[i], v[i] = own[row], own[len(grown) + row]
    count = cache.count + (recent.held >= 0).sum(1, dtype=jnp.int32)
    return replace(cache, k=tuple(k), v=tuple(v), count=count, pools=recent.pools)


def encode(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cfg: ModelConfig,
    *,
    lora: Lora | None = None,
    remat: str = "none",
) -> jax.Array:
    """Final hidden states [B,T,D] (after the last norm) of tokens [B,T] at positions [B,T].

    Attention stays within rows. Layers are scanned if they are stacked. `remat` names what the backward pass
    recomputes: none, full, or dots (all but matrix products).
    """
    x, angles = _embed(params, tokens, cfg), _angles(positions, cfg)

    def step(layer: Layer, x: jax.Array, weights: dict, pair: dict | None) -> jax.Array:
        def attend(q, k, v):
            return attention.attend(q, k, v, positions, layer.window, cfg.attention_scale), None

        see = {"attention": attend, "deltanet": functools.partial(deltanet.read, positions)}[layer.mixer]
        bound = Bound(cfg, weights, lora and (pair or {}, lora.scale), angles.get(layer.rope))
        return block(x, bound, layer.mixer, layer.mlp, see)[0]

    if isinstance(params["layers"], list):
        for layer, weights, pair in _each_layer(params, cfg, lora):
            x = _remat(step, remat, prevent_cse=True)(layer, x, weights, pair and pair[0])
    else:
        x = _scan(step, x, params["layers"], lora and lora.tree, cfg, remat)
    return rms_norm(x, params["norm"], cfg.norm_eps, cfg.norm)


def _scan(step: Callable, x: jax.Array, layers: dict, adapter: dict | None, cfg: ModelConfig, remat: str) -> jax.Array:
    """Goes through stacked layers in a loop over the period of their pattern, and through what remains after it.

    So windows and rotations are static in the loop's body. What is looped over is only a view if nothing remains;
    otherwise the body looks up its weights by index, since XLA would copy all but the remaining ones.
    """
    pattern = replace(cfg, layers=cfg.layers[: cfg.period])
    rounds, rest = divmod(cfg.L, cfg.period)
    sizes = {name: len(weight.layers(pattern)) for name, weight in declare(pattern).items()}

    def fold(stacked: dict) -> dict:
        """[L,...] -> [rounds, how many in a period, ...]."""

        def one(name):
            size = sizes[name]
            return lambda x: x[: rounds * size].reshape(rounds, size, *x.shape[1:])

        return {name: jax.tree.map(one(name), leaf) for name, leaf in stacked.items()}

    def look_up(index: jax.Array) -> dict:
        def one(name):
            size = sizes[name]
            return lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size)

        return {name: jax.tree.map(one(name), leaf) for name, leaf in layers.items()}

    def one(i: int, x: jax.Array, weights: Any, pairs: Any) -> jax.Array:
        # Looked up within what is recomputed: otherwise the backward pass would be left a copy of all weights.
        weights = look_up(weights) if rest else weights
        pair = adapter and of_layer(pairs, i, pattern)
        return step(pattern.layers[i], x, of_layer(weights, i, pattern), pair)

    def period(x, inputs):
        for i in range(len(pattern.layers)):
            x = _remat(one, remat)(i, x, *inputs)
        return x, None

    x, _ = jax.lax.scan(period, x, (jnp.arange(rounds) if rest else fold(layers), adapter and fold(adapter)))
    for i in range(cfg.L - rest, cfg.L):
        pair = adapter and of_layer(adapter, i, cfg)
        x = _remat(step, remat, prevent_cse=True)(cfg.layers[i], x, of_layer(layers, i, cfg), pair)
    return x


@jax.named_scope("prefill")
def prefill(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cfg: ModelConfig,
    lora: Lora | None = None,
    kv_dtype: str | None = None,
) -> tuple[jax.Array, list[Any], list[Any]]:
    """Final hidden states [B,T,D] of prompts, and the keys and values [B,K,P,H] of each layer, to be cached.

    Prompts are padded on the right. A layer with a window keeps the end of each: P is `slots_of` the layer and T. A delta
    net has its state at the prompt's end in their place. `kv_dtype` is the form of what is kept, as in `empty_cache`; the
    prompts' own tokens see exact keys.
    """
    length = positions.max(1) + 1
    x, angles, kept = _embed(params, tokens, cfg), _angles(positions, cfg), []
    for layer, weights, pair in _each_layer(params, cfg, lora):

        def attend(q, k, v, layer=layer, weights=weights):
            # Where devices share a row's tokens, they exchange keys and values, not what these are computed from.
            k, v, slots = constrain(k, "btkh"), constrain(v, "btkh"), slots_of(layer, k.shape[1])
            out = attention.attend(q, k, v, positions, layer.window, cfg.attention_scale)
            k, v = _end(k, length, slots), _end(v, length, slots)
            return out, (_quantized(k, v, layer, weights) if kv_dtype else (k, v))

        see = {"attention": attend, "deltanet": functools.partial(deltanet.read, positions)}[layer.mixer]
        x, new = block(x, Bound(cfg, weights, pair, angles.get(layer.rope)), layer.mixer, layer.mlp, see)
        kept.append(new)
    return rms_norm(x, params["norm"], cfg.norm_eps, cfg.norm), [k for k, _ in kept], [v for _, v in kept]


@jax.named_scope("decode_step")
def decode_step(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cfg: ModelConfig,
    cache: Cache,
    recent: Recent,
    slot: jax.Array | int,
    lora: Lora | None = None,
    table: jax.Array | None = None,
) -> tuple[jax.Array, Recent]:
    """Final hidden states [B,D] of one token [B] per row at positions [B], -1 where a row has ended.

    The tokens are stored in slot `slot` of `recent`, or in the pages that `table` [B,W] lists. Each row sees its token,
    its earlier ones and its prompt.
    """
    tokens, positions = tokens[:, None], positions[:, None]
    x, angles, kept, pools = _embed(params, tokens, cfg), _angles(positions, cfg), [], list(recent.pools)
    held = jax.lax.dynamic_update_slice(recent.held, positions, (0, slot))
    live = (positions >= 0)[..., None]
    masks = {
        window: (
            live & cache.own_mask(i, slot, window)[:, None],
            attention.causal_mask(positions, held, window),
            live & cache.prompt_mask(i, positions, window)[:, None],
        )
        for window, i in {
            layer.window: i for i, layer in enumerate(cfg.layers) if cache.k[i] is not None and i not in cache.states
        }.items()
    }
    for i, (layer, weights, pair) in enumerate(_each_layer(params, cfg, lora)):

        def attend(q, k, v, i=i, layer=layer, weights=weights):
            pool = pools[i]
            if pool is not None:
                assert table is not None
                if pages.is_int8(pool):
                    both = _quantized(k.swapaxes(1, 2), v.swapaxes(1, 2), layer, weights)
                    k, v = jax.tree.map(lambda a: a.swapaxes(1, 2), both)
                out, pools[i] = pages.attend(q, k, v, pool, table, positions, cfg.attention_scale)
                return out, (None, None)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            if isinstance(recent.k[i], Int8):
                k, v = _quantized(k, v, layer, weights)
            k, v = _store(recent.k[i], k, slot), _store(recent.v[i], v, slot)
            own, new, prompt = masks[layer.window]
            sets = [
                (cache.k[i], cache.v[i], own, 1),
                (k, v, new, 1),
                (cache.prompt_k[i], cache.prompt_v[i], prompt, cache.entries),
            ]
            return attention.attend_cached(q, sets, cfg.attention_scale), (k, v)

        read = functools.partial(deltanet.read_token, positions, (recent.k[i], recent.v[i]))
        see = {"attention": attend, "deltanet": read}[layer.mixer]
        x, stored = block(x, Bound(cfg, weights, pair, angles.get(layer.rope)), layer.mixer, layer.mlp, see)
        kept.append(stored)
    hidden = rms_norm(x, params["norm"], cfg.norm_eps, cfg.norm)[:, 0]
    return hidden, Recent(tuple(k for k, _ in kept), tuple(v for _, v in kept), held, tuple(pools))


def unembedding(params: Params) -> Matrix:
    """The matrix [V, D] that projects to logits: the embedding itself where the two are tied."""
    return params.get("unembed", params["embed"])


@jax.named_scope("unembed")
def unembed(params: Params, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    return int8.logits(hidden, unembedding(params))


# ---------------------------------------------------------------------------------------------------


def _embed(params: Params, tokens: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Embeddings [B,T,D] of tokens [B,T].

    Each device looks up its share of D for all rows, so that devices exchange rows rather than the table.
    """

    def rows(table: jax.Array, axes: str) -> jax.Array:
        x = constrain(table, axes).at[constrain(tokens, "xt")].get(mode="clip")
        return constrain(constrain(x, "xt" + axes[1:]), "bt" + "_" * (x.ndim - 2))

    embed = params["embed"]
    if isinstance(embed, Int8):
        x = rows(embed.values, "vd").astype(embed.scale.dtype) * rows(embed.scale, "v")[..., None]
    else:
        x = rows(embed, "vd")
    if cfg.embedding_scale is not None:
        x = x * jnp.asarray(cfg.embedding_scale, x.dtype)  # rounded like this where the model was trained
    return x


def _each_layer(params: Params, cfg: ModelConfig, lora: Lora | None) -> Iterator[tuple[Layer, dict, tuple | None]]:
    """Yields each layer with its weights and (its LoRA weights, scale) or None, whether layers are stacked or a list."""
    layers = params["layers"]
    for i, layer in enumerate(cfg.layers):
        weights = layers[i] if isinstance(layers, list) else of_layer(layers, i, cfg)
        yield layer, weights, lora and (of_layer(lora.tree, i, cfg), lora.scale)


def _angles(positions: jax.Array, cfg: ModelConfig) -> dict[Rope | None, Angles]:
    """cos and sin [B,T,1,H/2] in float32 of each rotation that a layer has."""
    found: dict[Rope | None, Angles] = {}
    for rope in dict.fromkeys(layer.rope for layer in cfg.layers if layer.rope is not None):
        frequencies, factor = rope.frequencies(cfg.H)
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        found[rope] = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    return found


def _end(x: jax.Array, length: jax.Array, slots: int) -> jax.Array:
    """The last `slots` tokens of x [B,T,K,H] before each row's length, or its first if it has no more: [B,K,slots,H]."""
    x = x.swapaxes(1, 2)
    if slots == x.shape[2]:
        return x
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, slots, 1)  # noqa: E731
    return jax.vmap(cut)(x, jnp.maximum(length - slots, 0))


def _store(recent: jax.Array | Int8, new: jax.Array | Int8, slot: jax.Array | int) -> jax.Array | Int8:
    """Writes new [B,K,T,H] into recent [B,K,C,H], starting at a slot."""
    put = lambda x, y: jax.lax.dynamic_update_slice(x, y.astype(x.dtype), (0, 0, slot, 0)[: x.ndim])  # noqa: E731
    return jax.tree.map(put, recent, new)


def _quantized(k: jax.Array, v: jax.Array, layer: Layer, weights: dict) -> tuple[Int8, Int8]:
    """The int8 form of a layer's keys and values [B,K,T,H]. After a norm, a bias adds to no two keys the same."""
    biased = "k_bias" in weights and "k_norm" not in weights
    return kv_int8.quantized(k, v, kv_int8.centre_of(weights["k_bias"], layer.rope) if biased else None)


def _remat(step: Callable, policy: str, prevent_cse: bool = False) -> Callable:
    """`step`, whose first argument is static, with what the backward pass recomputes."""
    if policy == "none":
        return step
    policies: dict[str, Any] = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return jax.checkpoint(step, policy=policies[policy], prevent_cse=prevent_cse, static_argnums=0)
