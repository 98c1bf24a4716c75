"""check: everything that can be refused is refused before the first second of work.

`dail check` looks at all that `run` would do, prints what it found, and lists every problem. Each other command looks
at its own part first, and starts only if there is no problem. A command is a list of steps (`experiment.Step`);
`checks.CHECKS` says what is looked at before which stage. Nothing is written, no weights are read, and no program is compiled: it takes
seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.errors import UserError, UserErrors, visible
from dail_jax.metrics import console, log
from dail_jax.rundir import RunDir
from dail_jax.stages import calibrate, checks, experiment, recipes, room, select
from dail_jax.stages.experiment import Step
from dail_jax.stages.recipes import traces_path
from dail_jax.stages.subject import Finding, Subject


class Found:
    """What the checks of a command's steps have found."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, list[str]]] = {}  # label -> text -> arms
        self.problems: dict[str, UserError] = {}  # by their text: what several steps run into is said once
        self.states: dict[str, list[Step]] = {"done": [], "begun": [], "to do": []}

    def take(self, findings: Iterator[Finding], arm: str = "") -> bool:
        """Adds what a check yields and what it raises; returns whether there was no problem."""
        before = len(self.problems)
        try:
            for one in findings:
                if isinstance(one, UserError):
                    self.problems.setdefault(str(one), one)
                else:
                    self.rows.setdefault(one[0], {}).setdefault(one[1], []).append(arm)
        except UserError as error:
            self.problems.setdefault(str(error), error)
        return len(self.problems) == before


def look(command: str, config: config_lib.Config, **more: Any) -> Found:
    """Goes through the checks of every step of a command that is not done."""
    found, ahead = Found(), []
    known: dict[tuple[str, str], Any] = {}
    made: set[Path] = set()
    if not found.take(checks.registered(Subject(Step("", command, config), known, made))):
        return found
    steps = steps_of(command, config, **more)
    if steps:
        mesh_lib.all_devices()  # without any, nothing else can be asked
    for step in steps:
        s = Subject(step, known, made)
        if not found.take(checks.registered(s)) or not s.works:
            continue
        state = "to do"
        try:
            state = RunDir(s.config).progress(s.recipe)
        except UserError as error:
            found.problems.setdefault(str(error), error)
        found.states[state].append(step)
        if state != "done":
            for check in checks.CHECKS[s.stage]:
                found.take(check(s), s.arm)
            ahead.append(s)
        if s.stage == "generate":
            made.add(traces_path(s.config))
        elif s.stage == "export" and state != "done":
            made.add(recipes.adapter_folder(s.config))
    if ahead and not found.problems and mesh_lib.is_first():
        found.take(room.check(ahead))
    return found


def first(command: str, config: config_lib.Config, **more: Any) -> Found:
    """What every command does first; raises UserErrors for all problems. The first process speaks for all of them."""
    found = look(command, config, **more)
    works = any(found.states.values())  # a command that only shows something needs no device
    theirs = mesh_lib.from_first(lambda: list(found.problems)) if works else []
    problems = [*found.problems.values(), *(UserError(text) for text in theirs if text not in found.problems)]
    if problems:
        raise UserErrors(problems)
    return found


def steps_of(command: str, config: config_lib.Config, over: Sequence[str] = (), tau: str = "") -> list[Step]:
    """The stages that a command goes through; none for one that only shows something."""
    if command in ("check", "run"):
        return experiment.steps(config)
    if command == "sweep":
        return experiment.steps(experiment.swept(config, over))
    if command == "calibrate":
        return calibrate.steps(config, tau)
    if command == "select":
        return [Step("", "evaluate", select.evaluation(config))]
    return [Step("", command, config)] if command in checks.CHECKS else []


def run(config: config_lib.Config) -> None:
    """Prints what was looked at and what would be done; raises UserErrors for all problems."""
    found = look("check", config)
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for label, texts in found.rows.items():
        for text, arms in texts.items():
            of = f" ({', '.join(filter(None, arms))})" if len(texts) > 1 and any(arms) else ""
            table.add_row(Text(label + of), Text(visible(text)))
    for state, steps in found.states.items():
        if steps:
            table.add_row("next" if state == "to do" else state, Text(visible(_course(steps))))
    if mesh_lib.is_first():
        console.print(table)
    if found.problems:
        raise UserErrors(list(found.problems.values()))
    log(f"check: nothing stands in the way of run_dir={config.run_dir}")


def _course(steps: Sequence[Step]) -> str:
    """Steps in a few words: `generate; base: evaluate; dail: train, export, evaluate`."""
    parts = []
    for arm, group in itertools.groupby(steps, lambda step: step.arm):
        stages = ", ".join(step.stage for step in group)
        parts.append(f"{arm}: {stages}" if arm else stages)
    return "; ".join(parts)
