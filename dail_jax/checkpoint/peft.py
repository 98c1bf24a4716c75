"""LoRA trees <-> PEFT adapter folders, in the format that peft, transformers and vLLM load.

peft's pairs belong to the modules of Hugging Face's model. Where a module holds several of our weights (Phi's `qkv_proj`
is q, k and v), its pair is read as one pair for each of them with the same `a`. Ours have an `a` each, so what is
written has their ranks added up, with zeros between them: the same function, exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import strict_json
from dail_jax.checkpoint.hf import PROVENANCE, Tensors, new_folder, put, verify_manifest, write_manifest
from dail_jax.errors import UserError
from dail_jax.mesh import is_first
from dail_jax.model.families import ModelConfig
from dail_jax.model.lora import Lora, adaptable, shardings
from dail_jax.model.weights import Weight, declare, places
from dail_jax.model.weights import tensors as tensors_of
from dail_jax.provenance import Checksums, digest

WEIGHTS = "adapter_model.safetensors"


def save(
    folder: str | Path,
    lora: Lora,
    cfg: ModelConfig,
    lora_config: config_lib.LoraConfig,
    base: str,
    made_of: dict[str, Any] | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; raises UserError if the folder exists."""
    table, modules = declare(cfg), _modules(cfg, lora.tree)
    pairs = {name: {side: np.asarray(x, np.float32) for side, x in pair.items()} for name, pair in lora.tree.items()}
    more = max(sum(name in pairs for name in names) for names in modules.values())  # ranks are the same everywhere
    tensors = {}
    for names in modules.values():
        weight = table[names[0]]
        for row, layer in enumerate(weight.layers(cfg)):
            a, b = _joined(names, pairs, row, cfg, more * lora_config.rank)
            tensors[weight_name(weight, layer, "a")], tensors[weight_name(weight, layer, "b")] = a, b
    alpha = (math.sqrt(more) if lora_config.use_rslora else more) * lora_config.alpha  # the scale stays the same
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": more * lora_config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": lora_config.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": list(dict.fromkeys(table[name].module for name in lora.tree)),
    }
    with new_folder(folder, made_of) as temporary:
        if not is_first():
            return
        (temporary / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_manifest(temporary)


def inspect(folder: Path, cfg: ModelConfig) -> config_lib.LoraConfig:
    """What an adapter is; raises UserError that lists what does not fit the model. Its weights are not read."""
    description = read_description(folder)
    file = folder / "adapter_config.json"
    by_name = {name: weight.module for name, weight in adaptable(cfg).items()}
    unknown = sorted(set(description["target_modules"]) - set(by_name.values()))
    if unknown:
        known = ", ".join(dict.fromkeys(by_name.values()))
        raise UserError(f"got {', '.join(unknown)}, want some of {known}", file=file, field="target_modules")
    targets = [name for name, module in by_name.items() if module in description["target_modules"]]
    lora_config = config_lib.LoraConfig(
        rank=description["r"],
        alpha=description["lora_alpha"],
        use_rslora=description.get("use_rslora", False),
        targets=tuple(targets),  # pyright: ignore[reportArgumentType]
    )
    with Tensors(folder, WEIGHTS) as source:
        wanted = _shapes(cfg, lora_config)
        for problem, names in (
            ("missing", wanted.keys() - source.where.keys()),
            ("unexpected", source.where.keys() - wanted.keys()),
        ):
            if names:
                raise UserError(
                    f"{problem} tensors: {', '.join(sorted(names)[:3])} ({len(names)} in all)", file=folder / WEIGHTS
                )
        for name, shape in wanted.items():
            source.check(name, shape)
    return lora_config


def _modules(cfg: ModelConfig, targets: Iterable[str]) -> dict[str, list[str]]:
    """The modules that hold any of our targets, each with the names of all that it holds."""
    return {hf: names for hf, names in tensors_of(cfg).items() if set(names) & set(targets)}


def _sizes(weight: Weight, cfg: ModelConfig) -> tuple[int, int]:
    """(inputs, outputs) of a linear map, flattened."""
    shape = weight.shape(cfg)
    return math.prod(shape[: weight.inputs]), math.prod(shape[weight.inputs :])


def _joined(names: list[str], pairs: dict, row: int, cfg: ModelConfig, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A module's a [rank, inputs] and b [outputs, rank] of one layer, of the pairs of what it holds; zeros elsewhere."""
    table = declare(cfg)
    inputs, outputs = _sizes(table[names[0]], cfg)[0], sum(_sizes(table[name], cfg)[1] for name in names)
    a, b = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
    at = start = 0
    for name in names:
        size = _sizes(table[name], cfg)[1]
        if name in pairs:
            one = _to_torch(pairs[name]["a"][row], "a")
            a[at : at + len(one)] = one
            two = table[name].rows_to_torch(_to_torch(pairs[name]["b"][row], "b"), cfg)
            b[start : start + size, at : at + len(one)] = two
            at += len(one)
        start += size
    return a, b


def _shapes(cfg: ModelConfig, lora_config: config_lib.LoraConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter's file, by peft's names."""
    table, found = declare(cfg), {}
    for names in _modules(cfg, lora_config.targets).values():
        weight = table[names[0]]
        for i in weight.layers(cfg):
            found[weight_name(weight, i, "a")] = (lora_config.rank, _sizes(weight, cfg)[0])
            found[weight_name(weight, i, "b")] = (sum(_sizes(table[name], cfg)[1] for name in names), lora_config.rank)
    return found


def load(folder: str | Path, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Lora, config_lib.LoraConfig]:
    """The adapter in a folder, sharded over the mesh; raises UserError that lists what does not fit the model."""
    folder, table = Path(folder), declare(cfg)
    mesh_lib.from_first(lambda: verify_manifest(folder))
    lora_config = inspect(folder, cfg)
    shapes, where = _shapes(cfg, lora_config), places(cfg)
    tree: dict[str, dict[str, Any]] = {}
    with Tensors(folder, WEIGHTS) as source:
        for name in lora_config.targets:
            weight, pair = table[name], {"a": [], "b": []}
            for side, letters in (("a", weight.axes[: weight.inputs]), ("b", weight.axes[weight.inputs :])):
                sizes = [weight.size(letter, cfg) for letter in letters]
                rows = where[name][1] if side == "b" else slice(None)  # of what its module holds
                for i in weight.layers(cfg):
                    tensor = weight_name(weight, i, side)
                    x = source.read(tensor, shapes[tensor], rows).astype(np.float32)
                    x = (weight.rows_from_torch(x, cfg) if side == "b" else x).T
                    pair[side].append(x.reshape(*sizes, -1) if side == "a" else x.reshape(-1, *sizes))
            tree[name] = pair
    stacked = {n: {s: np.stack(x) for s, x in pair.items()} for n, pair in tree.items()}
    placed = jax.tree.map(put, stacked, shardings(cfg, lora_config, mesh).tree)
    return Lora(placed, lora_config.scale), lora_config


def adapter_digest(folder: Path, checksum: Checksums) -> str:
    """One digest of an adapter's weights and description; raises UserError if there is no adapter."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError("not found: want a PEFT adapter folder", file=file)
    return digest([read_description(folder), checksum(file)])


# A field of adapter_config.json is read below (READ, ONLY), has no effect on a finished adapter (INERT), or must be off,
# as must every field that a later version of peft adds.
READ = {"r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "base_model_name_or_path"}
ONLY = {"peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"), "bias": (None, "none")}
INERT = {
    "auto_mapping",
    "eva_config",
    "inference_mode",
    "lora_dropout",  # of training
    "megatron_core",  # no effect without a megatron_config
    "peft_version",
    "qalora_group_size",  # no effect without use_qalora
    "revision",
    "runtime_config",
}
INITS = (True, False, "gaussian", "eva", "orthogonal")  # initialisations that do not change the base model


def read_description(folder: Path) -> dict[str, Any]:
    """A checked adapter_config.json; raises UserError for the first field that this package would not treat as peft does."""
    file = folder / "adapter_config.json"
    if not file.exists():
        raise UserError("not found: want a PEFT adapter folder", file=file)
    tree = strict_json.read_object(file)

    def wrong(field: str, want: str) -> UserError:
        return UserError(f"got {tree.get(field)!r:.80}, {want}", file=file, field=field)

    for field, wanted in ONLY.items():
        if tree.get(field) not in wanted:
            raise wrong(field, f"want {wanted[-1]!r}: no other is supported")
    for field in tree.keys() - READ - INERT - ONLY.keys():
        if not _is_off(tree[field]):
            raise wrong(strict_json.printable(field), "which is not supported: want an adapter without it")
    if tree.get("init_lora_weights", True) not in INITS:
        raise wrong(
            "init_lora_weights",
            "which may change the base model: save the adapter with peft's option "
            "path_initial_model_for_weight_conversion",
        )
    if type(tree.get("r")) is not int or not 1 <= tree["r"] <= 2**20:
        raise wrong("r", "want a positive whole number")
    if type(tree.get("lora_alpha")) not in (int, float) or not 0 < tree["lora_alpha"] <= 2**20:
        raise wrong("lora_alpha", "want a positive number")
    if type(tree.get("use_rslora", False)) is not bool:
        raise wrong("use_rslora", "want true or false")
    if tree.get("base_model_name_or_path") is not None and not isinstance(tree["base_model_name_or_path"], str):
        raise wrong("base_model_name_or_path", "want text")
    modules = tree.get("target_modules")
    if not isinstance(modules, list) or not modules or not all(isinstance(m, str) for m in modules):
        raise wrong("target_modules", "want a list of modules")
    return tree


def refuse_other_base(folder: str | Path, model: str | Path, quantize: str | None = None) -> None:
    """Raises UserError if an adapter names another base model than the one in the folder `model`.

    Likewise if its provenance says that it was trained on int8 weights and `quantize` asks for exact ones, or the other
    way round.

    An adapter knows its base by name alone: the last part of the two paths, or of the path and the name on the hub, must
    agree. A folder that `convert` made may have any name, so there the two config.json must be equal instead.
    """
    folder, model = Path(folder), Path(model)
    try:
        trained_on = json.loads((folder / PROVENANCE).read_text())["settings"]["model"].get("quantize")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it was not made here
        trained_on = quantize
    if trained_on != quantize:
        raise UserError(
            f"was trained on {trained_on or 'exact'} weights, and these are {quantize or 'exact'}: set model.quantize to "
            f"{trained_on or 'null'}",
            file=folder,
        )
    name = read_description(folder).get("base_model_name_or_path")
    if name is None:
        return
    base = Path(name)
    theirs, ours = base.name.casefold(), model.resolve()
    cached = f"--{theirs}"  # .../models--Qwen--Qwen3-4B/snapshots/..., as the hub's client keeps it
    if theirs in (model.name.casefold(), ours.name.casefold()) or base.resolve() == ours:
        return
    if any(part.casefold().endswith(cached) for part in ours.parts):
        return
    if (ours / "params").is_dir() or (base / "params").is_dir():
        files = [where / "config.json" for where in (base, ours)]
        if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
            return
    raise UserError(
        f"got an adapter of {name!r:.200}, but the model is {str(model)!r}: where they are the same, make this null",
        file=folder / "adapter_config.json",
        field="base_model_name_or_path",
    )


def _is_off(value: Any) -> bool:
    """Whether a field's value means that the feature is not used. Zero does not: it may name the first layer."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def weight_name(weight: Weight, layer: int, side: str) -> str:
    """peft's name for one side ("a" or "b") of one layer's pair."""
    module = weight.hf.format(l=layer).removesuffix(".weight")
    return f"base_model.model.{module}.lora_{side.upper()}.weight"


def _to_torch(x: np.ndarray, side: str) -> np.ndarray:
    """a [*inputs, R] -> [R, inputs]; b [R, *outputs] -> [outputs, R]."""
    flat = x.reshape(-1, x.shape[-1]) if side == "a" else x.reshape(x.shape[0], -1)
    return np.ascontiguousarray(flat.T)
