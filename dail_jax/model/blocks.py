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

from dail_jax.mesh import constrain
from dail_jax.model import layers
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
    q, k = bound.rotate(bound.norm(q, "q_norm")), bound.rotate(bound.norm(k, "k_norm"))
    out, kept = see(q, k, v)
    return bound.linear(constrain(out, "btnh"), "o"), kept


def dense(y: jax.Array, bound: Bound) -> jax.Array:
    act = layers.ACTIVATIONS[bound.cfg.activation]
    return bound.linear(act(bound.linear(y, "gate")) * bound.linear(y, "up"), "down")


MIXERS: dict[str, Callable[[jax.Array, Bound, Callable], tuple[jax.Array, Any]]] = {"attention": attention}
MLPS: dict[str, Callable[[jax.Array, Bound], jax.Array]] = {"dense": dense}
