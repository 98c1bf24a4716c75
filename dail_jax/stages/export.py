"""export: writes the trained LoRA as a PEFT adapter folder, and on request the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import process_allgather

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import base, hf, peft
from dail_jax.metrics import log
from dail_jax.model import lora as lora_lib
from dail_jax.model.lora import Lora
from dail_jax.rundir import RunDir
from dail_jax.stages import recipes
from dail_jax.stages.session import Session, open_session
from dail_jax.stages.train import trained_lora
from dail_jax.train import methods


def run(config: config_lib.Config) -> None:
    method = methods.of(config)
    if not method.trains:
        log(f"export: nothing to export (train.objective: {method.name})")
        return
    with RunDir(config) as run_dir, run_dir.stage(recipes.export(config)) as stage:
        adapter, merged = run_dir.path / "adapter", run_dir.path / "merged"
        if stage.done:
            log(f"export: already done, see {adapter}")
            return
        session = open_session(config)
        lora = trained_lora(session, run_dir)
        assert lora is not None
        if not mesh_lib.from_first(lambda: base.is_made_of(adapter, stage.made_of)):
            write_adapter(session, lora, adapter, stage.made_of)
        log(f"export: wrote {adapter}")
        if config.export.merged and not mesh_lib.from_first(lambda: base.is_made_of(merged, stage.made_of)):
            tree = json.loads((Path(config.model.path) / "config.json").read_text())
            params = lora_lib.merge(session.params, lora, session.model)
            hf.save(merged, params, session.model, tree, config.model.tokenizer or config.model.path, stage.made_of)
            log(f"export: wrote {merged}")


def write_adapter(session: Session, lora: Lora, folder: Path, made_of: dict[str, Any] | None = None) -> None:
    """A new PEFT folder with a LoRA as `train.lora` describes it; raises UserError if the folder exists."""
    whole = process_allgather(lora, tiled=True) if jax.process_count() > 1 else jax.device_get(lora)
    peft.save(folder, whole, session.model, session.config.train.lora, str(session.config.model.path), made_of)
