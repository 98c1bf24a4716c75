"""The device side of sampling: a fixed grid of slots, prompts shared by slots, and a scan over tokens.

Slots are grouped into blocks. A block holds `entries` prompts side by side, and each of its slots continues one of
them, so that n samples of one problem read its keys and values once. A slot's two roles are two rows of one batch:

    rows = [block, role, slot in block]        prompt buffers = [block, role], each of entries * prompt_slots

A step projects the hidden states of all rows, draws one token per slot, and runs one forward pass over the drawn
tokens. Shapes never change; finished slots are refilled between chunks by `admit`. Where keys and values lie in pages
(`model.pages`), the host says with each call which pages they are (`sample.pool`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from dail_jax import mesh as mesh_lib
from dail_jax.mesh import constrain
from dail_jax.model import pages as pages_lib
from dail_jax.model import transformer
from dail_jax.model.families import ModelConfig
from dail_jax.model.lora import Lora
from dail_jax.model.weights import Params
from dail_jax.sample import mixture

RUNNING, STOPPED, CUT, BROKEN = 0, 1, 2, 3


@dataclass(frozen=True)
class Grid:
    """The static shapes of one sampler: n = blocks * width slots, rows = roles * n."""

    roles: int
    blocks: int
    width: int  # slots per block
    entries: int  # prompts per block
    prompt_slots: int  # tokens per prompt, padded
    max_tokens: int  # behind a prompt: those of a response, and of what follows from it
    chunk: int  # steps per decode call
    pages: int = 0  # of all devices; 0: every row has a cache of its own
    page: int = pages_lib.PAGE  # tokens per page
    kv_dtype: str | None = None  # of keys and values: int8, or the model's

    @property
    def slots(self) -> int:
        return self.blocks * self.width


@struct.dataclass
class TokenRules:
    """Constraints on responses, by token id: `bias` [V] is added to logits (-inf: never drawn), `stops` [V] bool."""

    bias: jax.Array
    stops: jax.Array


@struct.dataclass
class DecodeState:
    """Everything that persists between decode calls. `slots` slots, B = roles * slots rows, T response tokens.

    Attributes:
      cache: keys and values of B rows and of the prompts.
      hidden: [B, D], what the next token is drawn from.
      prompt_hidden: [G, E, roles, D], the hidden state at each prompt's end.
      prompt_length: [G, E, roles] int32.
      start: [B] int32, the position of each row's first response token.
      key: [slots, 2] uint32, one threefry key per slot, folded with the token's index at each draw.
      length: [slots] int32, tokens drawn so far; negative: how many are still to be read, from the end of `tokens`.
      limit: [slots] int32, the most tokens to draw.
      status: [slots] int32, RUNNING, STOPPED, CUT, or BROKEN where the logits were not finite; nothing is drawn then.
      live: [slots] bool, false once finished or never admitted.
      seen: [slots, V] bool, tokens of the response so far (presence penalty).
      tokens, logq, log_student, log_privileged, by_student: [slots, T], the responses so far.
    """

    cache: transformer.Cache
    hidden: jax.Array
    prompt_hidden: jax.Array
    prompt_length: jax.Array
    start: jax.Array
    key: jax.Array
    length: jax.Array
    limit: jax.Array
    status: jax.Array
    live: jax.Array
    seen: jax.Array
    tokens: jax.Array
    logq: jax.Array
    log_student: jax.Array
    log_privileged: jax.Array
    by_student: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty(grid: Grid, cfg: ModelConfig, dtype) -> DecodeState:
    """A state in which no slot is live."""
    n, rows = grid.slots, grid.slots * grid.roles
    own = -(-(grid.max_tokens + grid.chunk) // transformer.TILE) * transformer.TILE
    paged = (grid.pages, grid.page) if grid.pages else None
    cache = transformer.empty_cache(
        cfg, rows, own, grid.blocks * grid.roles, grid.prompt_slots, dtype, grid.entries, paged, grid.kv_dtype
    )
    return _lay_out(
        DecodeState(
            cache=cache,
            hidden=jnp.zeros((rows, cfg.D), dtype),
            prompt_hidden=jnp.zeros((grid.blocks, grid.entries, grid.roles, cfg.D), dtype),
            prompt_length=jnp.zeros((grid.blocks, grid.entries, grid.roles), jnp.int32),
            start=jnp.zeros(rows, jnp.int32),
            key=jnp.zeros((n, 2), jnp.uint32),
            length=jnp.zeros(n, jnp.int32),
            limit=jnp.zeros(n, jnp.int32),
            status=jnp.zeros(n, jnp.int32),
            live=jnp.zeros(n, bool),
            seen=jnp.zeros((n, cfg.V), bool),
            tokens=jnp.zeros((n, grid.max_tokens), jnp.int32),
            logq=jnp.zeros((n, grid.max_tokens), jnp.float32),
            log_student=jnp.zeros((n, grid.max_tokens), jnp.float32),
            log_privileged=jnp.zeros((n, grid.max_tokens), jnp.float32),
            by_student=jnp.zeros((n, grid.max_tokens), bool),
        )
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4, compiler_options=mesh_lib.UNMERGED)
def load_prompt(
    grid: Grid,
    cfg: ModelConfig,
    params: Params,
    lora: Lora | None,
    state: DecodeState,
    tokens: jax.Array,
    lengths: jax.Array,
    block: jax.Array,
    entry: jax.Array,
    first: jax.Array | None = None,
) -> DecodeState:
    """Prefills one problem's prompts, tokens [roles, prompt_slots] padded on the right, into a block's entry, and into
    the pages from `first` [roles] on."""
    index = jnp.arange(grid.prompt_slots)
    positions = jnp.where(index < lengths[:, None], index, -1).astype(jnp.int32)
    hidden, ks, vs = transformer.prefill(params, tokens, positions, cfg, lora, grid.kv_dtype)
    end = (index == (lengths - 1)[:, None])[..., None]
    last = jnp.where(end, hidden, 0).sum(1)  # exact; a gather along tokens that devices share would fetch all of them
    pools = state.cache.pools
    if first is not None:
        device = block // (grid.blocks // pages_lib.devices())
        keys, values = ([x if pool is not None else None for pool, x in zip(pools, xs, strict=True)] for xs in (ks, vs))
        ks, vs = ([x if pool is None else None for pool, x in zip(pools, xs, strict=True)] for xs in (ks, vs))
        pools = pages_lib.loaded(pools, keys, values, first, device)
    buffers = [state.cache.prompt_k, state.cache.prompt_v]
    keys, values = _put(grid, buffers, [tuple(ks), tuple(vs)], block, entry)
    at = (block * grid.roles, entry)
    length = jax.lax.dynamic_update_slice(state.cache.prompt_length, lengths[:, None], at)
    return _lay_out(
        replace(
            state,
            cache=replace(state.cache, prompt_k=keys, prompt_v=values, prompt_length=length, pools=pools),
            prompt_hidden=state.prompt_hidden.at[block, entry].set(last.astype(state.hidden.dtype)),
            prompt_length=state.prompt_length.at[block, entry].set(lengths),
        )
    )


def _put(grid: Grid, buffers: list[tuple], new: list[tuple], block: jax.Array, entry: jax.Array) -> list[tuple]:
    """Prompt buffers [G * roles,K,P,H] with new keys or values [roles,K,P/E,H] as a block's entry.

    Each device writes to its own blocks, in place, or writes back what is there: XLA would gather a whole buffer to
    update a part of it when it cannot tell which device holds the part.
    """

    arrays = jax.tree.leaves(buffers)
    if not arrays:  # every layer is paged
        return buffers

    def local(buffers, new, first, block, entry):
        own = jax.tree.leaves(buffers)[0].shape[0] // grid.roles
        at = block - first[0]
        row = jnp.clip(at, 0, own - 1) * grid.roles

        def write(buffer, x):
            place = (row, 0, entry * x.shape[2], 0)[: x.ndim]
            old = jax.lax.dynamic_slice(buffer, place, x.shape)
            x = jnp.where((at >= 0) & (at < own), x.astype(buffer.dtype), old)
            return jax.lax.dynamic_update_slice(buffer, x, place)

        return jax.tree.map(write, buffers, new)

    mesh, first = jax.sharding.get_abstract_mesh(), jnp.arange(grid.blocks)  # each device sees its own first block
    if not mesh.empty:
        whole = mesh_lib.fitting(mesh, "bk", arrays[0].shape[:2])
        specs = (whole, PartitionSpec(None, whole[1]), PartitionSpec(whole[0]), PartitionSpec(), PartitionSpec())
        local = jax.shard_map(local, in_specs=specs, out_specs=whole, check_vma=False)
    return local(buffers, new, first, block, entry)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def admit(
    grid: Grid,
    state: DecodeState,
    seed: jax.Array,
    chosen: jax.Array,
    entry: jax.Array,
    key_data: jax.Array,
    limit: jax.Array,
    ends: tuple[jax.Array, jax.Array] | None = None,
) -> DecodeState:
    """Starts a sample in every slot of `chosen` [slots] bool, from its block's `entry` [slots].

    The slot's key is `seed` [2] folded with each column of its key data [n, 3] uint32 (problem hash, sample), so that
    a sample's randomness does not depend on where or when it runs. Of pages that a prompt does not fill, each row gets
    its own: `ends` are two arrays [B], from which page to which.
    """
    blocks = jnp.repeat(jnp.arange(grid.blocks), grid.width)
    rows = lambda x: _to_rows(grid, x)  # noqa: E731
    hidden = rows(jnp.moveaxis(state.prompt_hidden[blocks, entry], 1, 0))
    start = rows(state.prompt_length[blocks, entry].T)
    fresh = rows(jnp.broadcast_to(chosen, (grid.roles, grid.slots)))
    cache = transformer.begin(state.cache, fresh, rows(jnp.broadcast_to(entry, (grid.roles, grid.slots))))
    if ends is not None:
        cache = replace(cache, pools=pages_lib.copied(cache.pools, *ends))
    return _lay_out(
        replace(
            state,
            cache=cache,
            hidden=jnp.where(fresh[:, None], hidden, state.hidden),
            start=jnp.where(fresh, start, state.start),
            **_started(state, seed, chosen, key_data, 0, limit),
        )
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def go_on(
    grid: Grid,
    state: DecodeState,
    seed: jax.Array,
    chosen: jax.Array,
    kept: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
    key_data: jax.Array,
    limit: jax.Array,
) -> DecodeState:
    """Starts another response in every slot of `chosen` [slots] bool, where its last one lies.

    Before it stand the prompt, the first `kept` [slots] tokens behind that, whose keys and values are there, and tokens that
    are read first, one a step as if they were drawn: the last `count` [slots] of tokens [slots, any]. Keys are as in `admit`.
    With a limit of 0 nothing is drawn; the last token's keys and values are then left out, as a response's always are.
    """
    rows = lambda x: _to_rows(grid, jnp.broadcast_to(x, (grid.roles, *x.shape)))  # noqa: E731
    cache, prompts = transformer.rewind(state.cache, rows(chosen), rows(kept))
    given = jnp.where(chosen[:, None], tokens, state.tokens[:, grid.max_tokens - tokens.shape[1] :])
    return _lay_out(
        replace(
            state,
            cache=cache,
            start=jnp.where(rows(chosen), prompts + rows(kept + count), state.start),
            tokens=state.tokens.at[:, grid.max_tokens - tokens.shape[1] :].set(given),
            **_started(state, seed, chosen, key_data, -count, limit),
        )
    )


def _started(state: DecodeState, seed, chosen, key_data, length, limit) -> dict[str, jax.Array]:
    """The fields of slots `chosen` that start, each with a key of its own."""

    def fold(data):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.key_data(functools.reduce(jax.random.fold_in, data, key))

    return {
        "key": jnp.where(chosen[:, None], jax.vmap(fold)(key_data), state.key),
        "length": jnp.where(chosen, length, state.length),
        "limit": jnp.where(chosen, limit, state.limit),
        "status": jnp.where(chosen, RUNNING, state.status),
        "live": state.live | chosen,
        "seen": state.seen & ~chosen[:, None],
    }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4, compiler_options=mesh_lib.UNMERGED)
def decode(
    grid: Grid,
    cfg: ModelConfig,
    params: Params,
    lora: Lora | None,
    state: DecodeState,
    rules: TokenRules,
    sampling: mixture.SamplingParams,
    table: jax.Array | None = None,
) -> DecodeState:
    """Runs `grid.chunk` steps, each of which draws one token per live slot, or reads one that is given.

    `table` [B,W] lists the pages of every row, with room for the tokens to come.
    """

    def step(carry, slot):
        state, recent = carry
        return _step(grid, cfg, params, lora, state, recent, slot, rules, sampling, table), None

    recent = transformer.empty_recent(state.cache, grid.chunk)
    state = replace(state, cache=replace(state.cache, pools=(None,) * cfg.L))  # not twice in what the loop carries
    (state, recent), _ = jax.lax.scan(step, (state, recent), jnp.arange(grid.chunk))
    return _lay_out(replace(state, cache=transformer.commit(state.cache, recent)))


def _step(
    grid: Grid,
    cfg: ModelConfig,
    params: Params,
    lora: Lora | None,
    state: DecodeState,
    recent: transformer.Recent,
    at: jax.Array,
    rules: TokenRules,
    sampling: mixture.SamplingParams,
    table: jax.Array | None,
) -> tuple[DecodeState, transformer.Recent]:
    """Draws one token per live slot and adds it to the rows' keys and values, in slot `at` of `recent`."""
    index = state.length
    logits = transformer.unembed(params, _to_slots(grid, state.hidden)) + rules.bias
    with jax.named_scope("draw"):
        drawn = mixture.draw_tokens(logits, _uniform(state.key, index), sampling, state.seen)
    given = jnp.take_along_axis(state.tokens, (index % grid.max_tokens)[:, None], 1)[:, 0]
    token = jnp.where(index < 0, given, drawn.token)
    drawn = replace(drawn, token=token, finite=drawn.finite | (index < 0))
    with jax.named_scope("record"):
        state = _record(grid, state, rules, drawn)
    rows = lambda x: _to_rows(grid, jnp.broadcast_to(x, (grid.roles, *x.shape)))  # noqa: E731
    position = jnp.where(rows(state.live), state.start + rows(jnp.minimum(index, grid.max_tokens - 1)), -1)
    hidden, recent = transformer.decode_step(
        params, rows(drawn.token), position, cfg, state.cache, recent, at, lora, table
    )
    return _lay_out(replace(state, hidden=hidden.astype(state.hidden.dtype)), counters="b"), recent


def _record(grid: Grid, state: DecodeState, rules: TokenRules, drawn: mixture.DrawnTokens) -> DecodeState:
    """The state with the drawn tokens appended to live slots' responses, and with finished slots no longer live."""
    now, index = state.live & drawn.finite, state.length
    own = now & (index >= 0)
    stopped, cut = rules.stops[drawn.token] & (index >= 0), index + 1 >= state.limit
    status = jnp.where(stopped, STOPPED, jnp.where(cut, CUT, RUNNING))
    status = jnp.where(drawn.finite, status, BROKEN)
    place = (jnp.arange(grid.slots), jnp.where(own, index, grid.max_tokens))  # out of bounds: dropped
    return replace(
        state,
        length=jnp.where(now, index + 1, index),
        status=jnp.where(state.live, status, state.status),
        live=now & ~(stopped | cut),
        seen=state.seen.at[place[0], drawn.token].max(own),
        tokens=state.tokens.at[place].set(drawn.token, mode="drop"),
        logq=state.logq.at[place].set(drawn.logq, mode="drop"),
        log_student=state.log_student.at[place].set(drawn.log_student, mode="drop"),
        log_privileged=state.log_privileged.at[place].set(drawn.log_privileged, mode="drop"),
        by_student=state.by_student.at[place].set(drawn.by_student, mode="drop"),
    )


@functools.partial(jax.jit, donate_argnums=0)
def stop(state: DecodeState, chosen: jax.Array) -> DecodeState:
    """Ends the samples in the slots of `chosen` [slots] bool where they are."""
    return _lay_out(replace(state, live=state.live & ~chosen))


@jax.jit
def read(state: DecodeState, slot: jax.Array) -> tuple[jax.Array, ...]:
    """One slot's response: tokens, logq, log_student, log_privileged, by_student, each [T]."""
    fields = (state.tokens, state.logq, state.log_student, state.log_privileged, state.by_student)
    return tuple(constrain(jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), "_") for x in fields)


def _uniform(keys: jax.Array, index: jax.Array) -> jax.Array:
    """[slots, 2] numbers in [0, 1) from keys [slots, 2] and each slot's token index [slots]."""

    def one(data, i):
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, i), (2,), jnp.float32)

    return jax.vmap(one)(keys, index)


def _to_rows(grid: Grid, x: jax.Array) -> jax.Array:
    """[roles, slots, ...] -> [B, ...]."""
    x = x.reshape(grid.roles, grid.blocks, grid.width, *x.shape[2:])
    return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])


def _to_slots(grid: Grid, x: jax.Array) -> jax.Array:
    """[B, ...] -> [roles, slots, ...]."""
    x = x.reshape(grid.blocks, grid.roles, grid.width, *x.shape[1:])
    return x.swapaxes(0, 1).reshape(grid.roles, grid.slots, *x.shape[3:])


def _lay_out(state: DecodeState, counters: str = "_") -> DecodeState:
    """Keeps caches sharded by row and kv head, responses by slot, and `counters`, which the host reads, replicated."""
    cache = state.cache
    by_head = lambda x: constrain(x, "bk__"[: x.ndim])  # noqa: E731
    names = ("k", "v", "prompt_k", "prompt_v")
    cache = replace(cache, **{x: jax.tree.map(by_head, getattr(cache, x)) for x in names})
    cache = replace(cache, pools=pages_lib.laid_out(cache.pools))
    axes: dict[str, str] = dict.fromkeys(("length", "limit", "status", "live"), counters)
    axes |= dict.fromkeys(("tokens", "logq", "log_student", "log_privileged", "by_student", "hidden"), "b_")
    axes["seen"] = "bv"
    return replace(state, cache=cache, **{name: constrain(getattr(state, name), of) for name, of in axes.items()})
