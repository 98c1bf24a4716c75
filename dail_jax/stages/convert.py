"""convert: a Hugging Face folder -> sharded Orbax weights, checked and with checksums, for quick starts on pods."""

from __future__ import annotations

from pathlib import Path

import jax

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import mirror, storage
from dail_jax.checkpoint import base, hf
from dail_jax.errors import UserError
from dail_jax.metrics import log
from dail_jax.model import weights
from dail_jax.rundir import RunDir
from dail_jax.stages import recipes, session
from dail_jax.text import load_tokenizer


def run(config: config_lib.Config) -> None:
    if mirror.is_apart():
        raise UserError(
            "every process writes its part of the weights: want a file system that all share", field="run_dir"
        )
    source, target = storage.model(config.model.path), Path(config.run_dir) / "model"
    if (source / base.PARAMS).is_dir():
        raise UserError("has been converted already", file=source)
    mesh = mesh_lib.make_mesh(config.mesh.for_training)
    with RunDir(config) as run_dir, run_dir.stage(recipes.convert(config)) as stage, jax.set_mesh(mesh):
        if stage.done or mesh_lib.from_first(lambda: base.is_made_of(target, stage.made_of)):
            log(f"convert: already done, see {target}")
            return
        load_tokenizer(session.tokenizer_folder(config))
        params, cfg = hf.load(source, mesh, config.model.dtype, config.model.quantize)
        base.save(target, params, source, stage.made_of)
    log(
        f"convert: {weights.count(cfg):,} weights of {cfg.family} in {config.model.quantize or config.model.dtype}, wrote {target}"
    )
    log(f"         use it with model.path={target}")
