"""report: the tables on the terminal, results.md and .tex, report.html and plots/ of a run, or of a run with arms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dail_jax import config as config_lib
from dail_jax import storage
from dail_jax.errors import UserError
from dail_jax.evaluate import files, protocol
from dail_jax.metrics import console, log
from dail_jax.report import collect, diagnosis, page, plots
from dail_jax.rundir import write_atomic
from dail_jax.stages.recipes import traces_path
from dail_jax.text import load_tokenizer


def run(config: config_lib.Config) -> None:
    if jax.process_index() != 0:
        return
    root = Path(config.run_dir)
    runs = {name: root / name for name in config.arms} or {root.name: root}
    if not any((folder / "run.json").exists() for folder in (root, *runs.values())):
        raise UserError("nothing to report: run a stage first", file=root)
    traces = traces_path(config)
    folder = tokenizer_folder(config.model.tokenizer or config.model.path)
    title, tree = config.title or root.name, config.model_dump(mode="json")
    show(runs, root, title, traces if traces.exists() else None, folder, tree)


def tokenizer_folder(path: str | None) -> Path | None:
    """The folder of a tokenizer that a configuration names; None where it cannot be had, which costs a page some texts."""
    try:
        return storage.model(path) if path else None
    except UserError:
        return None


def show(
    runs: Mapping[str, Path],
    out: Path,
    title: str,
    traces: Path | None = None,
    tokenizer: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Prints the tables of run directories by name, and writes the other files to `out`.

    `tokenizer` is the folder, if it exists, from which the trace viewer gets the texts of tokens. `config` is the
    configuration in force, from which the page takes its titles.
    """
    results = {
        name: files.read_results(folder / "results.json")
        for name, folder in runs.items()
        if (folder / "results.json").exists()
    }
    if results:
        console.print(protocol.table(results))
        paired = protocol.differences(results, 0, diagnosis.RESAMPLES)
        parts = [protocol.markdown(results)]
        if paired.rows:
            console.print("", protocol.differences_table(paired), sep="\n")
            parts.append(protocol.differences_markdown(paired))
        for line in paired.notes:
            log(line)
            parts.append(f"- {protocol.markdown_text(line)}")
        if left_out := collect.left_out(runs, traces):
            parts.append("Left out:\n" + "".join(f"\n- {protocol.markdown_text(line)}" for line in left_out))
        write_atomic(out / "results.md", "\n\n".join(part.rstrip("\n") for part in parts) + "\n")
        write_atomic(out / "results.tex", protocol.latex(results))
    decode = load_tokenizer(tokenizer).pieces if tokenizer and tokenizer.is_dir() else None
    written = page.write(runs, out / "report.html", title, traces, decode, config)
    made = plots.write(runs, out / "plots", traces)
    log(f"report: wrote {written}, {out / 'results.tex'} and {len(made)} plots in {out / 'plots'}")
