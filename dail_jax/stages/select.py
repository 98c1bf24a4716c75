"""select: keeps the problems that the untrained model never solves -> RUN_DIR/selected.jsonl.

The paper keeps those on which 32 samples all fail. The stage `evaluate` draws them in RUN_DIR/select, as the section
`evaluate` of the configuration asks (`evaluate.samples=32`); of several budgets, the largest counts.
"""

from __future__ import annotations

from pathlib import Path

import jax

from dail_jax import config as config_lib
from dail_jax.data.records import read_rows
from dail_jax.errors import UserError
from dail_jax.evaluate import files
from dail_jax.metrics import log
from dail_jax.rundir import json_line, write_atomic
from dail_jax.stages import evaluate, golds

NAME = "selection"


def run(config: config_lib.Config) -> None:
    if config.data is None:
        raise UserError("missing: there are no rows to select from", field="data")
    folder, kind = Path(config.run_dir), golds.answer_type(config, graded=True)
    inner = config_lib.with_overrides(
        config,
        {
            "arms": {},
            "run_dir": str(folder / "select"),
            "train.objective": "none",
            "evaluate.benchmarks": [{"name": NAME, "rows": config.data.model_dump(exclude={"answer"}), "answer": kind}],
        },
        "select",
    )
    evaluate.run(inner)
    if jax.process_index() != 0:
        return
    budgets = files.read_results(folder / "select" / "results.json")["benchmarks"][NAME]
    right = {name: count for name, (count, _) in budgets[max(budgets, key=int)]["per_problem"].items()}
    kept = [row for row in read_rows(config.data, need=("problem", "answer")) if right.get(row.problem_id) == 0]
    fields = ("problem_id", "problem", "solution", "answer", "waypoints")
    write_atomic(
        folder / "selected.jsonl",
        "".join(json_line({name: value for name in fields if (value := getattr(row, name))}) for row in kept),
    )
    log(
        f"select: {len(kept)} of {len(right)} problems were never solved in {config.evaluate.samples} samples; "
        f"wrote {folder / 'selected.jsonl'}"
    )
