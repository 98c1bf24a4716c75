"""A mixture of experts: a router picks a few of J feed-forward networks for each token, and their outputs are weighed.

No expert multiplies a token that it was not picked for, and no token is dropped: tokens are put in order by expert, so
that each expert's are adjacent. What a token gets depends on no other token. Experts are divided over the mesh axis of
letter J; every device adds up what its own experts say about the tokens that it sees, and the devices' sums are added.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dail_jax import mesh as mesh_lib
from dail_jax.model import attention

TILES = 16  # whose experts' weights are looked up and multiplied at once, where there is no kernel
TILE = 128  # tokens a tile, at most

Experts = tuple[jax.Array, jax.Array, jax.Array]  # gate and up [J,D,F], down [J,F,D]


def route(x: jax.Array, router: jax.Array, top: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """The `top` experts of each token, [B,T,top] int32, and their weights, float32; x [B,T,D], router [D,J].

    The weights are probabilities among all experts, or with `normalise` among those picked.
    """
    logits = jnp.einsum("btd,dj->btj", x, router, preferred_element_type=jnp.float32)
    weights, picked = jax.lax.top_k(jax.nn.softmax(mesh_lib.constrain(logits, "bt_")), top)
    return picked, weights / weights.sum(-1, keepdims=True) if normalise else weights


def apply(x: jax.Array, picked: jax.Array, weights: jax.Array, experts: Experts) -> jax.Array:
    """The weighed sum [B,T,D] of what each token's experts make of it: x [B,T,D], picked and weights [B,T,top].

    It runs XLA's ragged product on a TPU, and a loop over tiles of tokens elsewhere, where XLA would multiply all
    tokens by all experts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _apply(x, picked, weights, experts)
    rows = mesh_lib.fitting(mesh, "bt_", x.shape)
    axis = mesh_lib.RULES["j"]

    def local(x, picked, weights, experts):
        first = jax.lax.axis_index(axis) * experts[0].shape[0]
        return jax.lax.psum(_apply(x, picked - first, weights, experts), axis)

    specs = (rows, rows, rows, PartitionSpec(axis))
    return jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)(x, picked, weights, experts)


def _apply(x: jax.Array, picked: jax.Array, weights: jax.Array, experts: Experts) -> jax.Array:
    """`apply` with some of the experts: those picked that are not among them, by index, add nothing."""
    ragged = attention.target() == "tpu"
    (b, t, d), top, j = x.shape, picked.shape[-1], experts[0].shape[0]
    tokens = jnp.repeat(x.reshape(-1, d), top, 0)  # one row for each pick
    size = 1 if ragged else min(TILE, max(8, 1 << (len(tokens) // j).bit_length()))
    tiles = len(tokens) if ragged else -(-(len(tokens) // size + min(j, len(tokens))) // TILES) * TILES
    counts, place = _places(picked.reshape(-1), j, size, tiles * size)
    source = jnp.full(tiles * size, len(tokens)).at[place].set(jnp.arange(len(tokens)), mode="drop")
    sorted_tokens = _move(tokens, source, place)
    if ragged:
        out = _ragged(sorted_tokens, counts, experts)
    else:
        ends = jnp.cumsum(-(-counts // size))
        expert = jnp.minimum(jnp.searchsorted(ends, jnp.arange(tiles), side="right"), j - 1)
        out = _by_tiles(sorted_tokens.reshape(tiles, size, d), expert, ends[-1], experts).reshape(-1, d)
    out = _move(out, place, source).reshape(b, t, top, d)
    return jnp.einsum("btkd,btk->btd", out.astype(jnp.float32), weights).astype(x.dtype)


def _places(picked: jax.Array, j: int, size: int, total: int) -> tuple[jax.Array, jax.Array]:
    """How many tokens each of J experts has, [J], and each token's row, where experts begin at multiples of `size`.

    Tokens of other experts get row `total`, which does not exist.
    """
    mine = (picked >= 0) & (picked < j)
    expert = jnp.where(mine, picked, j)
    order = jnp.argsort(expert, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    counts = (expert[:, None] == jnp.arange(j)).sum(0, dtype=jnp.int32)
    padded = -(-counts // size) * size
    shift = (jnp.cumsum(padded) - padded) - (jnp.cumsum(counts) - counts)
    return counts, jnp.where(mine, rank + shift[jnp.minimum(expert, j - 1)], total)


@jax.custom_vjp
def _move(x: jax.Array, source: jax.Array, place: jax.Array) -> jax.Array:
    """Rows `source` of x, zeros where there is no such row; `place` says where each row of x goes.

    The gradient is looked up as well: rows move to different places, so that nothing has to be added up.
    """
    return x.at[source].get(mode="fill", fill_value=0)


_move.defvjp(
    lambda x, source, place: (_move(x, source, place), (source, place)),
    lambda saved, g: (_move(g, saved[1], saved[0]), None, None),
)


def _mlp(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Tiles [U,t,D] through one expert each, [U,D,F] and [U,F,D]."""
    hidden = jax.nn.silu(jnp.einsum("utd,udf->utf", x, gate)) * jnp.einsum("utd,udf->utf", x, up)
    return jnp.einsum("utf,ufd->utd", hidden, down)


def _ragged(x: jax.Array, counts: jax.Array, experts: Experts) -> jax.Array:
    """Rows [R,D] in order of their experts, each through its own. Rows beyond the sum of counts are meaningless."""
    gate, up, down = experts
    hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate, counts)) * jax.lax.ragged_dot(x, up, counts)
    return jax.lax.ragged_dot(hidden, down, counts)


@jax.custom_vjp
def _by_tiles(x: jax.Array, expert: jax.Array, used: jax.Array, experts: Experts) -> jax.Array:
    """Tiles [U,t,D], the first `used` of them through one expert [U] each, TILES at a time; zeros beyond.

    How many rounds there are is known only when it runs, so that the gradient is written out: JAX cannot reverse such a
    loop. It runs each tile's expert again.
    """

    def one(i, out):
        tiles, weights = _tiles(i, x, expert, experts)
        return jax.lax.dynamic_update_slice_in_dim(out, _mlp(tiles, *weights), i * TILES, 0)

    return jax.lax.fori_loop(0, -(-used // TILES), one, jnp.zeros_like(x))


def _by_tiles_backward(saved, g):
    x, expert, used, experts = saved

    def one(i, grads):
        (tiles, weights), (dx, dexperts) = _tiles(i, x, expert, experts), grads
        _, backward = jax.vjp(_mlp, tiles, *weights)
        dtiles, *dweights = backward(jax.lax.dynamic_slice_in_dim(g, i * TILES, TILES))
        where = jax.lax.dynamic_slice_in_dim(expert, i * TILES, TILES)
        dexperts = tuple(a.at[where].add(b) for a, b in zip(dexperts, dweights, strict=True))
        return jax.lax.dynamic_update_slice_in_dim(dx, dtiles, i * TILES, 0), dexperts

    zeros = jax.tree.map(jnp.zeros_like, (x, experts))
    dx, dexperts = jax.lax.fori_loop(0, -(-used // TILES), one, zeros)
    return dx, None, None, dexperts


_by_tiles.defvjp(lambda *args: (_by_tiles(*args), args), _by_tiles_backward)


def _tiles(i: jax.Array, x: jax.Array, expert: jax.Array, experts: Experts) -> tuple[jax.Array, Experts]:
    """Round i's tiles and the weights of their experts."""
    where = jax.lax.dynamic_slice_in_dim(expert, i * TILES, TILES)
    gate, up, down = (w[where] for w in experts)
    return jax.lax.dynamic_slice_in_dim(x, i * TILES, TILES), (gate, up, down)
