"""One layer: a mixer, through which tokens see each other, and an MLP, each added to the residual stream.

Norms stand before them, behind them, or both: wherever `weights.declare` has a row for one.

A layer's description (`families.Layer`) names its mixer and its MLP in the tables MIXERS and MLPS. An MLP is a function
of (y [B,T,D], the layer bound to its weights) that returns [B,T,D]. A mixer also takes `see`, and returns what `see`
keeps: the one function by which `encode`, `prefill` and `decode_step` differ, since only a mixer looks at other tokens.

To add a mixer with weights of its own, and a state instead of keys and values:
  1. a function here or in a file of its own, and its entry in MIXERS;
  2. rows in `weights.declare` with `of` set to its name: they exist, and are stacked, over its layers alone;
  3. `Layer(mixer=...)` for these layers in a family's reader: layers are scanned over the period of the pattern;
  4. in `transformer`, its `see` for each of the three ways: from an empty state, which is dropped (encode) or kept at
     each prompt's end (prefill), and from the state in the cache (decode_step). `Cache` and `Recent` hold one entry per
     layer, so that an entry may be of another form. What a prompt leaves behind is written to the cache by
     `decode.load_prompt`; a row takes its copy in `decode.admit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dail_jax.mesh import constrain
from dail_jax.model import experts, layers
from dail_jax.model.families import ModelConfig


@dataclass(frozen=True)
class Bound:
    """A layer bound to its weights, to its LoRA and scale (or None), and to its rotation (or None)."""

    cfg: ModelConfig
    weights: dict[str, Any]
    pair: tuple[dict, float] | None
    angles: layers.Angles | None

    def linear(self, x: jax.Array, name: str) -> jax.Array:
        return layers.linear(x, self.weights, name, self.pair)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """The norm, or x where a family has no norm of this name."""
        if name not in self.weights:
            return x
        return layers.rms_norm(x, self.weights[name], self.cfg.norm_eps, self.cfg.norm)

    def rotate(self, x: jax.Array) -> jax.Array:
        return x if self.angles is None else layers.rotate(x, self.angles)


def block(x: jax.Array, bound: Bound, mixer: str, mlp: str, see: Callable) -> tuple[jax.Array, Any]:
    """One layer: x [B,T,D] -> ([B,T,D], what `see` keeps)."""
    with jax.named_scope("attend"):
        y, kept = MIXERS[mixer](bound.norm(x, "attn_norm"), bound, see)
        x = x + bound.norm(y, "attn_post_norm")
    with jax.named_scope("mlp"):
        y = MLPS[mlp](bound.norm(constrain(x, "bt_"), "mlp_norm"), bound)
        x = x + bound.norm(y, "mlp_post_norm")
    return constrain(x, "bt_"), kept


def attention(y: jax.Array, bound: Bound, see: Callable) -> tuple[jax.Array, Any]:
    """`see` takes q [B,T,N,H], k and v [B,T,K,H]; it returns the output [B,T,N,H] and what it keeps of k and v."""
    q, k, v = bound.linear(y, "q"), bound.linear(y, "k"), bound.linear(y, "v")
    q, gate = jnp.split(q, 2, -1) if bound.cfg.output_gate else (q, None)
    q, k = bound.rotate(bound.norm(q, "q_norm")), bound.rotate(bound.norm(k, "k_norm"))
    out, kept = see(q, k, v)
    out = out if gate is None else out * jax.nn.sigmoid(gate)
    return bound.linear(constrain(out, "btnh"), "o"), kept


def delta_net(y: jax.Array, bound: Bound, see: Callable) -> tuple[jax.Array, Any]:
    """A gated delta net (`deltanet`), whose state takes the place of keys and values.

    `see` takes the net's sizes, what is to be convolved [B,T,K,Y], the taps [K,Y,Z], decays and rates [B,T,N]; it
    returns what each token reads [B,T,N,I] and the state that it keeps.
    """
    exact = lambda x: x.astype(jnp.float32)  # noqa: E731
    weights, net = bound.weights, bound.cfg.deltanet
    assert net is not None
    change = jax.nn.softplus(exact(bound.linear(y, "in_a")) + exact(weights["decay_bias"]))
    decay, rate = -jnp.exp(exact(weights["log_decay"])) * change, jax.nn.sigmoid(exact(bound.linear(y, "in_b")))
    read, kept = see(net, bound.linear(y, "in_qkv"), weights["taps"], decay, rate)
    read = layers.rms_norm(read, weights["read_norm"], bound.cfg.norm_eps)
    read = (read * jax.nn.silu(exact(bound.linear(y, "in_z")))).astype(y.dtype)
    return bound.linear(constrain(read, "btni"), "out"), kept


def dense(y: jax.Array, bound: Bound) -> jax.Array:
    act = layers.ACTIVATIONS[bound.cfg.activation]
    return bound.linear(act(bound.linear(y, "gate")) * bound.linear(y, "up"), "down")


def mixture(y: jax.Array, bound: Bound) -> jax.Array:
    """A mixture of experts: those that a router picks for each token."""
    cfg, w = bound.cfg.experts, bound.weights
    assert cfg is not None
    picked, by = experts.route(y, w["router"], cfg.top, cfg.normalise)
    return experts.apply(y, picked, by, (w["experts_gate"], w["experts_up"], w["experts_down"]))


MIXERS: dict[str, Callable[[jax.Array, Bound, Callable], tuple[jax.Array, Any]]] = {
    "attention": attention,
    "deltanet": delta_net,
}
MLPS: dict[str, Callable[[jax.Array, Bound], jax.Array]] = {"dense": dense, "experts": mixture}
