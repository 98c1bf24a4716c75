"""select: keeps the problems that the untrained model never solves -> RUN_DIR/selected.jsonl.

The paper keeps those on which 32 samples all fail. The stage `evaluate` draws them in RUN_DIR/select, as the section
`evaluate` of the configuration asks (`evaluate.samples=32`); of several budgets, the largest counts.
"""

from __future__ import annotations

from pathlib import Path

import jax

from dail_jax import config as config_lib
from dail_jax.data.records import as_json, read_rows
from dail_jax.errors import UserError
from dail_jax.evaluate import files
from dail_jax.metrics import log
from dail_jax.rundir import json_line, write_atomic
from dail_jax.stages import evaluate, golds

NAME = "selection"


def evaluation(config: config_lib.Config) -> config_lib.Config:
    """The configuration of the evaluation that selects: of the untrained model, on the training data."""
    if config.data is None:
        raise UserError("missing: there are no rows to select from", field="data")
    rows = config.data.model_dump(include=set(config_lib.Dataset.model_fields))
    kind = golds.answer_type(config, graded=True)
    return config_lib.with_overrides(
        config,
        {
            "arms": {},
            "run_dir": str(Path(config.run_dir) / "select"),
            "train.objective": "none",
            "evaluate.benchmarks": [{"name": NAME, "rows": rows, "answer": kind}],
        },
        "select",
    )


def run(config: config_lib.Config) -> None:
    evaluate.run(evaluation(config))
    if jax.process_index() != 0:
        return
    folder = Path(config.run_dir)
    budgets = files.read_results(folder / "select" / "results.json")["benchmarks"][NAME]
    right = {name: count for name, (count, _) in budgets[max(budgets, key=int)]["per_problem"].items()}
    assert config.data is not None
    kept = [row for row in read_rows(config.data, need=("problem", "answer")) if right.get(row.problem_id) == 0]
    write_atomic(folder / "selected.jsonl", "".join(json_line(as_json(row)) for row in kept))
    log(
        f"select: {len(kept)} of {len(right)} problems were never solved in {config.evaluate.samples} samples; "
        f"wrote {folder / 'selected.jsonl'}"
    )
