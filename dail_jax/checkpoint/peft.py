"""LoRA trees <-> PEFT adapter folders, as peft, transformers and vLLM load them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from dail_jax import config as config_lib
from dail_jax.checkpoint.hf import Tensors, new_folder, put, verify_manifest, write_manifest
from dail_jax.errors import UserError
from dail_jax.mesh import is_first
from dail_jax.model.families import ModelConfig
from dail_jax.model.lora import Lora, shardings
from dail_jax.model.weights import Weight, declare

WEIGHTS = "adapter_model.safetensors"


def save(folder: str | Path, lora: Lora, cfg: ModelConfig, lora_config: config_lib.Lora, base: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; raises UserError if the folder exists."""
    table = declare(cfg)
    tensors = {}
    for name, pair in lora.tree.items():
        for side in "ab":
            stacked = np.asarray(pair[side], np.float32)
            for i in range(cfg.L):
                tensors[key(table[name], i, side)] = _to_torch(stacked[i], side)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora_config.rank,
        "lora_alpha": int(lora_config.alpha) if float(lora_config.alpha).is_integer() else lora_config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": [table[name].module for name in lora.tree],
    }
    with new_folder(folder) as temporary:
        if not is_first():
            return
        (temporary / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_manifest(temporary)


def load(folder: str | Path, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Lora, config_lib.Lora]:
    """The adapter in a folder, on the mesh; raises UserError, listing what does not fit the model."""
    folder, table = Path(folder), declare(cfg)
    verify_manifest(folder)
    description = read_description(folder)
    file = folder / "adapter_config.json"
    by_module = {w.module: name for name, w in table.items() if w.inputs}
    unknown = sorted(set(description["target_modules"]) - by_module.keys())
    if unknown:
        raise UserError(
            f"got {', '.join(unknown)}, want some of {', '.join(by_module)}", file=file, field="target_modules"
        )
    targets = [n for n in by_module.values() if table[n].module in description["target_modules"]]
    rank = description["r"]
    lora_config = config_lib.Lora(rank=rank, alpha=description["lora_alpha"], targets=tuple(targets))  # pyright: ignore
    with Tensors(folder, WEIGHTS) as source:
        wanted = {key(table[n], i, s): (n, i, s) for n in targets for i in range(cfg.L) for s in "ab"}
        for problem, names in (
            ("missing", wanted.keys() - source.where.keys()),
            ("superfluous", source.where.keys() - wanted.keys()),
        ):
            if names:
                raise UserError(
                    f"{problem} tensors: {', '.join(sorted(names)[:3])} ({len(names)} in all)", file=folder / WEIGHTS
                )
        tree: dict[str, dict[str, Any]] = {n: {"a": [], "b": []} for n in targets}
        for tensor, (name, _, side) in wanted.items():
            weight = table[name]
            letters = weight.axes[: weight.inputs] if side == "a" else weight.axes[weight.inputs :]
            sizes = [cfg.size(letter) for letter in letters]
            flat = math.prod(sizes)
            x = source.read(tensor, (rank, flat) if side == "a" else (flat, rank)).astype(np.float32)
            tree[name][side].append(x.T.reshape(*sizes, rank) if side == "a" else x.T.reshape(rank, *sizes))
    stacked = {n: {s: np.stack(x) for s, x in pair.items()} for n, pair in tree.items()}
    placed = jax.tree.map(put, stacked, shardings(cfg, lora_config, mesh).tree)
    return Lora(placed, lora_config.alpha / rank), lora_config


def weights_file(folder: str | Path) -> Path:
    """The file that an adapter's weights are in; raises UserError where there is none."""
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise UserError("not found: want a PEFT adapter folder", file=file)
    return file


def read_description(folder: Path) -> dict[str, Any]:
    """A checked adapter_config.json."""
    file = folder / "adapter_config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("not found: want a PEFT adapter folder", file=file) from None
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", file=file) from None
    if not isinstance(tree, dict) or tree.get("peft_type") != "LORA":
        raise UserError("want a LoRA adapter", file=file, field="peft_type")
    for field in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        if tree.get(field):
            raise UserError(f"got {tree[field]!r}, which is not supported", file=file, field=field)
    if tree.get("bias", "none") != "none":
        raise UserError(f"got {tree['bias']!r}, want 'none'", file=file, field="bias")
    for field, low in (("r", 1), ("lora_alpha", 0)):
        value = tree.get(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= 2**20:
            raise UserError(f"got {value!r}, want a positive number", file=file, field=field)
    if not isinstance(tree.get("target_modules"), list) or not tree["target_modules"]:
        raise UserError("want a list of modules", file=file, field="target_modules")
    return tree


def key(weight: Weight, layer: int, side: str) -> str:
    """The name that peft gives to one side of one layer's pair."""
    module = weight.hf.format(l=layer).removesuffix(".weight")
    return f"base_model.model.{module}.lora_{side.upper()}.weight"


def _to_torch(x: np.ndarray, side: str) -> np.ndarray:
    """a [*inputs, R] -> [R, inputs]; b [R, *outputs] -> [outputs, R]."""
    flat = x.reshape(-1, x.shape[-1]) if side == "a" else x.reshape(x.shape[0], -1)
    return np.ascontiguousarray(flat.T)
