"""calibrate: traces at several values of tau, to choose one -> calibration.json, calibration.md and plots/tau.png.

The larger tau, the more tokens the privileged student writes: more traces are right, and more cite the solution.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax.data import traces as traces_lib
from dail_jax.data.records import Row
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError
from dail_jax.evaluate import answers
from dail_jax.evaluate.grading import Grader
from dail_jax.evaluate.passk import bootstrap
from dail_jax.metrics import console, log
from dail_jax.report import charts, plots
from dail_jax.report.charts import Series
from dail_jax.rundir import write_atomic
from dail_jax.stages import experiment, generate, golds, recipes
from dail_jax.text import mention

SHARES = ("right", "student's tokens", "artefacts", "finished")


def steps(config: config_lib.Config, tau: str) -> list[experiment.Step]:
    """The stage `generate` for every value of tau."""
    if config.traces:
        raise UserError("calibration makes its own traces: want null", field="traces")
    arms = experiment.combinations([f"generate.tau={tau}"])
    parent = config_lib.with_overrides(config, {"arms": arms, "train.objective": "dail"}, "--tau")
    own = {name: config_lib.with_overrides(experiment.arm(parent, name), {"traces": None}, name) for name in arms}
    return [experiment.Step(name, "generate", one) for name, one in own.items()]


def run(config: config_lib.Config, tau: str) -> None:
    rows, found = recipes.rows_of(config), {}
    for name, _, own in steps(config, tau):
        log(f"\n== {name} ==")
        generate.run(own)
        if jax.process_index() == 0:
            traces = traces_lib.read(recipes.traces_path(own))
            found[own.generate.tau] = measure(traces, rows, own)
    if found:
        write(found, Path(config.run_dir))


def measure(traces: list[Trace], rows: list[Row], config: config_lib.Config) -> dict:
    """Shares of all traces, dropped or not, with 95% intervals over problems, and the mean number of tokens.

    `right` is given only if every row has an answer to grade against. `artefacts` counts the filters' phrases and the default ones, so
    that a configuration without phrases learns how many traces contain them.
    """
    kind = golds.answer_type(config)
    phrases = (*config.filters.artefacts, *config_lib.Filters().artefacts)
    gold = {row.problem_id: golds.gold_of(row, kind) or "" for row in rows}
    of: dict[str, Callable[[Trace], float]] = {
        "student's tokens": lambda t: t.acceptance or 0.0,
        "artefacts": lambda t: mention(t.text, phrases) is not None,
        "finished": lambda t: t.finish == "stop",
    }
    with Grader() as grader:
        if all(gold.values()) and answers.named(kind).is_graded:
            of["right"] = lambda t: golds.is_correct(grader, t.text, gold[t.problem_id], kind)
        shares = {}
        for name, share in of.items():
            problems = collections.defaultdict(list)
            for t in traces:
                problems[t.problem_id].append(share(t))
            shares[name] = bootstrap([float(np.mean(x)) for x in problems.values()], config.seed, 1000)._asdict()
    return {"traces": len(traces), "tokens": float(np.mean([len(t.response_ids) for t in traces])), **shares}


def write(found: dict[float, dict], folder: Path) -> None:
    """Prints the table, and writes it as Markdown, the figures as JSON, and the plot."""
    header = ["tau", "traces", *(f"{name} %" for name in SHARES), "tokens"]
    percent = lambda x: "-" if x is None else f"{100 * x['mean']:.1f} [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"  # noqa: E731
    cells = [
        [str(tau), str(x["traces"]), *(percent(x.get(name)) for name in SHARES), f"{x['tokens']:.1f}"]
        for tau, x in found.items()
    ]
    table = Table(*header, box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for row in cells:
        table.add_row(*(Text(cell.replace(" [", "\n["), justify="right") for cell in row))
    console.print(table)
    text = "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---:"] * len(header), *cells))
    write_atomic(folder / "calibration.md", text + "\nShares of traces, with 95% bootstrap intervals over problems\n")
    write_atomic(folder / "calibration.json", json.dumps(found, indent=1) + "\n")
    series = [
        Series(name, i, [(tau, *(x[name][k] for k in ("mean", "low", "high"))) for tau, x in found.items()])
        for i, name in enumerate(SHARES)
        if all(name in x for x in found.values())
    ]
    counts = dict.fromkeys(f"{x['traces']:,}" for x in found.values())
    note = f"n = {' or '.join(counts)} traces"
    made = plots.draw(
        charts.chart("tau", "", "", "marked", "tau", "share of traces", series, note=note), folder / "plots"
    )
    log(f"calibrate: wrote {folder / 'calibration.md'} and {made[0]}")
