"""export: writes the trained LoRA as a PEFT adapter folder, and on request the merged model.

Where the evaluation's samples are drawn offline, it also writes what to draw, and a script that draws it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import process_allgather

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import base, hf, peft
from dail_jax.metrics import Metrics, log
from dail_jax.model import lora as lora_lib
from dail_jax.model.lora import Lora
from dail_jax.rundir import RunDir
from dail_jax.stages import evaluate, offline, recipes
from dail_jax.stages.session import Session, open_session
from dail_jax.stages.train import trained_lora
from dail_jax.train import methods


def run(config: config_lib.Config) -> None:
    method = methods.of(config)
    if method.trains:
        weights(config)
    else:
        log(f"export: nothing to export (train.objective: {method.name})")
    if config.evaluate.sampler == offline.NAME and config.evaluate.benchmarks:
        requests(config)


def weights(config: config_lib.Config) -> None:
    """The adapter, and the merged model on request."""
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


def requests(config: config_lib.Config) -> None:
    """The requests for the evaluation's samples, and the script."""
    cfg = config.evaluate
    tables = {b.name: recipes.read_benchmark(b) for b in cfg.benchmarks}
    skipped = evaluate.ungradable(cfg, tables)
    with RunDir(config) as run_dir:
        session = open_session(config)
        todo = evaluate.problems(session, tables, skipped, Metrics(None, config.log, "export"))
        settings = offline.settings_of(session, run_dir)
        offline.write(run_dir.path / offline.FOLDER, settings, evaluate.requests_of(cfg, todo), offline.REQUESTS)
        log(f"export: wrote {run_dir.path / offline.FOLDER / offline.SCRIPT}")


def write_adapter(session: Session, lora: Lora, folder: Path, made_of: dict[str, Any] | None = None) -> None:
    """A new PEFT folder with a LoRA as `train.lora` describes it; raises UserError if the folder exists."""
    whole = process_allgather(lora, tiled=True) if jax.process_count() > 1 else jax.device_get(lora)
    peft.save(folder, whole, session.model, session.config.train.lora, str(session.config.model.path), made_of)
