"""compare: finished runs beside each other, wherever they lie: tables, paired differences, a page and plots."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from dail_jax import config as config_lib
from dail_jax import storage
from dail_jax.errors import UserError
from dail_jax.report.collect import setting
from dail_jax.stages import report


def run(config: config_lib.Config | None, runs: list[str], out: str) -> None:
    """Compares run directories; one with arms stands for all of its arms. `config` is not used."""
    if jax.process_index() != 0:
        return
    if remote := [path for path in (*runs, out) if storage.is_remote(path)]:
        raise UserError(f"got {remote[0]!r}, {storage.LOCAL}")
    folders: list[Path] = []
    for path in map(Path, runs):
        found = [path] if (path / "results.json").exists() else sorted(p.parent for p in path.glob("*/results.json"))
        if not found:
            raise UserError("got no results.json here or in its folders, want a finished evaluation", file=path)
        folders += found
    folders = list(dict.fromkeys(Path(os.path.normpath(folder)) for folder in folders))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # arms of two runs share a name
        names = [str(folder) for folder in folders]
    Path(out).mkdir(parents=True, exist_ok=True)
    path = folders[0] / "config.yaml"
    tree = config_lib.read_yaml(path) if path.exists() else {}
    tokenizer = setting(tree, "model.tokenizer") or setting(tree, "model.path")
    title = " and ".join(dict.fromkeys(runs))
    report.show(dict(zip(names, folders, strict=True)), Path(out), title, None, report.tokenizer_folder(tokenizer))
