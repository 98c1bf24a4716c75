"""The distribution that tokens are drawn from, in closed form, and how to draw from it.

The student proposes tokens; the privileged student accepts a proposal v if p_T(v) >= tau, and writes the token itself
after n rejections. Let S and T be their distributions after temperature and truncation, A = {v : p_T(v) >= tau}
measured on the full softmax of the privileged student (temperature 1, no truncation, but the same presence penalty and
excluded tokens as in S and T), and a = S(A). Then:

    q(v) = (1 - (1-a)^n) * S(v) [v in A] / a  +  (1-a)^n * T(v)          (q = T where a = 0)

One draw from q replaces the rejection loop, and log q is the exact behaviour policy (arXiv 2602.02405, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.model import attention

LOG_FLOOR = -100.0  # recorded as the log-probability of a token that truncation removed
_LANES = 128
_DIGITS = 30  # binary ones, of the largest pattern of floats up to 1


@struct.dataclass
class SamplingParams:
    """Sampling parameters as traced scalars: changing one never recompiles."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    presence_penalty: jax.Array
    tau: jax.Array
    proposals: jax.Array


def sampling_params(sampling: config_lib.Sampling, tau: float = 0.0, proposals: int = 1) -> SamplingParams:
    return SamplingParams(
        temperature=jnp.float32(sampling.temperature),
        top_p=jnp.float32(sampling.top_p),
        top_k=jnp.int32(sampling.top_k),
        presence_penalty=jnp.float32(sampling.presence_penalty),
        tau=jnp.float32(tau),
        proposals=jnp.float32(proposals),
    )


def truncated(logits: jax.Array, k: SamplingParams) -> jax.Array:
    """Probabilities [..., V] of float32 logits after temperature, top-k, then top-p (ties at the edge are kept).

    Temperature 0 puts all mass on the first of the largest logits.
    """
    probs = jax.nn.softmax(logits / jnp.where(k.temperature > 0, k.temperature, 1.0), axis=-1)
    with jax.named_scope("top_k"):
        probs = _cut(probs, k.top_k > 0, lambda kept: kept.sum(-1) >= k.top_k)
    with jax.named_scope("top_p"):
        p, mass = probs, k.top_p * probs.sum(-1)  # the mass is not summed again in every pass
        probs = _cut(p, k.top_p < 1, lambda kept: jnp.where(kept, p, 0).sum(-1) >= mass)
    none = jnp.full(logits.shape[:-1], -1, jnp.int32)
    greedy = jax.lax.cond(k.temperature > 0, lambda: none, lambda: jnp.argmax(logits, -1).astype(jnp.int32))[..., None]
    return jnp.where(greedy < 0, probs, jnp.arange(logits.shape[-1]) == greedy)


def _cut(probs: jax.Array, wanted: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Where `wanted`, the fewest largest probabilities that are `enough`, normalised; found without sorting.

    The result of a branch is copied, so the branch only finds the threshold: copying [slots, V] costs as much as drawing.
    """
    least = jnp.zeros((*probs.shape[:-1], 1), jnp.float32)
    least = jax.lax.cond(wanted, lambda: _largest(probs, enough), lambda: least)
    kept = jnp.where(probs >= least, probs, 0)
    return kept / jnp.where(wanted, kept.sum(-1, keepdims=True), 1)


def _largest(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest threshold [..., 1] with `enough(probs >= threshold)`: the bits of non-negative floats sort as they do.

    Each pass tries several bit patterns, since a pass over probabilities that devices share is mostly waiting for them.
    A CPU waits for its own arithmetic, so there it tries one.
    """
    digits = 1 if attention.target() == "cpu" else 3  # of the pattern, settled by a pass
    float_of = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)  # noqa: E731

    def settle(i, low):
        step = 1 << (_DIGITS - digits * (i + 1))
        tried = [low + step * times for times in range(1, 1 << digits)]
        met = jnp.stack([enough(probs >= float_of(bits)) for bits in tried])
        return low + step * met.sum(0, dtype=jnp.int32)[..., None]

    low = jnp.zeros((*probs.shape[:-1], 1), jnp.int32)
    return float_of(jax.lax.fori_loop(0, _DIGITS // digits, settle, low))


def accepted_mass(student: jax.Array, acceptance: jax.Array, k: SamplingParams) -> jax.Array:
    """a = S(A) [...], how likely a proposal is accepted. `acceptance` is p_T on the full softmax; both are [..., V]."""
    return jnp.minimum(jnp.where(acceptance >= k.tau, student, 0).sum(-1), 1.0)


def mix(
    student: jax.Array, privileged: jax.Array, acceptance: jax.Array, a: jax.Array, k: SamplingParams
) -> tuple[jax.Array, jax.Array]:
    """(mass from accepted proposals, mass written by the privileged student), per token; q is their sum."""
    refused = (1 - a) ** k.proposals
    scale = jnp.where(a > 0, (1 - refused) / jnp.maximum(a, 1e-30), 0)
    return jnp.where(acceptance >= k.tau, student, 0) * scale, refused * privileged


def inverse_cdf(weights: jax.Array, u: jax.Array) -> jax.Array:
    """The index [slots] at which the running sum of `weights` [slots, V] passes u * total, u [slots] in [0, 1).

    Two levels (blocks, then within one block) take one pass over V; an index of weight zero is never drawn. No block
    spans two devices, which would make them exchange all weights.
    """
    slots, size = weights.shape
    parts = mesh_lib.parts("v", size)
    each = size // parts
    split = jnp.pad(weights.reshape(slots, parts, each), ((0, 0), (0, 0), (0, -each % _LANES)))
    blocks = split.reshape(slots, -1, _LANES)
    sums = mesh_lib.constrain(blocks.sum(-1), "b_")
    block, rest = _first_past(sums, u * sums.sum(-1))
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    lane, _ = _first_past(inner, rest)
    part, block = jnp.divmod(block, blocks.shape[1] // parts)
    return part * each + block * _LANES + lane


def _first_past(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first positive entry whose running sum exceeds target (or the last positive one), and the remaining target."""
    running = jnp.cumsum(weights, -1)
    positive = weights > 0
    hit = positive & (running > target[..., None])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[..., ::-1], -1)
    index = jnp.where(hit.any(-1), jnp.argmax(hit, -1), last)
    before = jnp.take_along_axis(running - weights, index[..., None], -1)[..., 0]
    return index, target - before


@struct.dataclass
class DrawnTokens:
    """One token per slot, and how it was drawn."""

    token: jax.Array  # [slots] int32
    logq: jax.Array  # [slots] log-probability under the distribution that was drawn from
    log_student: jax.Array  # [slots]; equals logq if there is only one role
    log_privileged: jax.Array  # [slots]
    by_student: jax.Array  # [slots] bool: an accepted proposal; otherwise the privileged student wrote it
    finite: jax.Array  # [slots] bool: no role's logits held NaN or +inf; if False, the other fields are meaningless


def draw_tokens(logits: jax.Array, u: jax.Array, k: SamplingParams, seen: jax.Array | bool = False) -> DrawnTokens:
    """Draws from logits [roles, slots, V] (roles: student, or student and privileged student) with u [slots, 2] in [0, 1).

    `seen` [slots, V] bool marks the tokens that the presence penalty applies to.
    """

    def plain(logits):
        probs = jax.nn.softmax(logits, axis=-1)
        # One bad logit makes its whole softmax NaN, so checking one entry is enough and saves a pass over V.
        return replace(_draw(probs, probs[-1], u, k), finite=jnp.isfinite(probs[..., 0]).all(0))

    def altered(logits):
        finite = jnp.isfinite(logits.max(-1)).all(0)  # truncation and temperature 0 can hide a NaN
        logits = logits - k.presence_penalty * seen
        drawn = _draw(truncated(logits, k), jax.nn.softmax(logits[-1], axis=-1), u, k)
        return replace(drawn, finite=finite)

    # Each branch draws as well, so that it returns small arrays: copying [slots, V] costs as much as drawing.
    is_plain = (k.temperature == 1) & (k.top_k <= 0) & (k.top_p >= 1) & (k.presence_penalty == 0)
    return jax.lax.cond(is_plain, plain, altered, logits)


def _draw(probs: jax.Array, acceptance: jax.Array, u: jax.Array, k: SamplingParams) -> DrawnTokens:
    """`probs` [roles, slots, V] are S and T, `acceptance` [slots, V] is p_T on the full softmax; the caller sets `finite`."""
    if probs.shape[0] == 1:
        token = inverse_cdf(probs[0], u[:, 0])
        logq, always = _log(_at(probs[0], token)), jnp.ones_like(token, bool)
        return DrawnTokens(token, logq, logq, logq, by_student=always, finite=always)
    student, privileged = probs
    a = accepted_mass(student, acceptance, k)
    kept, written = mix(student, privileged, acceptance, a[:, None], k)
    token = inverse_cdf(kept + written, u[:, 0])
    s, t = _at(student, token), _at(privileged, token)
    from_student, from_privileged = mix(s, t, _at(acceptance, token), a, k)
    q = from_student + from_privileged
    return DrawnTokens(
        token=token,
        logq=_log(q),
        log_student=_log(s),
        log_privileged=_log(t),
        by_student=u[:, 1] * q < from_student,
        finite=jnp.ones_like(token, bool),
    )


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[..., None], -1)[..., 0]


def _log(p: jax.Array) -> jax.Array:
    return jnp.where(p > 0, jnp.log(jnp.maximum(p, 1e-38)), LOG_FLOOR)
