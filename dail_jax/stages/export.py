"""export: writes the trained LoRA as a PEFT adapter folder, and on request the merged model, each with a model card.

Where the evaluation's samples are drawn offline, it also writes what to draw, and a script that draws it. With
`export.push`, the folders are uploaded to a hub. In `run` that comes last, when the cards have the results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import process_allgather

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import storage
from dail_jax.checkpoint import base, hf, peft
from dail_jax.errors import UserError
from dail_jax.metrics import Metrics, log
from dail_jax.model import lora as lora_lib
from dail_jax.model.lora import Lora
from dail_jax.provenance import select
from dail_jax.rundir import RunDir
from dail_jax.stages import card, evaluate, offline, recipes
from dail_jax.stages.session import Session, open_session, tokenizer_folder
from dail_jax.stages.train import trained_lora
from dail_jax.train import methods


def run(config: config_lib.Config, push: bool = True) -> None:
    """What `export` writes; `push` is false where it is uploaded later."""
    method = methods.of(config)
    if method.trains:
        weights(config)
        if push:
            upload(config)
    else:
        log(f"export: nothing to export (train.objective: {method.name})")
    if config.evaluate.sampler == offline.NAME and config.evaluate.benchmarks:
        requests(config)


def weights(config: config_lib.Config) -> None:
    """The adapter, and the merged model on request, with their cards; and how they are used."""
    with RunDir(config) as run_dir, run_dir.stage(recipes.export(config)) as stage:
        adapter, merged = run_dir.path / "adapter", run_dir.path / "merged"
        if stage.done:
            log(f"export: already done, see {adapter}")
        else:
            session = open_session(config)
            lora = trained_lora(session, run_dir)
            assert lora is not None
            if not mesh_lib.from_first(lambda: base.is_made_of(adapter, stage.made_of)):
                write_adapter(session, lora, adapter, stage.made_of)
            log(f"export: wrote {adapter}")
            if config.export.merged and not mesh_lib.from_first(lambda: base.is_made_of(merged, stage.made_of)):
                tree = json.loads((storage.model(config.model.path) / "config.json").read_text())
                params = lora_lib.merge(session.in_form(None).params, lora, session.model)
                hf.save(merged, params, session.model, tree, tokenizer_folder(config), stage.made_of)
                trained_on = " (trained on int8 weights, merged into exact ones)" if config.model.quantize else ""
                log(f"export: wrote {merged}{trained_on}")
        if mesh_lib.is_first():
            card.write(config)
    if mesh_lib.is_first():
        for kind in _kinds(config):
            log(f"export: to serve and to evaluate {kind}/ with vLLM and lm-evaluation-harness:")
            for command in card.commands(config, kind, str(Path(config.run_dir) / kind)):
                log(f"  {command}")


def upload(config: config_lib.Config) -> None:
    """Uploads what `export` has written to `export.push`, if that is set; raises UserError, with the folder kept."""
    if not config.export.push or not methods.of(config).trains or not mesh_lib.is_first():
        return
    for kind in _kinds(config):
        folder, repository = str(Path(config.run_dir) / kind), card.repository(config, kind)
        task = {"folder": folder, "repository": repository, "private": config.export.private}
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("push_worker.py")), json.dumps(task)],
            env={**os.environ, "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
        try:
            reply = json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            reply = {"fault": f"the client ended with status {done.returncode}"}
        if "fault" in reply:
            raise UserError(
                f"was not pushed to {repository}: {reply['fault'][:300]}. It is kept; `export` tries again",
                file=folder,
                field="export.push",
            )
        log(f"export: pushed {folder} to {reply['url']}")


def _kinds(config: config_lib.Config) -> tuple[str, ...]:
    return ("adapter", "merged") if config.export.merged else ("adapter",)


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
    """A new PEFT folder with a LoRA as `train.lora` describes it; raises UserError if the folder exists.

    Without `made_of`, it says at least which form of the weights the LoRA was trained on.
    """
    made_of = made_of or {"settings": select(session.config, *recipes.form(session.config)), "inputs": {}}
    whole = process_allgather(lora, tiled=True) if jax.process_count() > 1 else jax.device_get(lora)
    base_name = card.base_model(session.config) or str(session.config.model.path)
    peft.save(folder, whole, session.model, session.config.train.lora, base_name, made_of)
