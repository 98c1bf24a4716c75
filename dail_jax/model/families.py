"""Reads a Hugging Face config.json into the few numbers that describe a model, and rejects what is not supported.

A family is a reader in FAMILIES. Where its layers differ from all others, it adds a row to `weights.declare`, or a part
to a table in `blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dail_jax import strict_json
from dail_jax.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary embedding; `kind` is one of default, linear, llama3, yarn. Sizes in tokens."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    truncate: bool = True  # yarn
    share: float = 1.0  # of a head's dimensions, the first ones, that are rotated

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Angles per position [H/2] (float32), fewer if only a share is rotated, and the factor on cos and sin.

        Sources: RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071), Llama 3.1 as released.
        """
        head_dim = int(head_dim * self.share)
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        inverse = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.kind == "linear":
            return inverse / np.float32(self.factor), 1.0
        if self.kind == "llama3":
            wavelength = 2 * np.pi / inverse
            low, high = self.low_freq_factor, self.high_freq_factor
            share = np.clip((self.original_length / wavelength - low) / (high - low), 0, 1)
            return ((1 - share) * inverse / self.factor + share * inverse).astype(np.float32), 1.0
        if self.kind == "yarn":

            def dim_of(rotations: float) -> float:
                return head_dim * np.log(self.original_length / (rotations * 2 * np.pi)) / (2 * np.log(self.theta))

            low, high = dim_of(self.beta_fast), dim_of(self.beta_slow)
            if self.truncate:
                low, high = np.floor(low), np.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
            scale = self.attention_factor
            if scale is None:
                scale = 0.1 * float(np.log(self.factor)) + 1.0 if self.factor > 1 else 1.0
            return (inverse / self.factor * ramp + inverse * (1 - ramp)).astype(np.float32), scale
        return inverse, 1.0


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer: its parts, by name in `blocks`, and how far and by what its queries see."""

    rope: Rope | None  # None: positions enter through the mask alone
    window: int | None = None  # tokens that a query sees, its own among them; None: all
    mixer: str = "attention"
    mlp: str = "dense"


@dataclass(frozen=True)
class Experts:
    """A mixture of J experts of width I, of which each token gets `top`."""

    J: int
    I: int  # noqa: E741
    top: int
    normalise: bool  # the weights of a token's experts sum to 1


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta net: K heads of queries and keys of size H serve N heads of values of size I; Z taps."""

    N: int
    K: int
    H: int
    I: int  # noqa: E741
    Z: int

    @property
    def Y(self) -> int:
        return 2 * self.H + self.N // self.K * self.I


@dataclass(frozen=True)
class ModelConfig:
    """Sizes by axis letter, a description of every layer, and the switches by which families differ."""

    family: str
    V: int
    D: int
    N: int
    K: int
    H: int
    F: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied: bool
    qk_norm: Literal["", "head", "heads"]  # of queries and keys: none, each head on its own, all heads at once
    qkv_bias: bool
    max_positions: int
    norms: Literal["pre", "post", "both"] = "pre"  # before the mixer and the MLP, behind them, or both
    norm: Literal["cast", "float32", "one_plus"] = "cast"  # how its weight enters: `layers.rms_norm`
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None  # of queries times keys; None: one over the square root of H
    embedding_scale: float | None = None
    fused: bool = False  # whether files hold q, k and v in one tensor, and gate and up in another
    experts: Experts | None = None
    deltanet: DeltaNet | None = None
    output_gate: bool = False  # what attention reads is multiplied by the sigmoid of a gate beside each query
    left_out: tuple[str, ...] = ()  # how names of tensors begin that a folder may hold beside the model's

    @property
    def I(self) -> int:  # noqa: E743
        return 2 * self.H

    @property
    def L(self) -> int:
        return len(self.layers)

    def size(self, letter: str, part: str = "") -> int:
        """The size of an axis, in weights of a part that may have sizes of its own."""
        own = getattr(self, part, None) if part else None
        return getattr(own if hasattr(own, letter.upper()) else self, letter.upper())

    @property
    def period(self) -> int:
        """After how many layers their descriptions repeat; the last repetition may be incomplete."""
        return next(p for p in range(1, self.L + 1) if all(x == self.layers[i % p] for i, x in enumerate(self.layers)))


# The largest plausible sizes; anything larger comes from a damaged or hostile file.
LIMITS = {
    "vocab_size": 2**21,
    "hidden_size": 2**16,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 4096,
    "intermediate_size": 2**20,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "moe_intermediate_size": 2**20,
    "linear_num_key_heads": 1024,
    "linear_num_value_heads": 1024,
    "linear_key_head_dim": 4096,
    "linear_value_head_dim": 4096,
    "linear_conv_kernel_dim": 64,
}


class Reader:
    """Typed access to config.json with one-line errors."""

    def __init__(self, tree: dict[str, Any], file: Path):
        self.tree, self.file = tree, file

    def size(self, key: str, default: int | None = None, tree: dict | None = None, least: int = 1) -> int:
        value = (self.tree if tree is None else tree).get(key, default)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LIMITS.get(key, 2**31):
            raise UserError(
                f"got {value!r:.80}, want a size from {least} to {LIMITS.get(key, 2**31)}", file=self.file, field=key
            )
        return value

    def depth(self) -> int:
        return self.size("num_hidden_layers")

    def number(self, key: str, default: float, tree: dict | None = None) -> float:
        value = (self.tree if tree is None else tree).get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise UserError(f"got {value!r:.80}, want a positive number", file=self.file, field=key)
        return float(value)

    def flag(self, key: str, default: bool, tree: dict | None = None) -> bool:
        value = (self.tree if tree is None else tree).get(key, default)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"got {value!r:.80}, want true or false", file=self.file, field=key)
        return default if value is None else value

    def refuse(self, key: str, allowed: tuple, default: Any = None) -> None:
        value = self.tree.get(key, default)
        if value not in allowed:
            raise UserError(
                f"got {value!r:.80}, which is not supported; want {allowed[0]!r}", file=self.file, field=key
            )


ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _rope(
    reader: Reader, default_theta: float = 10_000.0, types: tuple[str, ...] = ROPE_TYPES, share: float | None = None
) -> Rope:
    """The one rotation of all layers. `share` is the default of families that may rotate a part of each head."""
    scaling = _mapping(reader, reader.tree.get("rope_parameters") or reader.tree.get("rope_scaling"))
    for name in LAYER_TYPES:
        if name in scaling:
            raise UserError("one rotation for each type of layer is not supported here", file=reader.file, field=name)
    return _one_rope(reader, scaling, reader.number("rope_theta", default_theta), types, share)


def _ropes(reader: Reader, theta: float, local_theta: float) -> dict[bool, Rope]:
    """The rotations of layers that see everything (False) and of those with a window (True).

    Only the former is scaled, unless `rope_parameters` has one entry for each of them.
    """
    scaling = _mapping(reader, reader.tree.get("rope_parameters"))
    if not set(scaling) & set(LAYER_TYPES):
        scaling = {"full_attention": scaling or reader.tree.get("rope_scaling")}
    found = {}
    for windowed, default in ((False, theta), (True, local_theta)):
        found[windowed] = _one_rope(reader, _mapping(reader, scaling.get(LAYER_TYPES[windowed])), default)
    return found


def _mapping(reader: Reader, value: Any) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise UserError(f"got {value!r:.80}, want a mapping", file=reader.file, field="rope_scaling")
    return value or {}


def _one_rope(
    reader: Reader,
    scaling: dict[str, Any],
    theta: float,
    types: tuple[str, ...] = ROPE_TYPES,
    share: float | None = None,
) -> Rope:
    tree = reader.tree
    theta = reader.number("rope_theta", theta, scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in types:
        raise UserError(
            f"rope type {kind!r:.80} is not supported; want {' or '.join(types)}",
            file=reader.file,
            field="rope_scaling",
        )
    partial = "partial_rotary_factor"
    given = reader.number(
        partial, reader.number(partial, share or 1.0) if tree.get(partial) is not None else share or 1.0, scaling
    )
    if given > 1 or (share is None and given != 1):
        raise UserError(f"got {given}, which is not supported here", file=reader.file, field=partial)
    if kind == "default":
        return Rope(theta, share=given)
    if scaling.get("mscale") or scaling.get("mscale_all_dim"):
        raise UserError("YaRN with mscale is not supported", file=reader.file, field="rope_scaling")
    if scaling.get("attn_factor") not in (None, 1):
        raise UserError(
            "attn_factor is read by some engines and ignored by others: want attention_factor, the factor on cos and sin",
            file=reader.file,
            field="rope_scaling",
        )
    factor = reader.number("factor", 1.0, scaling)
    if kind == "linear":
        return Rope(theta, kind, factor, share=given)
    trained = scaling if scaling.get("original_max_position_embeddings") is not None else tree
    length = reader.size(
        "max_position_embeddings" if trained is tree else "original_max_position_embeddings", tree=trained
    )
    attention = None
    if scaling.get("attention_factor") is not None:
        attention = reader.number("attention_factor", 1.0, scaling)
    return Rope(
        theta,
        kind,
        factor,
        length,
        reader.number("low_freq_factor", 1.0, scaling),
        reader.number("high_freq_factor", 4.0, scaling),
        reader.number("beta_fast", 32.0, scaling),
        reader.number("beta_slow", 1.0, scaling),
        attention,
        reader.flag("truncate", True, scaling),
        given,
    )


ACTIVATIONS = {"silu": ("hidden_act", "silu"), "gelu_tanh": ("hidden_activation", "gelu_pytorch_tanh")}  # key, value
LAYER_TYPES = ("full_attention", "sliding_attention")


def _windows(reader: Reader, default: list[bool], size: int = 4096) -> list[int | None]:
    """Each layer's window: where `layer_types` says so or, without them, where `default` does."""
    types = reader.tree.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != len(default) or any(kind not in LAYER_TYPES for kind in types):
            raise UserError(
                f"got {types!r:.80}, want {len(default)} of {' and '.join(LAYER_TYPES)}",
                file=reader.file,
                field="layer_types",
            )
        default = [kind == "sliding_attention" for kind in types]
    return [reader.size("sliding_window", size) if slides else None for slides in default]


def _switched_windows(reader: Reader) -> list[int | None]:
    """As Qwen has them: only with `use_sliding_window`, and then from `max_window_layers` on."""
    depth, switched = reader.depth(), reader.flag("use_sliding_window", False)
    if not switched or reader.tree.get("sliding_window", 4096) is None:
        reader.refuse("layer_types", (None, ["full_attention"] * depth))
        return [None] * depth
    first = reader.size("max_window_layers", 28, least=0)
    return _windows(reader, [i >= first for i in range(depth)])


def _layers(rope: Rope, windows: list[int | None]) -> tuple[Layer, ...]:
    return tuple(Layer(rope, window) for window in windows)


def _common(
    reader: Reader,
    family: str,
    layers: tuple[Layer, ...],
    *,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    tied: bool = False,
    activation: Literal["silu", "gelu_tanh"] = "silu",
    qk_norm: Literal["", "head", "heads"] = "",
    qkv_bias: bool = False,
    **more: Any,
) -> ModelConfig:
    """What all families have; keywords are a family's defaults, and what is only its own."""
    key, value = ACTIVATIONS[activation]
    reader.refuse(key, (value,), value)
    reader.refuse("quantization_config", (None,))
    d, n = reader.size("hidden_size"), reader.size("num_attention_heads")
    k = reader.size("num_key_value_heads", n)
    if n % k:
        raise UserError(f"got {k} kv heads, want a divisor of {n} heads", file=reader.file, field="num_key_value_heads")
    h = reader.size("head_dim", head_dim or max(d // n, 1))
    for rope in {layer.rope for layer in layers if layer.rope is not None}:
        if int(h * rope.share) % 2 or not int(h * rope.share):
            raise UserError(f"got head size {h}, want an even one to rotate", file=reader.file, field="head_dim")
    return ModelConfig(
        family=family,
        V=reader.size("vocab_size"),
        D=d,
        N=n,
        K=k,
        H=h,
        F=reader.size("intermediate_size"),
        layers=layers,
        norm_eps=reader.number("rms_norm_eps", norm_eps),
        tied=reader.flag("tie_word_embeddings", tied),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        max_positions=reader.size("max_position_embeddings", 32768),
        activation=activation,
        **more,
    )


def _qwen2(reader: Reader) -> ModelConfig:
    return _common(reader, "qwen2", _layers(_rope(reader), _switched_windows(reader)), qkv_bias=True)


def _qwen3(reader: Reader) -> ModelConfig:
    reader.refuse("attention_bias", (False, None))
    layers = _layers(_rope(reader), _switched_windows(reader))
    return _common(reader, "qwen3", layers, qk_norm="head", head_dim=128)


def _qwen3_moe(reader: Reader) -> ModelConfig:
    """Qwen3 with a mixture of experts in every `decoder_sparse_step`-th layer that is not among `mlp_only_layers`."""
    reader.refuse("attention_bias", (False, None))
    reader.refuse("use_sliding_window", (False, None))
    depth, every = reader.size("num_hidden_layers"), reader.size("decoder_sparse_step", 1)
    dense = reader.tree.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < depth for i in dense):
        raise UserError(f"got {dense!r:.80}, want numbers of layers", file=reader.file, field="mlp_only_layers")
    key = "num_local_experts" if "num_experts" not in reader.tree else "num_experts"  # as transformers 5 writes it
    count, top = reader.size(key), reader.size("num_experts_per_tok", 8)
    if top > count:
        raise UserError(f"got {top}, want at most the {count} experts", file=reader.file, field="num_experts_per_tok")
    rope = _rope(reader)
    sparse = [(i + 1) % every == 0 and i not in dense for i in range(depth)]
    layers = tuple(Layer(rope, mlp="experts" if picks else "dense") for picks in sparse)
    found = Experts(count, reader.size("moe_intermediate_size", 768), top, reader.flag("norm_topk_prob", False))
    return replace(_common(reader, "qwen3_moe", layers, qk_norm="head"), experts=found)


def _qwen3_5(reader: Reader) -> ModelConfig:
    """The text model of Qwen3.5 and 3.6: gated delta nets, and attention with an output gate in every fourth layer.

    Its heads that predict several tokens (`mtp`) and the images' part of a multimodal folder are left out.
    """
    if reader.tree.get("model_type") == "qwen3_5":
        reader.refuse("quantization_config", (None,))
        text = reader.tree.get("text_config")
        if not isinstance(text, dict) or text.get("model_type", "qwen3_5_text") != "qwen3_5_text":
            raise UserError("want the description of a qwen3_5_text", file=reader.file, field="text_config")
        reader = Reader(text_only(reader.tree), reader.file)
    reader.refuse("attention_bias", (False, None))
    reader.refuse("attn_output_gate", (True, None))
    reader.refuse("output_gate_type", ("swish", "silu", None))
    reader.refuse("mamba_ssm_dtype", ("float32", None))
    depth, interval = reader.size("num_hidden_layers"), reader.size("full_attention_interval", 4)
    types = reader.tree.get("layer_types")
    if types is None:
        types = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(depth)]
    mixers = {"full_attention": "attention", "linear_attention": "deltanet"}
    if not isinstance(types, list) or len(types) != depth or any(kind not in mixers for kind in types):
        raise UserError(
            f"got {types!r:.80}, want {depth} of {' and '.join(mixers)}", file=reader.file, field="layer_types"
        )
    if "full_attention" not in types:
        raise UserError("got no full_attention, want at least one", file=reader.file, field="layer_types")
    rope, kinds = _rope(reader, share=0.25), [mixers[kind] for kind in types]
    layers = tuple(Layer(rope if kind == "attention" else None, mixer=kind) for kind in kinds)
    net = DeltaNet(
        reader.size("linear_num_value_heads", 32),
        reader.size("linear_num_key_heads", 16),
        reader.size("linear_key_head_dim", 128),
        reader.size("linear_value_head_dim", 128),
        reader.size("linear_conv_kernel_dim", 4),
    )
    if net.N % net.K:
        raise UserError(
            f"got {net.N}, want a multiple of the {net.K} key heads", file=reader.file, field="linear_num_value_heads"
        )
    return replace(
        _common(reader, "qwen3_5", layers, head_dim=256, qk_norm="head"),
        deltanet=net,
        output_gate=True,
        norm="one_plus",
        left_out=("mtp.", "model.visual."),
    )


def _llama(reader: Reader) -> ModelConfig:
    reader.refuse("attention_bias", (False, None))
    reader.refuse("mlp_bias", (False, None))
    reader.refuse("use_sliding_window", (False, None))
    depth = reader.depth()
    reader.refuse("layer_types", (None, ["full_attention"] * depth))
    return _common(reader, "llama", _layers(_rope(reader), [None] * depth))


def _mistral(reader: Reader) -> ModelConfig:
    """Mistral 7B and its successors of the same type: Llama's weights, and a window in all layers or in none."""
    depth = reader.depth()
    slides = reader.tree.get("sliding_window", 4096) is not None
    reader.refuse("layer_types", (None, [LAYER_TYPES[slides]] * depth))
    return _common(reader, "mistral", _layers(_rope(reader), _windows(reader, [slides] * depth)))


def _smollm3(reader: Reader) -> ModelConfig:
    """SmolLM3: no rotary embedding in every fourth layer, or where `no_rope_layers` is 0."""
    reader.refuse("attention_bias", (False, None))
    reader.refuse("mlp_bias", (False, None))
    depth = reader.depth()
    interval = reader.size("no_rope_layer_interval", 4)
    rotates = reader.tree.get("no_rope_layers")
    if rotates is None:
        rotates = [int((i + 1) % interval != 0) for i in range(depth)]
    if not isinstance(rotates, list) or len(rotates) < depth or any(x not in (0, 1) for x in rotates):
        raise UserError(f"got {rotates!r:.80}, want {depth} of 0 and 1", file=reader.file, field="no_rope_layers")
    windows: list[int | None] = [None] * depth
    if reader.flag("use_sliding_window", False) and reader.tree.get("sliding_window") is not None:
        windows = _windows(reader, [not x for x in rotates[:depth]])
    else:
        reader.refuse("layer_types", (None, ["full_attention"] * depth))
    rope = _rope(reader, 2_000_000.0)
    layers = tuple(Layer(rope if x else None, w) for x, w in zip(rotates, windows, strict=False))
    return _common(reader, "smollm3", layers, tied=True)


def _olmo(reader: Reader, family: str, layers: tuple[Layer, ...]) -> ModelConfig:
    """OLMo 2 and 3: norms behind the mixer and the MLP, and over the queries and keys of all heads at once."""
    reader.refuse("attention_bias", (False, None))
    return _common(reader, family, layers, norm_eps=1e-5, qk_norm="heads", norms="post", norm="float32")


def _olmo2(reader: Reader) -> ModelConfig:
    reader.refuse("layer_types", (None, ["full_attention"] * reader.depth()))
    return _olmo(reader, "olmo2", _layers(_rope(reader), [None] * reader.depth()))


def _olmo3(reader: Reader) -> ModelConfig:
    """OLMo 3: a window in three of four layers, and scaled rotation (YaRN) in the others only."""
    theta = reader.number("rope_theta", 500_000.0)
    ropes = _ropes(reader, theta, theta)
    windows = _windows(reader, [(i + 1) % 4 != 0 for i in range(reader.depth())])
    return _olmo(reader, "olmo3", tuple(Layer(ropes[w is not None], w) for w in windows))


def _gemma3(reader: Reader) -> ModelConfig:
    """Gemma 3, text: norms on both sides, five layers with a window to one without, and a rotation for each of them."""
    reader.refuse("attention_bias", (False, None))
    reader.refuse("attn_logit_softcapping", (None,))
    reader.refuse("final_logit_softcapping", (None,))
    reader.refuse("use_bidirectional_attention", (False, None))
    ropes = _ropes(reader, reader.number("rope_theta", 1e6), reader.number("rope_local_base_freq", 1e4))
    every = reader.size("sliding_window_pattern", 6)
    windows = _windows(reader, [(i + 1) % every != 0 for i in range(reader.depth())])
    return _common(
        reader,
        "gemma3_text",
        tuple(Layer(ropes[w is not None], w) for w in windows),
        head_dim=256,
        tied=True,
        activation="gelu_tanh",
        qk_norm="head",
        norms="both",
        norm="one_plus",
        attention_scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=reader.size("hidden_size") ** 0.5,
    )


def _phi3(reader: Reader) -> ModelConfig:
    """Phi-3 and Phi-4: Llama's layers with fused tensors. Of the two sets of factors of `longrope`, the length of the
    longest text in a batch would decide, so that a text would depend on its neighbours."""
    reader.refuse("attention_bias", (False, None))
    depth = reader.depth()
    windows = _windows(reader, [reader.tree.get("sliding_window") is not None] * depth)
    return _common(
        reader, "phi3", _layers(_rope(reader, types=("default",), share=1.0), windows), norm_eps=1e-5, fused=True
    )


FAMILIES: dict[str, Callable[[Reader], ModelConfig]] = {
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_5_text": _qwen3_5,
    "qwen3_5": _qwen3_5,
    "llama": _llama,
    "mistral": _mistral,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
}


def text_only(tree: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text model in a multimodal one; any other is returned as it is."""
    if tree.get("model_type") != "qwen3_5":
        return tree
    text = {**tree["text_config"], "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}
    return text | ({"mtp_num_hidden_layers": 0} if "mtp_num_hidden_layers" in text else {})


def from_tree(tree: dict[str, Any], file: str | Path) -> ModelConfig:
    """The model that a config.json describes; raises UserError that names what is not supported."""
    family = tree.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        if isinstance(tree.get("text_config"), dict):
            raise UserError(
                f"model type {family!r:.80}, a text model among others, is not supported; save the text model alone, "
                f"as one of {known}",
                file=file,
                field="model_type",
            )
        raise UserError(
            f"model type {family!r:.80} is not supported; want one of {known}", file=file, field="model_type"
        )
    return FAMILIES[family](Reader(tree, Path(file)))


def read_config(folder: str | Path) -> ModelConfig:
    """The model that a Hugging Face folder's config.json describes; raises UserError."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError("not found: want a Hugging Face model folder", file=file)
    return from_tree(strict_json.read_object(file), file)
