"""Kills, preempts and starves real runs at random moments, and counts what was lost.

    python benchmarks/crash.py --kills 200 --terms 50 --workers 50 --disks 50      (hours; 4 of each: some ten minutes)

Four things happen to a stage in a process of its own:

    kill     SIGKILL.
    term     SIGTERM, which must end with 75 (stopped, call again), or with 0 if the stage was done.
    worker   SIGKILL to one of its child processes: tokenizer, grading, batches. It must end with 0, or in one line.
    disk     no file may grow beyond a random size, so that the system itself refuses to write. It must end with 0, or
             in one line.

generate, evaluate: every sample in the journal before must be there after it, none twice, and the finished file must
equal an uninterrupted run's byte for byte.
train, pretrain: with a save after every few updates and two checkpoints kept, so that many kills hit a save or a
deletion. Every listed step must load, at most one save interval may be lost, and losses and final parameters must be
bit-identical.
The other stages: the next call must end with the outputs of an uninterrupted one.
A run directory is used until its stage is finished; then a new run begins. Exit status 1 if anything was lost, or if a
failure was more than a one-line error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import environment  # noqa: F401  (before jax)
import tiny

from dail_jax import config as config_lib
from dail_jax import launch
from dail_jax.rundir import RunDir

EVENTS = ("kill", "term", "worker", "disk")
SAVE_EVERY = 2
JOURNALS = {  # stage: its journal, what with `sample` names a row there, the finished file
    "generate": ("traces.partial.jsonl", "problem_id", "traces.jsonl"),
    "evaluate": ("samples.partial.jsonl", "name", "samples.jsonl"),
}
CHECKPOINTS = {"train": ("checkpoints", SAVE_EVERY), "pretrain": ("pretrain", 5)}  # folder, updates between saves
LOGGED = {"train": 1, "pretrain": 4}  # updates per row of metrics.jsonl
OUTPUTS = {  # of the other stages
    "export": ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/MANIFEST.sha256"),
    "report": ("results.md", "results.tex", "report.html", "plots/pass_at_k.svg"),
    "grade": ("samples.jsonl", "results.json"),
    "convert": ("model/config.json",),  # and Orbax's files, which hold the time
    "select": ("selected.jsonl", "select/samples.jsonl", "select/results.json"),
    "calibrate": ("calibration.json", "calibration.md", "tau=0.6/traces.jsonl", "tau=0.99/traces.jsonl"),
    "sweep": ("results.md", "gamma=0.3/samples.jsonl", "gamma=0.3/adapter/adapter_model.safetensors"),
}
ARGUMENTS = {"calibrate": ("--tau", "0.6,0.99"), "sweep": ("--over", "train.gamma=0,0.3")}
READS_A_RUN = ("export", "report", "grade")
UNLOCKED = ("report", "select", "calibrate", "sweep")  # these write to a folder that a stage inside them may not lock
SETTINGS = {
    "generate": {"generate__slots": 4},
    "evaluate": {"evaluate__slots": 2, "train__objective": "none"},
    "train": {"train__epochs": 4, "train__save_every": SAVE_EVERY, "train__workers": 1},
    "pretrain": {"pretrain__steps": 200, "pretrain__save_every": 5},
    "select": {"data": {"path": str(tiny.ASSETS / "hard.jsonl"), "limit": 4}},
    "calibrate": {"data__limit": 4},
    "sweep": {"train__epochs": 1, "evaluate__samples": 2},
}
STAGES = (*JOURNALS, *CHECKPOINTS, *OUTPUTS)
ALONE = {"generate", "evaluate", "pretrain", "convert", "select", "calibrate"}  # need no other stage before them


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for event in EVENTS:
        args.add_argument(f"--{event}s", type=int, default=10, metavar="N", help="for each stage (default: 10)")
    args.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="(default: all)")
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--json", metavar="FILE", help="write one JSON object per row")
    options = args.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        folder, rows = Path(name), []
        for part in ("base", "intact", "run"):
            (folder / part).mkdir()
        if not set(options.stages) <= ALONE:
            make_base(folder)
        for stage in options.stages:
            events = [event for event in EVENTS for _ in range(getattr(options, f"{event}s"))]
            rows.append(Campaign(stage, folder, random.Random(f"{options.seed} {stage}")).run(events))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        Path(options.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(any(row["failures"] for row in rows))


def make_base(folder: Path) -> None:
    """FOLDER/base/run: a run that is trained and evaluated."""
    path = tiny.write(folder / "base" / "run")
    for stage in tiny.STAGES[:3]:
        status, _, err = tiny.finish(tiny.start(stage, path))
        assert status == 0, err


class Campaign:
    """What happens to one stage in FOLDER/run, against an uninterrupted run of it in FOLDER/whole."""

    def __init__(self, stage: str, folder: Path, rng: random.Random):
        self.stage, self.folder, self.rng = stage, folder, rng
        self.run_dir, self.whole = folder / "run" / stage, folder / "intact" / stage
        self.counts, self.problems = Counter(), []

    def run(self, events: list[str]) -> dict:
        """Makes these things happen, in random order; returns a row of the table."""
        self.finish(self.whole)
        shutil.rmtree(self.whole)
        self.seconds = self.finish(self.whole)  # the second time, when all programs are compiled
        self.sizes = [p.stat().st_size for p in self.whole.rglob("*") if p.is_file()]
        self.rng.shuffle(events)
        missed = 0
        while events and not self.problems:
            before, event = self.progress(), events[-1]
            status, happened = self.once(event)
            if happened:
                self.counts[events.pop()] += 1
            elif event == "worker":
                missed += 1
                if missed == 5 and not self.counts["worker"]:  # it starts none
                    events = [event for event in events if event != "worker"]
            self.problems += self.lost(before)
            if status == 0:
                self.compare()
        if self.run_dir.exists() and not self.problems:
            self.finish(self.run_dir)
            self.compare()
        print("\n".join(self.problems), end="\n" * bool(self.problems), file=sys.stderr)
        counts = {f"{event}s": self.counts[event] for event in EVENTS}
        others = {name: self.counts[name] for name in ("one_line", "too_early", "finished")}
        return {"stage": self.stage, **counts, **others, "failures": len(self.problems)}

    def once(self, event: str) -> tuple[int, bool]:
        """Runs the stage and lets something happen: (exit status, whether it had not ended before)."""
        started = time.monotonic()
        process = self.start(self.run_dir, limit=self.limit() if event == "disk" else None)
        if event != "disk":
            self.wait(process)
        victims = [process.pid]
        if event == "worker":
            victims = []
            while process.poll() is None and not victims:
                time.sleep(0.001)
                with contextlib.suppress(OSError):  # it has just ended
                    victims = tiny.children(process.pid)
        happened = process.poll() is None and bool(victims)
        if happened and event != "disk":
            try:
                os.kill(self.rng.choice(victims), signal.SIGTERM if event == "term" else signal.SIGKILL)
            except ProcessLookupError:
                happened = False
        try:
            status, _, err = tiny.finish(process)
        finally:
            process.kill()
        if not happened and not status:  # too late: the machine is faster than it was
            self.seconds = time.monotonic() - started
        # Before Python reaches its first line, nothing can handle a signal, and nothing can be lost.
        early = event == "term" and status == -signal.SIGTERM
        self.counts["too_early"] += early
        self.counts["one_line"] += status == 2
        wanted = {"kill": (0, -signal.SIGKILL), "term": (0, launch.STOPPED)}.get(event, (0, 2))
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        if "Traceback" in err or len(errors) != (status == 2) or not (early or status in wanted):
            self.problems.append(f"{self.stage}: after {event}, exit status {status} and:\n{err[-4000:]}")
        return status, happened

    def limit(self) -> int:
        """Bytes that no file may exceed: about the size of one that the stage writes."""
        return int(self.rng.choice(self.sizes) * self.rng.random() * 1.1)

    def wait(self, process: subprocess.Popen) -> None:
        """Until some moment: half of them anywhere, half of them where rows are being written, or late."""
        if self.rng.random() < 0.5:
            time.sleep(self.rng.random() * self.seconds)
        elif self.stage in OUTPUTS:
            time.sleep((0.6 + 0.4 * self.rng.random()) * self.seconds)
        else:
            count = 1 + self.progress() // LOGGED.get(self.stage, 1)
            tiny.wait_for(self.watched(), count, process, self.stage if self.stage in LOGGED else "")
            time.sleep(self.rng.random() * 0.3)

    def start(self, run_dir: Path, stage: str = "", limit: int | None = None) -> subprocess.Popen:
        base = self.folder / "base" / "run"
        if self.stage in READS_A_RUN and not run_dir.exists():
            shutil.copytree(base, run_dir)
        settings = SETTINGS.get(self.stage, {})
        if self.stage in ("train", "sweep"):
            settings = {**settings, "traces": str(base / "traces.jsonl")}
        if self.stage == "pretrain":
            path = tiny.write_pretrain(run_dir, self.folder / "corpus.jsonl", **settings)
        else:
            path = tiny.write(run_dir, **settings)
        more = () if stage else ARGUMENTS.get(self.stage, ())
        with contextlib.nullcontext() if limit is None else tiny.small_files(limit):
            return tiny.start(stage or self.stage, path, *more)

    def finish(self, run_dir: Path, stage: str = "") -> float:
        """Runs the stage (or another one there) to the end; returns the seconds it took."""
        started = time.monotonic()
        process = self.start(run_dir, stage)
        try:
            status, _, err = tiny.finish(process)
        finally:
            process.kill()
        assert status == 0, err
        return time.monotonic() - started

    def recorded(self) -> bool:
        """Whether the run directory says that the stage is finished."""
        path = self.run_dir / "run.json"
        return path.exists() and "finished" in json.loads(path.read_text())["stages"].get(self.stage, {})

    def watched(self) -> Path:
        return self.run_dir / (JOURNALS[self.stage][0] if self.stage in JOURNALS else "metrics.jsonl")

    def progress(self) -> int:
        """Samples in the journal, or the newest listed checkpoint."""
        if self.stage in JOURNALS:
            path = self.watched()
            return path.read_bytes().count(b"\n") if path.exists() else 0
        if self.stage in CHECKPOINTS:
            return max(listed(self.run_dir / CHECKPOINTS[self.stage][0]), default=0)
        return 0

    def lost(self, before: int) -> list[str]:
        """What was lost that must not be."""
        if self.stage in OUTPUTS or self.recorded():
            return []
        if self.progress() < before:
            return [f"{self.stage}: {before} before, {self.progress()} after"]
        if self.stage in JOURNALS:
            names = Counter((row[JOURNALS[self.stage][1]], row["sample"]) for row in whole_lines(self.watched()))
            return [f"sample {sample} of {name} occurs twice" for (name, sample), n in names.items() if n > 1]
        rows = [row for row in whole_lines(self.run_dir / "metrics.jsonl") if row["stage"] == self.stage]
        reached = max((row["step"] for row in rows), default=0)
        name, every = CHECKPOINTS[self.stage]
        if reached - self.progress() > every and not (self.run_dir / "model").exists():
            return [f"{self.stage}: {reached} updates reached, the last checkpoint is {self.progress()}"]
        return damaged(self.run_dir / name)

    def compare(self) -> None:
        """A finished run must be like the uninterrupted one; it is deleted."""
        both = (self.run_dir, self.whole)
        if self.stage == "train":
            for run_dir in both:
                self.finish(run_dir, "export")
            adapters = [(run_dir / "adapter" / "adapter_model.safetensors").read_bytes() for run_dir in both]
            found = {"losses": [tiny.losses(run_dir) for run_dir in both], "final parameters": adapters}
        elif self.stage == "pretrain":
            found = {"losses or weights": [pretrained(run_dir) for run_dir in both]}
            if (self.run_dir / "pretrain").exists():
                self.problems.append("its checkpoints are still there")
        else:
            files = JOURNALS[self.stage][2:] if self.stage in JOURNALS else OUTPUTS[self.stage]
            found = {file: [(run_dir / file).read_bytes() for run_dir in both] for file in files}
            if self.stage == "convert":
                self.problems += whole_model(self.run_dir / "model")
        names = [name for name, (ours, theirs) in found.items() if ours != theirs]
        self.problems += [f"{self.stage}: {name} not those of an uninterrupted run" for name in names]
        if self.stage in UNLOCKED:  # the next stage that takes the lock removes what a killed one left
            with RunDir(config_lib.load(self.run_dir.with_name(f"{self.run_dir.name}.yaml"))):
                pass
        self.problems += [f"{path} stayed behind" for path in self.run_dir.glob("**/.*.tmp")]
        self.counts["finished"] += 1
        if not self.problems:
            shutil.rmtree(self.run_dir)


def listed(folder: Path) -> list[int]:
    return [int(p.stem) for p in (folder / "manifests").glob("*.json")]


def whole_lines(path: Path) -> list[dict]:
    """The rows of a file, without a torn last one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def damaged(folder: Path) -> list[str]:
    """Listed checkpoints whose files do not match their manifests."""
    from dail_jax.checkpoint import store

    bad = {step: store.damaged(folder, step) for step in listed(folder)}
    return [f"checkpoint {step}: {file} is damaged" for step, file in bad.items() if file]


def whole_model(folder: Path) -> list[str]:
    """Why a converted model does not load."""
    from dail_jax import config, mesh
    from dail_jax.checkpoint import base
    from dail_jax.errors import UserError

    try:
        base.load(folder, mesh.make_mesh(config.Mesh()), "float32")
    except UserError as error:
        return [str(error)]
    return []


def pretrained(run: Path) -> tuple[list[tuple[int, float]], bytes]:
    """Losses and weights."""
    rows = [row for row in whole_lines(run / "metrics.jsonl") if row["stage"] == "pretrain"]
    return [(row["step"], row["loss"]) for row in rows], (run / "model" / "model.safetensors").read_bytes()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as stuck:
        sys.exit(f"stuck: {stuck}")
