"""The frozen base weights in Orbax's format, for pods: every process reads only its own shards.

`convert` makes such a folder from a Hugging Face one: config.json and tokenizer as they were, the weights in
`params/`. Wherever a configuration names a model, either kind of folder will do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import hf
from dail_jax.checkpoint.store import one_line
from dail_jax.errors import UserError
from dail_jax.model import weights
from dail_jax.model.families import ModelConfig, read_config
from dail_jax.rundir import sha256

PARAMS = "params"
MANIFEST = "params.sha256.json"


def load(folder: Path, mesh: jax.sharding.Mesh, dtype: str) -> tuple[weights.Params, ModelConfig]:
    """The model in a Hugging Face folder or in one that `convert` made; raises UserError."""
    if not (folder / PARAMS).is_dir():
        return hf.load(folder, mesh, dtype)
    cfg = read_config(folder)
    hf.verify_manifest(folder)
    try:
        listed = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError("missing or damaged: convert the model again", file=folder / MANIFEST) from None
    for name, digest in listed.items():
        if not (folder / PARAMS / name).is_file() or sha256(folder / PARAMS / name) != digest:
            raise UserError(f"damaged: it differs from the SHA-256 in {MANIFEST}", file=folder / PARAMS / name)
    target = weights.abstract(cfg, jnp.dtype(dtype), mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / PARAMS).absolute(), target), cfg


def save(folder: Path, params: weights.Params, source: Path) -> None:
    """Writes a converted folder; raises UserError if it exists. What is interrupted leaves nothing behind."""
    with hf.new_folder(folder) as temporary:
        with one_line(folder / PARAMS), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((temporary / PARAMS).absolute(), params)
        if not mesh_lib.is_first():
            return
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        hf.copy_tokenizer(source, temporary)
        root = temporary / PARAMS
        files = {str(p.relative_to(root)): sha256(p) for p in sorted(root.rglob("*")) if p.is_file()}
        (temporary / MANIFEST).write_text(json.dumps(files, indent=0))
        hf.write_manifest(temporary)
