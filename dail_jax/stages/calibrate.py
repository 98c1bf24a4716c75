"""calibrate: is there a teacher, and which tau? -> calibration.json, calibration.md and plots/tau.png.

DAIL learns from the privileged student, which must therefore be right more often than the student alone: each role is
drawn alone and graded, if the rows have answers. Then come traces at values of tau in between. The larger tau, the more
tokens the privileged student writes: more traces are right, and more cite the solution.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax.data import prompts
from dail_jax.data import traces as traces_lib
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError
from dail_jax.evaluate import answers
from dail_jax.evaluate.grading import Grader
from dail_jax.evaluate.passk import Difference, bootstrap, paired_difference
from dail_jax.metrics import console, log
from dail_jax.report import charts, plots
from dail_jax.report.charts import Series
from dail_jax.rundir import write_atomic
from dail_jax.stages import experiment, generate, golds, recipes
from dail_jax.text import mention

SHARES = ("right", "student's tokens", "artefacts", "finished")
ALONE = {"student": "student", "privileged": "privileged student", "negative": "negative reference"}
ENDS = {0.0: "student", 1.0: "privileged"}  # the values of tau at which one role writes everything
CLEARLY = 0.1  # by how large a share of its samples a teacher should be right more often than the student
RESAMPLES = 1000


def steps(config: config_lib.Config, tau: str) -> list[experiment.Step]:
    """The stage `generate` for each role alone, and for every value of tau in between."""
    if config.traces:
        raise UserError("calibration makes its own traces: want null", field="traces")
    instead = config.prompts.negative or prompts.packaged("negative")  # drawn in the privileged student's place
    arms = {
        "student": {"generate.tau": 0.0},
        "privileged": {"generate.tau": 1.0},
        "negative": {"generate.tau": 1.0, "prompts.privileged": instead},
        **{name: changes for name, changes in _asked(tau).items() if changes["generate.tau"] not in ENDS},
    }
    parent = config_lib.with_overrides(config, {"arms": arms, "train.objective": "dail"}, "--tau")
    own = {name: config_lib.with_overrides(experiment.arm(parent, name), {"traces": None}, name) for name in arms}
    return [experiment.Step(name, "generate", one) for name, one in own.items()]


def _asked(tau: str) -> dict[str, dict]:
    """The values of tau that are asked for, as arms."""
    return experiment.combinations([f"generate.tau={tau}"])


def run(config: config_lib.Config, tau: str) -> None:
    rows = recipes.rows_of(config)
    kind = golds.answer_type(config)
    gold = {row.problem_id: golds.gold_of(row, kind) or "" for row in rows}
    graded = all(gold.values()) and answers.named(kind).is_graded
    places = {changes["generate.tau"]: ENDS.get(changes["generate.tau"], name) for name, changes in _asked(tau).items()}
    drawn: dict[str, list[Trace]] = {}
    for name, _, own in steps(config, tau):
        if name in places.values() or (graded and name in ALONE):
            log(f"\n== {ALONE.get(name, name)} ==")
            generate.run(own)
            if jax.process_index() == 0:
                drawn[name] = traces_lib.read(recipes.traces_path(own))
    if not drawn:
        return
    with Grader() as grader:
        right = {
            name: by_problem(traces, lambda t: golds.is_correct(grader, t.text, gold[t.problem_id], kind))
            for name, traces in drawn.items()
            if graded
        }
    found = {name: measure(traces, right.get(name), config) for name, traces in drawn.items()}
    folder = Path(config.run_dir)
    parts = [by_tau({value: found[name] for value, name in places.items()}, folder)]
    tree = {"tau": {value: found[name] for value, name in places.items()}}
    if graded:
        gain = paired_difference(right["student"], right["privileged"], config.seed, RESAMPLES)
        parts.insert(0, by_role({name: found[name] for name in ALONE}, gain))
        tree = {"roles": {name: found[name] for name in ALONE}, "gain": gain._asdict(), **tree}
    write_atomic(folder / "calibration.md", "\n".join(parts))
    write_atomic(folder / "calibration.json", json.dumps(tree, indent=1) + "\n")
    log(f"calibrate: wrote {folder / 'calibration.md'}")


def by_problem(traces: list[Trace], share: Callable[[Trace], float]) -> dict[str, float]:
    """The mean over each problem's traces."""
    found = collections.defaultdict(list)
    for trace in traces:
        found[trace.problem_id].append(share(trace))
    return {name: float(np.mean(values)) for name, values in found.items()}


def measure(traces: list[Trace], right: Mapping[str, float] | None, config: config_lib.Config) -> dict:
    """Shares of all traces, dropped or not, with 95% intervals over problems, and the mean number of tokens.

    `right` is given by problem, if traces were graded. `artefacts` counts the filters' phrases and the default ones, so
    that a configuration without phrases learns how many traces contain them.
    """
    phrases = (*config.filters.artefacts, *config_lib.Filters().artefacts)
    shares = {
        "right": right,
        "student's tokens": by_problem(traces, lambda t: t.acceptance or 0.0),
        "artefacts": by_problem(traces, lambda t: mention(t.text, phrases) is not None),
        "finished": by_problem(traces, lambda t: t.finish == "stop"),
    }
    intervals = {
        name: bootstrap(list(share.values()), config.seed, RESAMPLES)._asdict()
        for name, share in shares.items()
        if share is not None
    }
    return {"traces": len(traces), "tokens": float(np.mean([len(t.response_ids) for t in traces])), **intervals}


def by_role(found: Mapping[str, dict], gain: Difference) -> str:
    """Prints how often each role alone is right and what that means; as Markdown."""
    names = ("right", "artefacts", "finished")
    cells = [[ALONE[role], *_figures(x, names)] for role, x in found.items()]
    text = _table(["alone", "traces", *(f"{name} %" for name in names), "tokens"], cells)
    said = verdict(found["student"]["right"]["mean"], found["privileged"]["right"]["mean"], gain)
    log(said)
    return f"{text}\n{said}\n"


def verdict(student: float, privileged: float, gain: Difference) -> str:
    """Whether the privileged student can teach, in plain words; shares of right samples, and the paired difference."""
    figures = (
        f"right in {privileged:.1%} of its samples, the student alone in {student:.1%} "
        f"(difference {100 * gain.mean:.1f} points [{100 * gain.low:.1f}, {100 * gain.high:.1f}])"
    )
    if gain.low > 0 and gain.mean >= CLEARLY:
        return f"The privileged student is a teacher: {figures}."
    little = "hardly better" if gain.low > 0 else "no better, as far as these samples tell,"
    return (
        f"The privileged student is {little} than the student: {figures}. DAIL has no teacher here. Show it the solution in "
        "another template (`prompts.privileged`), lower `generate.sampling.temperature`, or take easier problems or "
        "a larger model."
    )


def by_tau(found: Mapping[float, dict], folder: Path) -> str:
    """Prints and plots what the traces are at each tau; as Markdown."""
    cells = [[str(tau), *_figures(x, SHARES)] for tau, x in found.items()]
    text = _table(["tau", "traces", *(f"{name} %" for name in SHARES), "tokens"], cells)
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
    log(f"calibrate: wrote {made[0]}")
    return f"{text}\nShares of traces, with 95% bootstrap intervals over problems\n"


def _figures(x: dict, names: Sequence[str]) -> list[str]:
    percent = lambda x: "-" if x is None else f"{100 * x['mean']:.1f} [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"  # noqa: E731
    return [str(x["traces"]), *(percent(x.get(name)) for name in names), f"{x['tokens']:.1f}"]


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Prints a table; as Markdown."""
    table = Table(*header, box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for row in cells:
        table.add_row(*(Text(cell.replace(" [", "\n["), justify="right") for cell in row))
    console.print(table)
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---:"] * len(header), *cells))
