"""Metrics and progress: metrics.jsonl always, TensorBoard and W&B on request, a bar on a terminal or lines in a log."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich import progress as rich_progress
from rich.console import Console

from dail_jax import config as config_lib
from dail_jax import strict_json
from dail_jax.errors import UserError, visible, writing

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

LEFT_OUT = "left out"  # the stage of rows in metrics.jsonl that count what was cut, skipped or dropped


def log(text: str) -> None:
    """A line for the person who is watching; from the first process only, with what data may hold made visible."""
    if jax.process_index() == 0:
        console.print(visible(text), soft_wrap=True, markup=False)


class Metrics:
    """Appends rows {stage, step, time, **values} to metrics.jsonl and to the writers that are switched on.

    Without a run directory, they are kept in `rows`.
    """

    def __init__(self, run_dir: Path | None, log: config_lib.Log, stage: str):
        self.path, self.stage = run_dir and run_dir / "metrics.jsonl", stage
        self.rows: list[dict[str, Any]] = []
        self.profile: dict[Any, int] = log.profile or {}
        self.board: Any = None
        self.wandb: Any = None
        if run_dir is None or jax.process_index() != 0:
            return
        self.rewind(None)
        if log.tensorboard:
            try:
                from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise UserError(
                    "want tensorboardX: pip install 'dail_jax[tensorboard]'", field="log.tensorboard"
                ) from None
            self.board = SummaryWriter(str(run_dir / "tensorboard"))
        if log.wandb:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise UserError("want wandb: pip install 'dail_jax[wandb]'", field="log.wandb") from None
            self.wandb = wandb.init(project=log.wandb, name=run_dir.name, dir=str(run_dir), resume="allow")

    def rewind(self, step: int | None) -> None:
        """Forgets this stage's rows after `step`, and a last line that a crash tore.

        With None, forgets only what earlier starts of this stage have left out: it counts anew, perhaps with other limits.
        """
        if jax.process_index() != 0 or self.path is None or not self.path.exists():
            return
        data, kept = self.path.read_bytes(), []
        advice = "delete the line, or the file"
        for line in strict_json.read_lines(self.path, own=True, torn="drop", advice=advice):
            row = strict_json.as_object(line.value, self.path, line.number)
            if not isinstance(row.get("step"), int):
                raise UserError(f"want a row with a step: {advice}", file=self.path, row=line.number, field="step")
            if step is None:
                again = row.get("stage") == LEFT_OUT and row.get("by") == self.stage
            else:
                again = row.get("stage") == self.stage and row["step"] > step
            if not again:
                kept.append(data[line.offset : line.offset + line.size])
        if sum(map(len, kept)) != len(data):
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            with writing(self.path):
                temporary.write_bytes(b"".join(kept))
                temporary.replace(self.path)

    def write(self, step: int, **values: float | int | str | list) -> None:
        self._append(self.stage, step, values)
        numbers = {f"{self.stage}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({**numbers, f"{self.stage}/step": step})

    def _append(self, stage: str, step: int, values: dict[str, Any]) -> None:
        row = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        if self.path is None:
            self.rows.append(row)
        elif jax.process_index() == 0:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def left_out(self, what: str, count: int, total: int, detail: str = "") -> None:
        """Records that `count` of `total` things were cut, skipped or dropped, for the report to list; and logs it.

        `what` names the things and what was done to them, such as "solutions cut to fit"; the last record of a stage
        with the same words counts. `detail` is for the log alone.
        """
        self._append(LEFT_OUT, 0, {"by": self.stage, "what": what, "count": count, "of": total})
        if count:
            log(f"{self.stage}: {count} of {total} {what}{detail}")

    @contextlib.contextmanager
    def profiler(self) -> Iterator[Callable[[int], None]]:
        """Gives a function to call before each update, with its number from 1: the updates of `log.profile` are traced."""
        wanted, running = self.profile, False

        def stop() -> None:
            nonlocal running
            jax.profiler.stop_trace()
            running = False
            log(f"{self.stage}: wrote a trace of its updates to {folder}")

        def before(step: int) -> None:
            nonlocal running
            if running and step >= wanted["from"] + wanted["steps"]:
                stop()
            if step == wanted["from"]:
                jax.profiler.start_trace(folder)
                running = True

        folder = str(self.path.with_name("profile")) if self.path else ""
        try:
            yield before if wanted and folder else lambda step: None
        finally:
            if running:
                stop()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


# ---------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event
LONG = 5.0  # seconds of compilation that are worth a line


class Progress:
    """How far long work has come. On a terminal it is a bar, otherwise a line in the log every `every` seconds."""

    every = 30.0  # set from `log.every`

    def __init__(self, label: str, total: int, unit: str, done: int, bar: rich_progress.Progress | None):
        self.label, self.total, self.unit, self.done, self.bar = label, total, unit, done, bar
        self.first, self.started = done, time.monotonic()
        self.logged = self.started
        self.task = bar.add_task(label, total=total, completed=done, note="") if bar else None

    def advance(self, amount: int = 1, note: str = "") -> None:
        """`note` is a short text such as the current loss."""
        self.done += amount
        now = time.monotonic()
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, advance=amount, note=f"{rate:.3g} {self.unit}/s {note}")
        elif now - self.logged >= self.every:
            self.logged = now
            speed, left = "", ""
            if rate:  # something has been done
                speed, left = f"{rate:.3g} {self.unit}/s", f"{_clock((self.total - self.done) / rate)} left"
            elapsed = f"{_clock(now - self.started)} elapsed"
            parts = [f"{self.done} / {self.total} {self.unit}", speed, note, elapsed, left]
            log(f"{self.label}: {', '.join(part for part in parts if part)}")


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(max(seconds, 0))))


@contextlib.contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Shows how far long work has come, with its rate and an estimate; `done` of `total` were there before."""
    if jax.process_index() != 0 or not sys.stdout.isatty():
        yield Progress(label, total, unit, done, None)
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=console) as bar:
        yield Progress(label, total, unit, done, bar)


def configure(cfg: config_lib.Log) -> None:
    """How this process reports: how often it writes to a log, and that a long compilation is announced."""
    Progress.every = cfg.every
    _listen()


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_announce)


def _announce(event: str, duration_secs: float, **details: Any) -> None:
    if event == COMPILED and duration_secs >= LONG:
        log(f"compiled {details.get('fun_name', 'a program')} in {duration_secs:.0f} s")
