"""The forward pass: one block function, and three ways through it.

`encode` reads whole rows for training, `prefill` reads prompts and keeps their keys and values, `decode_step` adds one
token to each row of a cache. All return final hidden states; `unembed` is separate, so that sampling projects one
position per row and the loss projects chunks. Positions are -1 on padding, and RoPE and masks follow from them alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from dail_jax import mesh as mesh_lib
from dail_jax.mesh import constrain
from dail_jax.model import attention
from dail_jax.model.families import ModelConfig
from dail_jax.model.lora import Lora
from dail_jax.model.weights import Params


@struct.dataclass
class Cache:
    """Keys and values of B rows, one array per layer.

    Rows form G blocks of M; the rows of a block share one prompt buffer. The buffer may hold several prompts
    (`entries`) side by side: `prompt_owner` gives the prompt that each slot belongs to, `row_prompt` the one that each
    row continues.

    Attributes:
      k, v: L arrays [B, K, S, H], the rows' own tokens from slot 0 on, with RoPE already applied to the keys.
      count: [B] int32, the number of own tokens of each row.
      prompt_k, prompt_v: L arrays [G, K, P, H].
      prompt_owner: [G, P] int32, -1 on padding.
      row_prompt: [B] int32.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    count: jax.Array
    prompt_k: tuple[jax.Array, ...]
    prompt_v: tuple[jax.Array, ...]
    prompt_owner: jax.Array
    row_prompt: jax.Array
    entries: int = struct.field(pytree_node=False, default=1)

    def prompt_mask(self) -> jax.Array:
        """[B, P]: which prompt slots each row sees."""
        blocks = self.row_prompt.reshape(self.prompt_owner.shape[0], -1, 1)
        return (self.prompt_owner[:, None, :] == blocks).reshape(self.row_prompt.shape[0], -1)


@struct.dataclass
class Recent:
    """The newest tokens of B rows, which `commit` moves to the cache.

    Here all rows write to the same slot, and the cache is only read: on a TPU, writing each row at its own position is
    a loop over rows, too slow to run for every token.

    Attributes:
      k, v: L arrays [B, K, C, H].
      held: [B, C] int32, the position of the token in each slot, -1 if the slot is empty.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    held: jax.Array


def empty_cache(
    cfg: ModelConfig, rows: int, slots: int, blocks: int, prompt_slots: int, dtype, entries: int = 1
) -> Cache:
    """An empty cache. `slots` must hold a row's own tokens, plus room for one `Recent` after the last of them."""
    own, prompt = (rows, cfg.K, slots, cfg.H), (blocks, cfg.K, prompt_slots, cfg.H)
    return Cache(
        k=tuple(jnp.zeros(own, dtype) for _ in range(cfg.L)),
        v=tuple(jnp.zeros(own, dtype) for _ in range(cfg.L)),
        count=jnp.zeros(rows, jnp.int32),
        prompt_k=tuple(jnp.zeros(prompt, dtype) for _ in range(cfg.L)),
        prompt_v=tuple(jnp.zeros(prompt, dtype) for _ in range(cfg.L)),
        prompt_owner=jnp.full((blocks, prompt_slots), -1, jnp.int32),
        row_prompt=jnp.zeros(rows, jnp.int32),
        entries=entries,
    )


def empty_recent(cache: Cache, slots: int) -> Recent:
    """Room for `slots` tokens of every row of a cache."""
    rows, heads, _, h = cache.k[0].shape
    make = lambda: tuple(constrain(jnp.zeros((rows, heads, slots, h), x.dtype), "bk__") for x in cache.k)  # noqa: E731
    return Recent(make(), make(), jnp.full((rows, slots), -1, jnp.int32))


def commit(cache: Cache, recent: Recent) -> Cache:
    """The cache with each row's recent tokens, which fill its first slots of `recent`, appended to its own tokens.

    It is an explicit loop over each device's rows: XLA turns a batched update into a scatter, which copies the caches.
    """

    def local(own, new, count):
        def move(row, own):
            part = [jax.lax.dynamic_slice_in_dim(x, row, 1) for x in new]
            return [jax.lax.dynamic_update_slice(x, y, (row, 0, count[row], 0)) for x, y in zip(own, part, strict=True)]

        return jax.lax.fori_loop(0, count.shape[0], move, own)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        arrays = mesh_lib.fitting(mesh, "bk__", cache.k[0].shape)
        counts = mesh_lib.fitting(mesh, "b", cache.count.shape)
        local = jax.shard_map(local, in_specs=(arrays, arrays, counts), out_specs=arrays, check_vma=False)
    own = local([*cache.k, *cache.v], [*recent.k, *recent.v], cache.count)
    half = len(cache.k)
    count = cache.count + (recent.held >= 0).sum(1, dtype=jnp.int32)
    return replace(cache, k=tuple(own[:half]), v=tuple(own[half:]), count=count)


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
    x, angles, layers = _embed(params, tokens), _angles(positions, cfg), params["layers"]

    def attend(q, k, v):
        return attention.attend(q, k, v, positions), None

    def step(x, inputs):
        weights, pair = inputs
        return _block(x, weights, lora and (pair, lora.scale), angles, cfg, attend)

    if isinstance(layers, list):
        layer = _remat(step, remat, prevent_cse=True)
        for i, weights in enumerate(layers):
            x, _ = layer(x, (weights, lora and lora.layer(i)))
    else:
        x, _ = jax.lax.scan(_remat(step, remat), x, (layers, lora and lora.tree))
    return _norm(x, params["norm"], cfg)


@jax.named_scope("prefill")
def prefill(
    params: Params, tokens: jax.Array, positions: jax.Array, cfg: ModelConfig, lora: Lora | None = None
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """Final hidden states [B,T,D] of prompts, and the keys and values [B,K,T,H] of each layer, to be cached."""
    x, angles, kept = _embed(params, tokens), _angles(positions, cfg), []

    def attend(q, k, v):
        # Where devices share a row's tokens, they exchange keys and values, not what these are computed from.
        k, v = constrain(k, "btkh"), constrain(v, "btkh")
        return attention.attend(q, k, v, positions), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    for weights, pair in _each_layer(params, cfg, lora):
        x, new = _block(x, weights, pair, angles, cfg, attend)
        kept.append(new)
    return _norm(x, params["norm"], cfg), [k for k, _ in kept], [v for _, v in kept]


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
) -> tuple[jax.Array, Recent]:
    """Final hidden states [B,D] of one token [B] per row at positions [B], -1 where a row has ended.

    The tokens are stored in slot `slot` of `recent`. Each row sees its token, its earlier ones and its prompt.
    """
    tokens, positions = tokens[:, None], positions[:, None]
    x, angles, kept = _embed(params, tokens), _angles(positions, cfg), []
    held = jax.lax.dynamic_update_slice(recent.held, positions, (0, slot))
    live = (positions >= 0)[..., None]
    own = live & (jnp.arange(cache.k[0].shape[2]) < cache.count[:, None])[:, None]
    new, prompt = attention.causal_mask(positions, held), live & cache.prompt_mask()[:, None]
    for i, (weights, pair) in enumerate(_each_layer(params, cfg, lora)):

        def attend(q, k, v, i=i):
            k, v = _store(recent.k[i], k, slot), _store(recent.v[i], v, slot)
            sets = [
                (cache.k[i], cache.v[i], own, 1),
                (k, v, new, 1),
                (cache.prompt_k[i], cache.prompt_v[i], prompt, cache.entries),
            ]
            return attention.attend_cached(q, sets), (k, v)

        x, stored = _block(x, weights, pair, angles, cfg, attend)
        kept.append(stored)
    hidden = _norm(x, params["norm"], cfg)[:, 0]
    return hidden, Recent(tuple(k for k, _ in kept), tuple(v for _, v in kept), held)


def unembedding(params: Params) -> jax.Array:
    """The matrix [V, D] that projects to logits: the embedding itself where the two are tied."""
    return params.get("unembed", params["embed"])


@jax.named_scope("unembed")
def unembed(params: Params, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    return jnp.einsum("...d,vd->...v", hidden, unembedding(params), preferred_element_type=jnp.float32)


# ---------------------------------------------------------------------------------------------------


def _embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Embeddings [B,T,D] of tokens [B,T].

    Each device looks up its share of D for all rows, so that devices exchange rows rather than the table.
    """
    x = constrain(params["embed"], "vd").at[constrain(tokens, "xt")].get(mode="clip")
    return constrain(constrain(x, "xtd"), "bt_")


def _each_layer(params: Params, cfg: ModelConfig, lora: Lora | None) -> Iterator[tuple[dict, tuple | None]]:
    """Yields each layer's (weights, (LoRA weights, scale) or None), whether layers are stacked or a list."""
    layers = params["layers"]
    for i in range(cfg.L):
        weights = layers[i] if isinstance(layers, list) else {k: w[i] for k, w in layers.items()}
        yield weights, lora and (lora.layer(i), lora.scale)


def _block(x, weights, pair, angles, cfg, attend):
    """One layer: x [B,T,D] -> ([B,T,D], what `attend` keeps).

    `pair` is (this layer's LoRA, scale) or None. `attend` takes q [B,T,N,H], k and v [B,T,K,H] and returns the
    attention's output [B,T,N,H] and whatever its caller keeps of k and v.
    """
    with jax.named_scope("attend"):
        y = _norm(x, weights["attn_norm"], cfg)
        q = _linear(y, weights, "q", pair)
        k = _linear(y, weights, "k", pair)
        v = _linear(y, weights, "v", pair)
        if cfg.qk_norm:
            q, k = _norm(q, weights["q_norm"], cfg), _norm(k, weights["k_norm"], cfg)
        out, kept = attend(_rotate(q, angles), _rotate(k, angles), v)
        x = x + _linear(constrain(out, "btnh"), weights, "o", pair)
    with jax.named_scope("mlp"):
        y = _norm(constrain(x, "bt_"), weights["mlp_norm"], cfg)
        gate = _linear(y, weights, "gate", pair)
        up = _linear(y, weights, "up", pair)
        x = x + _linear(jax.nn.silu(gate) * up, weights, "down", pair)
    return constrain(x, "bt_"), kept


def _linear(x, weights, name, pair):
    """x [B,T,*inputs] times weight `name` [*inputs,*outputs], plus its bias, plus its LoRA term: [B,T,*outputs]."""
    y = _times(x, weights[name])
    if f"{name}_bias" in weights:
        y = y + weights[f"{name}_bias"]
    if pair is not None and name in pair[0]:
        tree, scale = pair
        a, b = tree[name]["a"].astype(x.dtype), tree[name]["b"].astype(x.dtype)
        y = y + scale * _expand(_times(x, a), b)
    return y


def _times(x: jax.Array, w: jax.Array) -> jax.Array:
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


def _norm(x: jax.Array, weight: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.norm_eps)
    return weight * y.astype(x.dtype)


def _angles(positions: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B,T,1,H/2] in float32."""
    frequencies, factor = cfg.rope.frequencies(cfg.H)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """RoPE on [B,T,N,H] or [B,T,K,H], with halves paired as in Hugging Face."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _store(recent: jax.Array, new: jax.Array, slot: jax.Array | int) -> jax.Array:
    """Writes new [B,T,K,H] into recent [B,K,C,H], starting at a slot."""
    return jax.lax.dynamic_update_slice(recent, new.swapaxes(1, 2).astype(recent.dtype), (0, 0, slot, 0))


def _remat(step, policy: str, prevent_cse: bool = False):
    if policy == "none":
        return step
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    return jax.checkpoint(step, policy=policies[policy], prevent_cse=prevent_cse)
