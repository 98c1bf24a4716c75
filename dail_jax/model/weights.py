"""Every weight, declared once. Shapes, initialisation, sharding, import, export and LoRA derive from here.

`declare(cfg)` lists one `Weight` per name. `axes` is our layout and `torch` is Hugging Face's, both in axis letters (see
`dail_jax.mesh`); parentheses mark a flattened group: q is `dnh` here and `(nh)d` there. Weights with `{l}` in their
Hugging Face name exist once per layer and are stacked on a leading L axis. Those of one kind of part (`of`) exist in the
layers that have this part, and are stacked over these alone. Weights of one Hugging Face name share a tensor (`tensors`).
Matrices may be held in int8 (`model.int8`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dail_jax import mesh as mesh_lib
from dail_jax.errors import UserError
from dail_jax.model.families import ModelConfig
from dail_jax.model.int8 import Int8

# {"embed", "unembed"?, "norm", "layers": {name: [L, ...]} or a list of L {name: [...]}}; a leaf may be a pytree of arrays
Params = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    axes: str  # one layer's axes; a linear map's inputs come first
    hf: str
    torch: str
    inputs: int = 0  # how many leading axes a linear map contracts; 0: not a linear map
    init: str = "normal"
    place: str = ""  # the letters to shard by, where these differ from `axes`
    of: str = ""  # the mixer or MLP that it belongs to, by its name in `Layer`; empty: to every layer
    each: bool = False  # Hugging Face has a tensor for every index of its first axis
    beside: str = ""  # what lies side by side in Hugging Face's first axis, where ours puts it together by head
    rows: str = ""  # the axis of a table's rows, where it is one

    @property
    def channels(self) -> str:
        """The axes that its int8 form has a scale for each index of; "" for what stays as it is, such as a norm."""
        return self.axes[self.inputs :] if self.inputs else self.rows

    @property
    def layered(self) -> bool:
        return "{l}" in self.hf

    def layers(self, cfg: ModelConfig) -> tuple[int, ...]:
        """The layers that have this weight, in the order in which they are stacked."""
        return tuple(i for i, layer in enumerate(cfg.layers) if self.of in ("", layer.mixer, layer.mlp))

    def names(self, cfg: ModelConfig) -> list[str]:
        """The names of its tensors in Hugging Face files, of each layer that has it."""
        if not self.layered:
            return [self.hf]
        return [self.hf.format(l=i, j=j) for i in self.layers(cfg) for j in range(self.parts(cfg))]

    def parts(self, cfg: ModelConfig) -> int:
        """How many tensors Hugging Face has for one layer."""
        return self.size(self.axes[0], cfg) if self.each else 1

    @property
    def part(self) -> Weight:
        """What one of these tensors holds."""
        return replace(self, axes=self.axes[1:], torch=self.torch[1:]) if self.each else self

    @property
    def module(self) -> str:
        """The Hugging Face module's name, e.g. `q_proj`."""
        return self.hf.split(".")[-2]

    def size(self, letter: str, cfg: ModelConfig) -> int:
        return cfg.size(letter, self.of)

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        return tuple(self.size(a, cfg) for a in self.axes)

    def torch_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        return tuple(math.prod(self.size(a, cfg) for a in group) for group in _groups(self.torch))

    def from_torch(self, x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        """One layer's tensor in Hugging Face's layout -> ours (a view where possible)."""
        letters = "".join(_groups(self.torch))
        return (
            self.rows_from_torch(x, cfg)
            .reshape([self.size(a, cfg) for a in letters])
            .transpose([letters.index(a) for a in self.axes])
        )

    def to_torch(self, x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        letters = "".join(_groups(self.torch))
        return self.rows_to_torch(
            x.transpose([self.axes.index(a) for a in letters]).reshape(self.torch_shape(cfg)), cfg
        )

    def rows_from_torch(self, x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        """An array whose first axis is a linear map's outputs in Hugging Face's order -> in ours."""
        return x[self._rows(cfg)] if self.beside else x

    def rows_to_torch(self, x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        return x[np.argsort(self._rows(cfg))] if self.beside else x

    def _rows(self, cfg: ModelConfig) -> np.ndarray:
        """Where our outputs, head by head, are among Hugging Face's: `kh kh ni` are all queries, then keys, then values."""
        sizes = [math.prod(self.size(a, cfg) for a in part) for part in self.beside.split()]
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        return np.concatenate([part.reshape(self.size("k", cfg), -1) for part in parts], 1).ravel()


def _groups(axes: str) -> list[str]:
    """`(nh)d` -> ["nh", "d"]."""
    groups: list[str] = []
    inside = False
    for letter in axes:
        if letter in "()":
            inside = letter == "("
            if inside:
                groups.append("")
        elif inside:
            groups[-1] += letter
        else:
            groups.append(letter)
    return groups


# The norms of a block around its mixer and around its MLP, by our names and Hugging Face's.
BLOCK_NORMS = {
    "pre": ({"attn_norm": "input"}, {"mlp_norm": "post_attention"}),
    "post": ({"attn_post_norm": "post_attention"}, {"mlp_post_norm": "post_feedforward"}),
    "both": (
        {"attn_norm": "input", "attn_post_norm": "post_attention"},
        {"mlp_norm": "pre_feedforward", "mlp_post_norm": "post_feedforward"},
    ),
}


def declare(cfg: ModelConfig) -> dict[str, Weight]:
    """The weights of a model by our names, in the order of the forward pass. Rows of parts that no layer has are left out."""
    layer = "model.layers.{l}."
    attention, net, mlp = layer + "self_attn.", layer + "linear_attn.", layer + "mlp."
    one = "zeros" if cfg.norm == "one_plus" else "ones"  # what a norm's weight is at first
    q, k, v = ("qkv",) * 3 if cfg.fused else ("q", "k", "v")
    gate, up = ("gate_up",) * 2 if cfg.fused else ("gate", "up")
    heads = "kh kh ni"
    around_mixer, around_mlp = (
        {name: Weight("d", f"{layer}{theirs}_layernorm.weight", "d", init=one) for name, theirs in names.items()}
        for names in BLOCK_NORMS[cfg.norms]
    )
    table = {
        "embed": Weight("vd", "model.embed_tokens.weight", "vd", rows="v"),
        **around_mixer,
        "q": Weight("dnh", f"{attention}{q}_proj.weight", "(nh)d", 1, of="attention"),
        "k": Weight("dkh", f"{attention}{k}_proj.weight", "(kh)d", 1, of="attention"),
        "v": Weight("dkh", f"{attention}{v}_proj.weight", "(kh)d", 1, of="attention"),
        "o": Weight("nhd", attention + "o_proj.weight", "d(nh)", 2, of="attention"),
        "in_qkv": Weight("dky", net + "in_proj_qkv.weight", "(ky)d", 1, of="deltanet", beside=heads),
        "taps": Weight("kyz", net + "conv1d.weight", "(ky)()z", of="deltanet", beside=heads),
        "in_b": Weight("dn", net + "in_proj_b.weight", "nd", 1, of="deltanet"),
        "in_a": Weight("dn", net + "in_proj_a.weight", "nd", 1, of="deltanet"),
        "log_decay": Weight("n", net + "A_log", "n", init="log_uniform", of="deltanet"),
        "decay_bias": Weight("n", net + "dt_bias", "n", init="ones", of="deltanet"),
        "in_z": Weight("dni", net + "in_proj_z.weight", "(ni)d", 1, of="deltanet"),
        "read_norm": Weight("i", net + "norm.weight", "i", init="ones", of="deltanet"),
        "out": Weight("nid", net + "out_proj.weight", "d(ni)", 2, of="deltanet"),
        **around_mlp,
        "gate": Weight("df", f"{mlp}{gate}_proj.weight", "fd", 1, of="dense"),
        "up": Weight("df", f"{mlp}{up}_proj.weight", "fd", 1, of="dense"),
        "down": Weight("fd", mlp + "down_proj.weight", "df", 1, of="dense"),
        "router": Weight("dj", mlp + "gate.weight", "jd", of="experts"),
        "experts_gate": Weight("jdi", mlp + "experts.{j}.gate_proj.weight", "jid", of="experts", each=True),
        "experts_up": Weight("jdi", mlp + "experts.{j}.up_proj.weight", "jid", of="experts", each=True),
        "experts_down": Weight("jid", mlp + "experts.{j}.down_proj.weight", "jdi", of="experts", each=True),
        "norm": Weight("d", "model.norm.weight", "d", init=one),
    }
    if cfg.qkv_bias:
        table |= {
            "q_bias": Weight("nh", attention + "q_proj.bias", "(nh)", init="zeros", of="attention"),
            "k_bias": Weight("kh", attention + "k_proj.bias", "(kh)", init="zeros", of="attention"),
            "v_bias": Weight("kh", attention + "v_proj.bias", "(kh)", init="zeros", of="attention"),
        }
    if cfg.qk_norm:
        of_q, of_k = ("h", "h") if cfg.qk_norm == "head" else ("nh", "kh")
        table |= {
            "q_norm": Weight(of_q, attention + "q_norm.weight", f"({of_q})", init=one, of="attention"),
            "k_norm": Weight(of_k, attention + "k_norm.weight", f"({of_k})", init=one, of="attention"),
        }
    if cfg.output_gate:
        table["q"] = replace(table["q"], axes="dni", torch="(ni)d")
    if not cfg.tied:
        table["unembed"] = Weight("vd", "lm_head.weight", "vd", place="u_", rows="v")  # the layout that the loss needs
    return {name: weight for name, weight in table.items() if not weight.layered or weight.layers(cfg)}


def tensors(cfg: ModelConfig) -> dict[str, list[str]]:
    """The weights by the Hugging Face name they have: those of one name are one tensor, their rows one after another."""
    found: dict[str, list[str]] = {}
    for name, weight in declare(cfg).items():
        found.setdefault(weight.hf, []).append(name)
    return found


def places(cfg: ModelConfig) -> dict[str, tuple[tuple[int, ...], slice]]:
    """By weight: the shape of the tensor that holds it, and which of its rows it is."""
    table, found = declare(cfg), {}
    for names in tensors(cfg).values():
        rows = [table[name].part.torch_shape(cfg)[0] for name in names]
        for i, name in enumerate(names):
            whole = (sum(rows), *table[name].part.torch_shape(cfg)[1:])
            found[name] = (whole, slice(sum(rows[:i]), sum(rows[: i + 1])))
    return found


def tree(cfg: ModelConfig, leaf) -> Params:
    """A parameter tree whose leaves are `leaf(name, weight)`."""
    params: Params = {"layers": {}}
    for name, weight in declare(cfg).items():
        (params["layers"] if weight.layered else params)[name] = leaf(name, weight)
    return params


def full_shape(weight: Weight, cfg: ModelConfig) -> tuple[int, ...]:
    return (len(weight.layers(cfg)), *weight.shape(cfg)) if weight.layered else weight.shape(cfg)


def abstract(cfg: ModelConfig, dtype, mesh: jax.sharding.Mesh | None = None, quantize: str | None = None) -> Params:
    """Shapes (and shardings) without data: for compiling ahead of time and for restoring."""

    def leaf(name, weight):
        shape = full_shape(weight, cfg)
        if not (quantize and weight.channels):
            return jax.ShapeDtypeStruct(shape, dtype)
        scale = shape[: weight.layered] + tuple(weight.size(axis, cfg) for axis in weight.channels)
        return Int8(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(scale, dtype))  # pyright: ignore

    shapes = tree(cfg, leaf)
    if mesh is None:
        return shapes
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, shapes, shardings(cfg, mesh, quantize))


def shardings(cfg: ModelConfig, mesh: jax.sharding.Mesh, quantize: str | None = None) -> Params:
    """The NamedSharding of every weight, and of a scale where its channel lies.

    Raises UserError where an axis does not divide evenly, and for experts in int8.
    """
    if quantize and cfg.experts is not None:
        raise UserError(f"got {quantize}, want null: experts are not quantised yet", field="model.quantize")

    def leaf(name, weight):
        spread = weight.place and cfg.size(weight.axes[0]) % mesh_lib.axis_size(mesh, weight.place[0]) == 0
        letters, layers = weight.place if spread else weight.axes, "l" * weight.layered
        for letter in "" if spread else weight.axes:
            parts = mesh_lib.axis_size(mesh, letter)
            if weight.size(letter, cfg) % parts:
                raise UserError(
                    f"axis {letter!r} of weight {name!r} has size {weight.size(letter, cfg)}, "
                    f"want a multiple of the {parts} devices it is sharded over",
                    field="mesh",
                )
        where = mesh_lib.sharding(mesh, layers + letters)
        if not (quantize and weight.channels):
            return where
        channels = "".join(letters[weight.axes.index(axis)] for axis in weight.channels)
        return Int8(where, mesh_lib.sharding(mesh, layers + channels))  # pyright: ignore

    return tree(cfg, leaf)


def init(key: jax.Array, cfg: ModelConfig, dtype=jnp.float32, std: float = 0.02) -> Params:
    """Random weights: normal with the given standard deviation; norms multiply by one, biases add zero.

    A delta net's decays are as its authors draw them.
    """
    names = list(declare(cfg))

    def leaf(name, weight):
        shape = full_shape(weight, cfg)
        one = jax.random.fold_in(key, names.index(name))
        if weight.init == "normal":
            return std * jax.random.normal(one, shape, dtype)
        if weight.init == "log_uniform":
            return jnp.log(jax.random.uniform(one, shape, dtype, 0.01, 16))
        return (jnp.ones if weight.init == "ones" else jnp.zeros)(shape, dtype)

    return tree(cfg, leaf)


def of_layer(stacked: dict[str, Any], index: int, cfg: ModelConfig) -> dict[str, Any]:
    """One layer's part of stacked weights, or of what is named and stacked like them, such as a LoRA."""
    table, part = declare(cfg), {}
    for name, leaf in stacked.items():
        layers = table[name].layers(cfg)
        if index in layers:
            row = layers.index(index)
            part[name] = jax.tree.map(lambda x, row=row: x[row], leaf)
    return part


def unstack(params: Params, cfg: ModelConfig) -> Params:
    """The same weights with one array per layer: otherwise decoding copies slices every step."""
    layers = params["layers"]
    if isinstance(layers, list):
        return params
    return {**params, "layers": [of_layer(layers, i, cfg) for i in range(cfg.L)]}


def moved(
    params: Params, cfg: ModelConfig, mesh: jax.sharding.Mesh, stacked: bool, quantize: str | None = None
) -> Params:
    """The same weights on another mesh of the same devices, stacked or with one array per layer.

    It goes from device to device and empties `params` on its way, so that where nobody else holds these arrays no more
    than one weight of all layers exists twice.
    """
    layout, layers = shardings(cfg, mesh, quantize), params.pop("layers")
    out = {name: jax.device_put(params.pop(name), layout[name]) for name in list(params)}
    ours: Any = {} if stacked else [{} for _ in cfg.layers]
    for name, weight in declare(cfg).items():
        if not weight.layered:
            continue
        where, having = layout["layers"][name], weight.layers(cfg)
        if isinstance(layers, dict):
            parts = jax.device_put(layers.pop(name), where)
            parts = parts if stacked else _split(parts, len(having))
        else:
            one = jax.tree.map(
                lambda w: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*w.spec[1:])), where
            )
            parts = [jax.device_put(layers[i].pop(name), one) for i in having]
            parts = _stack(*parts) if stacked else parts
        if stacked:
            ours[name] = parts
        else:
            for i, part in zip(having, parts, strict=True):
                ours[i][name] = part
    return {**out, "layers": ours}


@jax.jit
def _stack(*parts):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


@functools.partial(jax.jit, static_argnums=1)
def _split(stacked, count: int):
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]


def count(cfg: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(full_shape(w, cfg)) for w in declare(cfg).values())
