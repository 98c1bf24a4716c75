"""report: the tables on the terminal, report.html and plots/ of a run, or of a run with arms."""

from __future__ import annotations

import json
from pathlib import Path

import jax

from dail_jax import config as config_lib
from dail_jax.errors import UserError
from dail_jax.evaluate import protocol
from dail_jax.metrics import console, say
from dail_jax.report import page, plots
from dail_jax.rundir import write_atomic
from dail_jax.stages.generate import traces_path


def run(config: config_lib.Config) -> None:
    if jax.process_index() != 0:
        return
    root = Path(config.run_dir)
    runs = {name: root / name for name in config.arms} or {root.name: root}
    if not any((folder / "run.json").exists() for folder in (root, *runs.values())):
        raise UserError("nothing to report: run a stage first", file=root)
    results = {name: json.loads((folder / "results.json").read_text())
               for name, folder in runs.items() if (folder / "results.json").exists()}  # fmt: skip
    if results:
        console.print(protocol.table(results))
        write_atomic(root / "results.md", protocol.markdown(results))
    traces = traces_path(config)
    out = page.write(runs, root / "report.html", root.name, traces if traces.exists() else None)
    made = plots.write(runs, root / "plots", traces if traces.exists() else None)
    say(f"report: wrote {out} and {len(made)} plots in {root / 'plots'}")
