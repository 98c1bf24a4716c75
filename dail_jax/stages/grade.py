"""grade: grades a finished evaluation again, from samples.jsonl alone, without a model.

Useful when the rules of extraction or equality have changed. Answers are extracted from the texts again; the gold answers
are those in samples.jsonl. With `--import`, finishes an evaluation whose samples were drawn offline.
"""

from __future__ import annotations

import collections
from pathlib import Path

import jax

from dail_jax import config as config_lib
from dail_jax.errors import UserError
from dail_jax.evaluate import files, protocol
from dail_jax.metrics import console, log
from dail_jax.rundir import RunDir
from dail_jax.stages import card, evaluate, experiment, offline, recipes

SHOWN = 20  # changed verdicts that are logged one by one


def run(config: config_lib.Config, drawn: str | None = None) -> None:
    if drawn is not None:
        take(config, Path(drawn))
        return
    if jax.process_index() != 0:
        return
    results = {}
    for one in [experiment.arm(config, name) for name in config.arms] or [config]:
        folder = Path(one.run_dir)
        path = folder / "samples.jsonl"
        if not path.exists():
            raise UserError("no samples: run the stage `evaluate` first", file=path)
        with RunDir(one) as run_dir, run_dir.amend(recipes.evaluate(one)):
            rows = files.read_samples(path)
            evaluate.finish(one, rows, folder)
            log_changes(rows, files.read_samples(path), folder)
        card.write(one)
        results[folder.name] = files.read_results(folder / "results.json")
    console.print(protocol.table(results))


def take(config: config_lib.Config, drawn: Path) -> None:
    """Evaluates with the samples in a file that the script of `export` has written; raises UserError."""
    if config.evaluate.sampler != offline.NAME:
        raise UserError(f"want {offline.NAME}, so that the run's record says who drew", field="evaluate.sampler")
    if config.arms:
        raise UserError("each arm has samples of its own: call `run`, which finds them", field="arms")
    if not drawn.is_file():
        raise UserError("no such file", file=drawn)
    if (path := Path(config.run_dir) / recipes.SAMPLES).exists():
        raise UserError("there are samples: use another run_dir, or delete them to import others", file=path)
    evaluate.run(config, drawn=drawn)


def log_changes(before: list[dict], after: list[dict], folder: Path) -> None:
    """Logs which verdicts changed: how many of each kind, and the first few."""
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a["correct"] != b["correct"]]
    log(f"grade: {folder}: {len(changed)} of {len(after)} verdicts changed")
    kinds = collections.Counter((a["correct"], b["correct"]) for a, b in changed)
    for (old, new), count in kinds.most_common():
        log(f"  {count} from correct={old} to correct={new}")
    for a, b in changed[:SHOWN]:
        log(
            f"  {b['benchmark']} {b['problem_id']} sample {b['sample']} budget {b['budget']}: gold {b['gold'][:60]!r}, "
            f"answer {a['answer']!r:.80} {a['reason']} -> {b['answer']!r:.80} {b['reason']}"
        )
