"""The training methods. A method is a value: what it learns from, which roles it compares, and its loss.

A loss is written once, as a plain function of log-probabilities; its gradient is found by automatic differentiation
(`objectives.summed`). A new method is a loss function and an entry in `METHODS`, and touches no other file:

    def smoothed(log, tokens, cfg):
        ...
        return loss, {"name of a reported part": part}

    METHODS["smoothed"] = Method("smoothed", "traces", smoothed, settings={"share": 0.1})

`train.objective: smoothed` then selects it, and `train.loss: {share: 0.2}` sets what it declares in `settings`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dail_jax import config as config_lib
from dail_jax.errors import UserError, registered

LogProbs = Mapping[str, jax.Array]  # by role, log-probabilities of the next token, [B,T,V] float32
Tokens = Mapping[str, jax.Array]  # [B,T]: `targets` int32; for methods that sample, `logq` and `advantage` float32
Terms = tuple[jax.Array, dict[str, jax.Array]]  # each token's loss, and the parts to report, all [B,T] float32
BoundLoss = Callable[[LogProbs, Tokens], Terms]
Loss = Callable[[LogProbs, Tokens, config_lib.Train], Terms]

CONTRAST = ("privileged", "negative")


@dataclass(frozen=True, eq=False)
class Method:
    """A way to train the LoRA.

    Attributes:
      source: what it learns from: `traces` that the stage `generate` wrote, expert `solutions`, `samples` that the
        student draws during training, or `nothing` (the model stays untrained).
      loss: None for a method that does not train.
      roles: the frozen roles that the loss compares the student with: "privileged" and "negative", each under a prompt
        of its own, and "base", under the student's. Their log-probabilities reach the loss under these names, beside
        "student".
      graded: learns from right traces alone, or from a reward for right samples.
      rationalises: `generate` draws from the student, then with the solution in context where the student fails.
      hinted: a group of samples that all fail is drawn again with a hint in the prompt.
      settings: the keys of `train.loss` that it reads, with their defaults.
      check: what is wrong with a configuration, whose `loss` is filled in, or None.
    """

    name: str
    source: Literal["traces", "solutions", "samples", "nothing"]
    loss: Loss | None = None
    roles: tuple[str, ...] = ()
    graded: bool = False
    rationalises: bool = False
    hinted: bool = False
    settings: Mapping[str, float] = field(default_factory=dict)
    check: Callable[[config_lib.Train], str | None] = lambda cfg: None

    @property
    def trains(self) -> bool:
        return self.loss is not None

    @property
    def prompted(self) -> tuple[str, ...]:
        """The roles with prompts of their own, the student first."""
        return ("student", *(role for role in self.roles if role != "base"))

    @property
    def tokens(self) -> dict[str, Any]:
        """The types, by name, of the arrays [B,T] that the loss gets besides log-probabilities.

        Only samples have `logq`, the log-probability that each token was drawn with, and `advantage`.
        """
        drawn = {"logq": jnp.float32, "advantage": jnp.float32}
        return {"targets": jnp.int32, **(drawn if self.source == "samples" else {})}

    def reads_traces(self, cfg: config_lib.Train) -> bool:
        """Whether training needs the traces of `generate`."""
        return self.source == "traces" or (self.hinted and cfg.online.hint == "trace")

    def caches(self, cfg: config_lib.Train) -> bool:
        """Whether the roles' states are computed once, which is exact where every epoch has the same examples."""
        return cfg.cache_references and bool(self.roles) and self.source != "samples"

    def fill(self, cfg: config_lib.Train) -> config_lib.Train:
        """The configuration with this method's settings in `loss`, defaults included, and no others."""
        given = {key: value for key, value in cfg.loss.items() if key in self.settings}
        return cfg.model_copy(update={"loss": {**self.settings, **given}})

    def bind(self, cfg: config_lib.Train) -> BoundLoss:
        """The loss as a function of log-probabilities and tokens, with the method's settings filled in."""
        loss = self.loss
        assert loss is not None
        cfg = self.fill(cfg)
        return lambda log, tokens: loss(log, tokens, cfg)


def prompt_of(role: str) -> str:
    """The role whose prompt this role sees the response under."""
    return "student" if role == "base" else role


# ---------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------


def kl_divergence(a: jax.Array, b: jax.Array) -> jax.Array:
    """KL(A || B) [...] of log-probabilities a and b [..., V]."""
    return (jnp.exp(a) * (a - b)).sum(-1)


def chosen(log: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probabilities [B,T] of the targets [B,T], from log-probabilities [B,T,V].

    A masked sum: a gather along V, which is sharded, would collect all of V on every device.
    """
    hot = jax.lax.broadcasted_iota(jnp.int32, log.shape, log.ndim - 1) == targets[..., None]
    return jnp.where(hot, log, 0).sum(-1)


def likelihood(log: LogProbs, tokens: Tokens, cfg: config_lib.Train) -> Terms:
    """-log p(target): the negative log-likelihood."""
    loss = -chosen(log["student"], tokens["targets"])
    return loss, {"nll": loss}


def contrast(log: LogProbs, tokens: Tokens, cfg: config_lib.Train) -> Terms:
    """The contrastive objective (arXiv 2602.02405, section 4), over the full vocabulary.

        L = KL(M || PS) - gamma * KL(M || NR)          reverse, the default
        L = KL(PS || M) - gamma * KL(NR || M)          forward

    For gamma < 1 the reverse form equals (1-gamma) * [KL(M || q*) - log Z], where q* ~ (p_PS / p_NR^gamma)^(1/(1-gamma)).
    It is bounded below, may be negative, and is smallest at q*. The reported `excess` is KL(M || q*) >= 0.
    """
    m, p, n = log["student"], log["privileged"], log["negative"]
    if cfg.kl == "forward":
        kl_p, kl_n = kl_divergence(p, m), kl_divergence(n, m)
        return kl_p - cfg.gamma * kl_n, {"kl_privileged": kl_p, "kl_negative": kl_n}
    kl_p, kl_n = kl_divergence(m, p), kl_divergence(m, n)
    loss = kl_p - cfg.gamma * kl_n
    log_z = jax.nn.logsumexp((p - cfg.gamma * n) / (1 - cfg.gamma), axis=-1)
    return loss, {"kl_privileged": kl_p, "kl_negative": kl_n, "excess": loss / (1 - cfg.gamma) + log_z}


def gated(log: LogProbs, tokens: Tokens, cfg: config_lib.Train) -> Terms:
    """`contrast`, and what it leaves unlearned. Ours, not the paper's.

        L + [M(v) < epsilon] * -log M(v),  v = argmax q*

    Reverse KL weighs a token by M, so what the student never writes is not learned. The added term acts there alone: on the
    target's most likely token, where the student gives it less than epsilon.
    """
    loss, parts = contrast(log, tokens, cfg)
    best = (log["privileged"] - cfg.gamma * log["negative"]).argmax(-1)
    missed = -chosen(log["student"], best)
    missed = jnp.where(missed > -math.log(cfg.loss["epsilon"]), missed, 0)
    return loss + missed, {**parts, "missed": missed}


def sharpened(log: LogProbs, tokens: Tokens, cfg: config_lib.Train) -> Terms:
    """Forward KL to a sharpened contrast, over the full vocabulary. Ours, not the paper's.

        L = KL(q_T || M),  q_T ~ (p_PS / p_NR^gamma)^(1 / ((1-gamma) T)),  0 < T <= 1

    At T = 1 the target is the q* that `contrast` implies; as T falls to 0, it becomes q*'s most likely token. The gradient
    by logits is M - q_T, which also raises tokens that the student gives no mass, where that of reverse KL vanishes. What
    the privileged student does only now and then, such as a shortcut, the sharpening takes out of the target.
    """
    sharpness = 1 / ((1 - cfg.gamma) * cfg.loss["temperature"])
    target = jax.nn.log_softmax(sharpness * (log["privileged"] - cfg.gamma * log["negative"]))
    loss = kl_divergence(target, log["student"])
    return loss, {"excess": loss, "target_entropy": -(jnp.exp(target) * target).sum(-1)}


def policy_gradient(log: LogProbs, tokens: Tokens, cfg: config_lib.Train) -> Terms:
    """-min(ratio * A, clip(ratio) * A) + weight * KL(M || base) (arXiv 2402.03300, with the KL in closed form)."""
    advantage, clip = tokens["advantage"], cfg.online.clip_ratio
    # The exponent is clipped so that an unlikely token's infinite ratio times an advantage of 0 is not NaN; the gradient
    # is that of the unclipped ratio.
    change = chosen(log["student"], tokens["targets"]) - tokens["logq"]
    ratio = jnp.exp(change + jax.lax.stop_gradient(jnp.clip(change, -20, 20) - change))
    free, held = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    kl_base = kl_divergence(log["student"], log["base"])
    parts = {"ratio": ratio, "clipped": (free > held).astype(jnp.float32), "kl_base": kl_base}
    return cfg.online.kl_weight * kl_base - jnp.where(free > held, held, free), parts


# ---------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------


def _bounded(cfg: config_lib.Train) -> str | None:
    if cfg.kl == "reverse" and cfg.gamma >= 1:
        return "gamma must be below 1: the objective is unbounded otherwise"
    return None


def _gated(cfg: config_lib.Train) -> str | None:
    if not 0 < cfg.loss["epsilon"] < 1:
        return f"loss.epsilon must be above 0 and below 1, got {cfg.loss['epsilon']:g}"
    return "gamma must be below 1: there is no target otherwise" if cfg.gamma >= 1 else None


def _sharp(cfg: config_lib.Train) -> str | None:
    if cfg.gamma >= 1:
        return "gamma must be below 1: there is no target otherwise"
    if not 0 < cfg.loss["temperature"] <= 1:
        return f"loss.temperature must be above 0 and at most 1, got {cfg.loss['temperature']:g}"
    return None


def _plain(cfg: config_lib.Train) -> str | None:
    if not cfg.online.sampling.is_plain:
        return f"{cfg.objective} wants plain online.sampling: temperature 1 and no truncation"
    return None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        # the paper's: contrast of the privileged student and the negative reference
        Method("dail", "traces", contrast, CONTRAST, check=_bounded),
        # the same on what the student writes now
        Method("onpolicy", "samples", contrast, CONTRAST, check=_bounded),
        # ours: the contrast, and what reverse KL leaves unlearned (docs/study.md)
        Method("gated", "traces", gated, CONTRAST, settings={"epsilon": 0.01}, check=_gated),
        # ours: the sharpened optimum of the contrast as a target (docs/study.md)
        Method("sharp", "traces", sharpened, CONTRAST, settings={"temperature": 0.2}, check=_sharp),
        # likelihood of traces, and of expert solutions
        Method("nll", "traces", likelihood),
        Method("sft", "solutions", likelihood),
        # likelihood of the student's own right samples, otherwise of right ones with the solution in context
        # (arXiv 2203.14465)
        Method("star", "traces", likelihood, graded=True, rationalises=True),
        # group-relative policy gradient (arXiv 2402.03300), and with hints where a whole group fails (2509.25666)
        Method("grpo", "samples", policy_gradient, ("base",), graded=True, check=_plain),
        Method("nurl", "samples", policy_gradient, ("base",), graded=True, hinted=True, check=_plain),
        # the untrained model, to be evaluated
        Method("none", "nothing"),
    )
}


def find(cfg: config_lib.Train) -> Method:
    """The method that `train.objective` names; raises UserError with the nearest name."""
    return registered(METHODS, cfg.objective, "train.objective")


def of(config: config_lib.Config) -> Method:
    """The method of a configuration, checked against all that the configuration says; raises UserError."""
    cfg, method = config.train, find(config.train)
    known = {key for other in METHODS.values() for key in other.settings}  # arms may switch between methods
    for key in cfg.loss:
        if key not in known:
            (near,) = difflib.get_close_matches(key, known, 1, 0.0)
            raise UserError(f"unknown key; did you mean {near!r}?", field=f"train.loss.{key}")
    if problem := method.check(method.fill(cfg)):
        raise UserError(problem, field="train")
    if method.source == "samples" and cfg.online.problems * cfg.online.group % cfg.batch_size:
        raise UserError("online.problems * online.group must be a multiple of batch_size", field="train")
    if config.evaluate.adapter and method.trains:
        raise UserError("stands in for training: want train.objective: none", field="evaluate.adapter")
    return method
