"""Low-rank adapters (arXiv 2106.09685) as a separate pytree: differentiating with respect to it alone freezes the model.

tree: {target: {"a": [L, *inputs, R], "b": [L, R, *outputs]}}, float32, stacked over the layers that have the target. `b` starts at zero, so a new adapter is a no-op.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.errors import UserError
from dail_jax.model.families import ModelConfig
from dail_jax.model.weights import Weight, declare


@struct.dataclass
class Lora:
    """The adapter's weights and its static scale, `train.lora`'s."""

    tree: dict[str, dict[str, jax.Array]]
    scale: float = struct.field(pytree_node=False)


def axes(weight: Weight) -> dict[str, str]:
    """The axis letters of a linear map's `a` and `b`, stacked over layers."""
    return {"a": "l" + weight.axes[: weight.inputs] + "r", "b": "lr" + weight.axes[weight.inputs :]}


def adaptable(cfg: ModelConfig) -> dict[str, Weight]:
    """The linear maps that may get an adapter, by name.

    Of a model with experts, those of its MLPs may not: peft takes the names of dense layers' modules for experts' too.
    """
    return {name: w for name, w in declare(cfg).items() if w.inputs and not (cfg.experts and w.of == "dense")}


def targets(cfg: ModelConfig, lora: config_lib.LoraConfig) -> dict[str, Weight]:
    """The linear maps that get an adapter, by name; raises UserError for those that the model does not have."""
    possible = adaptable(cfg)
    missing = [name for name in lora.targets if name not in possible]
    if missing:
        experts = " (its MLPs get no adapters)" if cfg.experts else ""
        raise UserError(
            f"got {', '.join(missing)}, want some of {', '.join(possible)}{experts}: a {cfg.family} has no others",
            field="train.lora.targets",
        )
    return {name: possible[name] for name in lora.targets}


def init(key: jax.Array, cfg: ModelConfig, lora: config_lib.LoraConfig) -> Lora:
    """A new adapter, initialised as in peft: `a` uniform in +-1/sqrt(inputs), `b` zero."""
    tree = {}
    for index, (name, weight) in enumerate(targets(cfg, lora).items()):
        shapes = {side: _shape(letters, weight, cfg, lora.rank) for side, letters in axes(weight).items()}
        bound = 1 / math.sqrt(math.prod(shapes["a"][1:-1]))
        a = jax.random.uniform(jax.random.fold_in(key, index), shapes["a"], jnp.float32, -bound, bound)
        tree[name] = {"a": a, "b": jnp.zeros(shapes["b"], jnp.float32)}
    return Lora(tree, lora.scale)


def shardings(cfg: ModelConfig, lora: config_lib.LoraConfig, mesh: jax.sharding.Mesh) -> Lora:
    tree = {
        name: {side: mesh_lib.sharding(mesh, letters) for side, letters in axes(weight).items()}
        for name, weight in targets(cfg, lora).items()
    }
    return Lora(tree, lora.scale)  # pyright: ignore[reportArgumentType]  (a tree of shardings)


def abstract(cfg: ModelConfig, lora: config_lib.LoraConfig, mesh: jax.sharding.Mesh) -> Lora:
    """Shapes and shardings without data."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), cfg, lora))
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings(cfg, lora, mesh)
    )


def moved(lora: Lora, mesh: jax.sharding.Mesh) -> Lora:
    """The same adapter on another mesh of the same devices, split along the axes of the same names."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, x.sharding.spec)), lora)


def merge(params: dict, lora: Lora, cfg: ModelConfig) -> dict:
    """The stacked weights with the adapter merged in: summed in float32, in the weights' own dtype."""
    table, layers = declare(cfg), dict(params["layers"])
    for name, pair in lora.tree.items():
        weight = table[name]
        ins, outs = weight.axes[: weight.inputs], weight.axes[weight.inputs :]
        delta = jnp.einsum(f"l{ins}r,lr{outs}->l{ins}{outs}", pair["a"], pair["b"]) * lora.scale
        layers[name] = (layers[name].astype(jnp.float32) + delta).astype(layers[name].dtype)
    return {**params, "layers": layers}


def _shape(letters: str, weight: Weight, cfg: ModelConfig, rank: int) -> tuple[int, ...]:
    sizes = {"r": rank, "l": len(weight.layers(cfg))}
    return tuple(sizes.get(letter) or weight.size(letter, cfg) for letter in letters)
