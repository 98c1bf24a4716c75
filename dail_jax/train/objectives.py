"""Losses over response tokens, in chunks: the logits of one chunk are all that ever exists of [B, T, V].

The contrastive objective (arXiv 2602.02405, section 4), per response token, over the full vocabulary:

    L = KL(M || PS) - gamma * KL(M || NR)          reverse, the default
    L = KL(PS || M) - gamma * KL(NR || M)          forward

For gamma < 1 the reverse form is (1-gamma) * [KL(M || q*) - log Z] with q* ~ (p_PS / p_NR^gamma)^(1/(1-gamma)):
bounded below, possibly negative, and smallest at q*. The `excess` that is reported is KL(M || q*) >= 0.

Each loss knows its derivative by logits, so one pass over the chunks forms both the loss and dL/dhidden; the
backward pass only scales it. The unembedding is frozen here and gets no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Objective:
    """What is minimised: `nll` of targets, `dail`, the contrast of two frozen references, or `grpo`, of rewards."""

    kind: str  # "dail", "nll" or "grpo"
    gamma: float = 0.0
    forward_kl: bool = False
    clip: float = 0.0  # grpo
    kl: float = 0.0  # grpo: weight of KL(M || frozen base)


def names(objective: Objective) -> tuple[str, ...]:
    """The parts that `summed` reports beside the loss."""
    if objective.kind == "nll":
        return ("nll", "entropy")
    if objective.kind == "grpo":
        return ("ratio", "clipped", "kl_base", "entropy")
    return ("kl_privileged", "kl_negative", "entropy") + (() if objective.forward_kl else ("excess",))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(
    objective: Objective, chunk: int, hidden: jax.Array, extras: Arrays, mask: jax.Array, unembed: jax.Array
) -> tuple[jax.Array, Arrays]:
    """(sum of the loss over unmasked tokens, sums of its parts), float32, differentiable by `hidden` alone.

    hidden [B,T,D] are the student's final states where response tokens are predicted; mask [B,T] bool; unembed
    [V,D]. extras: `targets` [B,T] int32 for nll; `privileged` and `negative` [B,T,D] hidden states for dail;
    for grpo `targets`, their `logq` and `advantage` [B,T] float32, and `base` [B,T,D] hidden states. All losses are
    means over the batch's tokens; so is grpo's, where arXiv 2402.03300 takes each sample's mean first.
    """
    return _over_chunks(objective, chunk, hidden, extras, mask, unembed)[0]


def _forward(objective, chunk, hidden, extras, mask, unembed):
    out, gradient = _over_chunks(objective, chunk, hidden, extras, mask, unembed)
    return out, gradient


def _backward(objective, chunk, gradient, cotangents):
    return (gradient * cotangents[0].astype(gradient.dtype), None, None, None)


summed.defvjp(_forward, _backward)


def _over_chunks(objective, chunk, hidden, extras, mask, unembed):
    """((loss, parts), dloss/dhidden) by a scan over chunks of time, every row in each."""
    b, t, _ = hidden.shape
    width = max(1, min(t, chunk // b))
    count = -(-t // width)
    unembed = _constrain(unembed, PartitionSpec(("fsdp", "tensor"), None))

    def split(x):  # [B, T, ...] -> [count, B, width, ...]
        x = jnp.pad(x, [(0, 0), (0, count * width - t)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(b, count, width, *x.shape[2:]).swapaxes(0, 1)

    def logits(states):
        states = _constrain(states, PartitionSpec("data", None, None))
        z = jnp.einsum("btd,vd->btv", states, unembed, preferred_element_type=jnp.float32)
        return _constrain(z, PartitionSpec("data", None, ("fsdp", "tensor")))

    def body(sums, inputs):
        states, more, live = inputs
        loss, parts, by_logits = token_loss(objective, logits(states), more, logits)
        live = live[..., None]
        gradient = jnp.einsum(
            "btv,vd->btd",
            jnp.where(live, by_logits, 0).astype(unembed.dtype),
            unembed,
            preferred_element_type=jnp.float32,
        )
        parts = {"loss": loss, **parts}
        return {k: sums[k] + jnp.where(live[..., 0], parts[k], 0).sum() for k in sums}, gradient.astype(hidden.dtype)

    zeros = {name: jnp.zeros((), jnp.float32) for name in ("loss", *names(objective))}
    sums, gradient = jax.lax.scan(body, zeros, (split(hidden), jax.tree.map(split, extras), split(mask)))
    gradient = gradient.swapaxes(0, 1).reshape(b, count * width, -1)[:, :t]
    return (sums.pop("loss"), sums), gradient


def token_loss(
    objective: Objective, z: jax.Array, extras: Arrays, logits: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, Arrays, jax.Array]:
    """Per token: loss [B,T], its parts, and d loss / d z [B,T,V], from the student's float32 logits z [B,T,V]."""
    log_m = jax.nn.log_softmax(z, axis=-1)
    m = jnp.exp(log_m)
    entropy = -(m * log_m).sum(-1)
    if objective.kind == "nll":
        nll = -jnp.take_along_axis(log_m, extras["targets"][..., None], -1)[..., 0]
        hot = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == extras["targets"][..., None]
        return nll, {"nll": nll, "entropy": entropy}, m - hot
    if objective.kind == "grpo":
        return _policy_gradient(objective, log_m, entropy, extras, logits)

    log_p = jax.nn.log_softmax(logits(extras["privileged"]), axis=-1)
    log_n = jax.nn.log_softmax(logits(extras["negative"]), axis=-1)
    gamma = objective.gamma
    if objective.forward_kl:
        p, n = jnp.exp(log_p), jnp.exp(log_n)
        kl_p, kl_n = (p * (log_p - log_m)).sum(-1), (n * (log_n - log_m)).sum(-1)
        parts = {"kl_privileged": kl_p, "kl_negative": kl_n, "entropy": entropy}
        return kl_p - gamma * kl_n, parts, (m - p) - gamma * (m - n)

    kl_p, kl_n = (m * (log_m - log_p)).sum(-1), (m * (log_m - log_n)).sum(-1)
    loss = kl_p - gamma * kl_n
    slope = (1 - gamma) * log_m - log_p + gamma * log_n
    log_z = jax.nn.logsumexp((log_p - gamma * log_n) / (1 - gamma), axis=-1)
    parts = {"kl_privileged": kl_p, "kl_negative": kl_n, "entropy": entropy, "excess": loss / (1 - gamma) + log_z}
    return loss, parts, m * (slope - loss[..., None])


def _policy_gradient(objective: Objective, log_m: jax.Array, entropy: jax.Array, extras: Arrays, logits):
    """-min(ratio * A, clip(ratio) * A) + kl * KL(M || base), as `token_loss` (arXiv 2402.03300; KL in closed form)."""
    m = jnp.exp(log_m)
    targets, advantage = extras["targets"][..., None], extras["advantage"]
    # (bounded: a token that was never likely must not make 0 * inf of a group without a signal)
    ratio = jnp.exp(jnp.clip(jnp.take_along_axis(log_m, targets, -1)[..., 0] - extras["logq"], -20, 20))
    free, held = ratio * advantage, jnp.clip(ratio, 1 - objective.clip, 1 + objective.clip) * advantage
    log_b = jax.nn.log_softmax(logits(extras["base"]), axis=-1)
    kl = (m * (log_m - log_b)).sum(-1)
    hot = jax.lax.broadcasted_iota(jnp.int32, m.shape, m.ndim - 1) == targets
    slope = jnp.where(free <= held, free, 0)[..., None] * (m - hot)
    parts = {"ratio": ratio, "clipped": (free > held).astype(jnp.float32), "kl_base": kl, "entropy": entropy}
    loss = objective.kl * kl - jnp.minimum(free, held)
    return loss, parts, slope + objective.kl * m * (log_m - log_b - kl[..., None])


def cross_entropy(hidden: jax.Array, targets: jax.Array, mask: jax.Array, unembed: jax.Array) -> jax.Array:
    """Sum of -log p(target) over unmasked tokens, differentiable by hidden and unembed alike (pretraining)."""
    z = jnp.einsum("btd,vd->btv", hidden, unembed, preferred_element_type=jnp.float32)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), targets[..., None], -1)[..., 0]
    return jnp.where(mask, nll, 0).sum()


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec)
