"""The frozen base weights in Orbax's format, for pods: every process reads only its own shards.

`convert` makes such a folder from a Hugging Face one: config.json and the tokenizer are copied, the weights are in
`params/`. Wherever a configuration names a model, it may name either kind of folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dail_jax import mesh as mesh_lib
from dail_jax import storage
from dail_jax.checkpoint import hf
from dail_jax.checkpoint.store import as_one_line
from dail_jax.errors import UserError
from dail_jax.model import weights
from dail_jax.model.families import ModelConfig, read_config
from dail_jax.provenance import Checksums, Output, State, digest, identity, sha256

PARAMS = "params"
MANIFEST = "params.sha256.json"


def load(
    folder: Path, mesh: jax.sharding.Mesh, dtype: str, quantize: str | None = None
) -> tuple[weights.Params, ModelConfig]:
    """The model in a Hugging Face folder or in one that `convert` made.

    Raises UserError if it is damaged, or was converted to other weights than `quantize` asks for.
    """
    if not (folder / PARAMS).is_dir():
        return hf.load(folder, mesh, dtype, quantize)
    cfg = read_config(folder)
    mesh_lib.from_first(lambda: verify(folder))
    _refuse_other_form(folder, quantize)
    target = weights.abstract(cfg, jnp.dtype(dtype), mesh, quantize)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / PARAMS).absolute(), target), cfg


def check(folder: Path, cfg: ModelConfig, quantize: str | None = None) -> None:
    """Raises UserError where the weights of a model's folder are missing or of another form; reads none of them."""
    if (folder / PARAMS).is_dir():
        missing = next((name for name in _listed(folder) if not (folder / PARAMS / name).is_file()), None)
        if missing is not None:
            raise UserError(f"missing, but listed in {MANIFEST}", file=folder / PARAMS / missing)
        _refuse_other_form(folder, quantize)
    else:
        hf.check(folder, cfg)


def converted_to(folder: Path) -> str | None:
    """`int8` if the model in a folder was converted to that; None for exact weights. Raises UserError if it is damaged."""
    if not (folder / PARAMS).is_dir():
        return None
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree: Any = checkpointer.metadata((folder / PARAMS).absolute()).item_metadata
        return "int8" if isinstance(tree["embed"], dict) else None
    except Exception as error:  # whatever Orbax says about a description that is damaged
        raise UserError(
            f"damaged: convert the model again ({str(error).splitlines()[0]:.80})", file=folder / PARAMS
        ) from None


def _refuse_other_form(folder: Path, quantize: str | None) -> None:
    """Raises UserError if converted weights are in int8 and exact ones are wanted, or the other way round."""
    found = converted_to(folder)
    if found != quantize:
        raise UserError(
            f"holds {found or 'exact'} weights, and model.quantize asks for {quantize or 'exact'} ones: set it to "
            f"{found or 'null'}, or convert the original model again",
            file=folder,
        )


def _listed(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files of converted weights, by name."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError("missing or damaged: convert the model again", file=folder / MANIFEST) from None


def verify(folder: Path, checksum: Callable[[Path], str] = sha256) -> None:
    """Raises UserError if a file of a folder differs from its manifests."""
    hf.verify_manifest(folder, checksum)
    if not (folder / PARAMS).is_dir():
        return
    for name, wanted in _listed(folder).items():
        if not (folder / PARAMS / name).is_file() or checksum(folder / PARAMS / name) != wanted:
            raise UserError(f"damaged: it differs from the SHA-256 in {MANIFEST}", file=folder / PARAMS / name)


def model_digest(folder: Path, checksum: Checksums) -> str:
    """One digest of what determines the model in a folder: its configuration and its weights.

    Weights that the folder's manifest lists are not read here: loading compares them with the manifest. Those on an
    object store are known by the store's own mark of their contents, its ETag.
    """
    read_config(folder)
    files = _configs(folder)
    tensors = [folder / MANIFEST] if (folder / PARAMS).is_dir() else hf.shards(folder)
    remote = storage.objects(folder)
    for file in tensors:
        if not file.is_file() and file.name not in remote:
            raise UserError("not found, want the model's weights", file=file)

    def of_tensors(file: Path) -> str:
        if file.name in remote:
            return f"{remote[file.name].size} bytes, version {remote[file.name].version}"
        return hf.listed_digest(folder, file.name) or checksum(file)

    return digest({file.name: checksum(file) for file in files} | {file.name: of_tensors(file) for file in tensors})


def config_digest(folder: Path, checksum: Checksums) -> str:
    """One digest of a model's configuration, for work that does not read its weights."""
    read_config(folder)
    return digest({file.name: checksum(file) for file in _configs(folder)})


def _configs(folder: Path) -> list[Path]:
    return [f for f in (folder / "config.json", folder / "generation_config.json") if f.is_file()]


class Folder(Output):
    """An output of a stage that is a folder with a manifest, as `hf.new_folder` makes it."""

    def identity(self, folder: Path, checksum: Checksums) -> str:
        return sha256(folder / self.name / hf.MANIFEST)

    def state(self, folder: Path, recorded: str, checksum: Checksums) -> State:
        target = folder / self.name
        if not target.exists():
            return "missing"
        if not (target / hf.MANIFEST).is_file() or sha256(target / hf.MANIFEST) != recorded:
            raise UserError(NOT_OURS, file=target)
        verify(target, checksum)
        return "intact"


NOT_OURS = "already exists, and is not what is written here: choose another folder, or move this one away"


def is_made_of(folder: Path, made_of: dict[str, Any]) -> bool:
    """Whether a folder exists and was made of exactly this; raises UserError if it was made of something else.

    With this, a kill after the folder was renamed but before that was recorded costs nothing.
    """
    if not folder.exists():
        return False
    try:
        found = identity(json.loads((folder / hf.PROVENANCE).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = None
    if found != identity(made_of) or not (folder / hf.MANIFEST).is_file():
        raise UserError(NOT_OURS, file=folder)
    verify(folder)
    return True


def save(folder: Path, params: weights.Params, source: Path, made_of: dict[str, Any] | None = None) -> None:
    """Writes a converted folder; raises UserError if it exists. An interruption leaves nothing behind."""
    with hf.new_folder(folder, made_of) as temporary:
        with as_one_line(folder / PARAMS), ocp.StandardCheckpointer() as checkpointer:
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
