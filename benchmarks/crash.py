"""Kills and preempts real runs at random moments, and counts what was lost.

    python benchmarks/crash.py --kills 200 --terms 50      (an hour on two cores; --kills 10 --terms 4: four minutes)

generate, evaluate: SIGKILL. Every problem in the journal before a kill must be there after it, none twice, and the
finished file must equal an uninterrupted run's byte for byte.
train: SIGKILL, with a save after every second update and two checkpoints kept, so that many kills hit a save or a
deletion. Every listed step must load, at most one save interval may be lost, and losses and final parameters must be
bit-identical.
pretrain: the same, with kills also between saving the model and recording it.
All stages must exit with 0 on SIGTERM. A run directory is used until its run is finished; then a new run begins. Exit
status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
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

import tiny

SAVE_EVERY = 2
JOURNALS = {  # stage: its journal, what names a row there, the finished file
    "generate": ("traces.partial.jsonl", "problem_id", "traces.jsonl"),
    "evaluate": ("samples.partial.jsonl", "name", "samples.jsonl"),
}
CHECKPOINTS = {
    "train": ("checkpoints", SAVE_EVERY),
    "pretrain": ("pretrain", 5),
}  # the folder, and the updates between saves
LOGGED = {"train": 1, "pretrain": 4}  # updates per row of metrics.jsonl
STAGES = (*JOURNALS, *CHECKPOINTS)


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--kills", type=int, default=200, help="SIGKILLs per stage")
    args.add_argument("--terms", type=int, default=50, help="SIGTERMs per stage")
    args.add_argument("--stage", choices=STAGES, help="(default: all)")
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--json", metavar="FILE", help="write one JSON object per row")
    options = args.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        folder = Path(name)
        (folder / "programs").mkdir()
        if options.stage == "train":
            finished("generate", folder / "generate-whole", folder)
        stages = [options.stage] if options.stage else STAGES
        rows = [campaign(stage, folder, options.kills, options.terms, rng) for stage in stages]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if options.json:
        Path(options.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(any(row["failures"] for row in rows))


def campaign(stage: str, folder: Path, kills: int, terms: int, rng: random.Random) -> dict:
    """Sends signals until the counts are reached; returns a row of the table."""
    programs, whole = folder / "programs", folder / f"{stage}-whole"
    finished(stage, whole, folder)
    seconds = finished(stage, whole, folder)  # the second time, when all programs are compiled
    counts, run, problems = Counter(), folder / f"{stage}-run", []
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(signals)
    while signals:
        before = progress(stage, run)
        process = tiny.start(stage, config(stage, run, folder), programs)
        try:
            # Half of the signals come at any moment, half while rows are being written.
            if rng.random() < 0.5:
                tiny.wait_for(
                    watched(stage, run), 1 + before // LOGGED.get(stage, 1), process, stage if stage in LOGGED else ""
                )
                time.sleep(rng.random() * 0.3)
            else:
                time.sleep(rng.random() * seconds)
            if process.poll() is None:
                number = signals.pop()
                process.send_signal(number)
                counts[number.name] += 1
                status, _, err = tiny.finish(process)
                if number == signal.SIGTERM and status != 0 and status != -signal.SIGTERM:
                    problems.append(f"SIGTERM ended with {status}: {err[-300:]}")
                # Before Python reaches its first line, nothing can handle a signal, and nothing can be lost.
                counts["too early"] += status == -signal.SIGTERM
            status = process.wait()
        finally:
            process.kill()
            process.communicate()
        problems += lost(stage, run, before)
        if status == 0 and done(stage, run):
            problems += differences(stage, run, whole, folder)
            counts["finished runs"] += 1
            shutil.rmtree(run)
        if problems:
            print("\n".join(problems), file=sys.stderr)
            break
    if run.exists() and not problems:
        finished(stage, run, folder)
        problems += differences(stage, run, whole, folder)
        counts["finished runs"] += 1
    return {
        "stage": stage,
        "kills": counts["SIGKILL"],
        "terms": counts["SIGTERM"],
        "too_early": counts["too early"],
        "finished_runs": counts["finished runs"],
        "failures": len(problems),
    }


def config(stage: str, run: Path, folder: Path) -> Path:
    if stage == "pretrain":
        return tiny.write_pretrain(run, folder / "corpus.jsonl", pretrain__steps=200, pretrain__save_every=5)
    traces = {"traces": str(folder / "generate-whole" / "traces.jsonl")} if stage == "train" else {}
    objective = {"train__objective": "none"} if stage == "evaluate" else {}
    return tiny.write(
        run, generate__slots=4, evaluate__slots=2, train__epochs=4, train__save_every=SAVE_EVERY, **objective, **traces
    )


def finished(stage: str, run: Path, folder: Path) -> float:
    """Runs to the end; returns the seconds it took."""
    if done(stage, run):
        shutil.rmtree(run)
    started = time.monotonic()
    status, _, err = tiny.finish(tiny.start(stage, config(stage, run, folder), folder / "programs"))
    assert status == 0, err
    return time.monotonic() - started


def done(stage: str, run: Path) -> bool:
    path = run / "run.json"
    return path.exists() and "finished" in json.loads(path.read_text())["stages"].get(stage, {})


def watched(stage: str, run: Path) -> Path:
    return run / (JOURNALS[stage][0] if stage in JOURNALS else "metrics.jsonl")


def progress(stage: str, run: Path) -> int:
    """Problems in the journal, or the newest listed checkpoint."""
    if stage in JOURNALS:
        path = watched(stage, run)
        return path.read_bytes().count(b"\n") if path.exists() else 0
    return max(listed(run / CHECKPOINTS[stage][0]), default=0)


def listed(folder: Path) -> list[int]:
    return [int(p.stem) for p in (folder / "manifests").glob("*.json")]


def lost(stage: str, run: Path, before: int) -> list[str]:
    """What a signal cost that it must not cost."""
    if done(stage, run):
        return []
    if progress(stage, run) < before:
        return [f"{stage}: {before} before the signal, {progress(stage, run)} after it"]
    if stage in JOURNALS:
        names = Counter(row[JOURNALS[stage][1]] for row in whole_lines(watched(stage, run)))
        return [f"{name} occurs twice" for name, n in names.items() if n > 1]
    reached = max((row["step"] for row in whole_lines(run / "metrics.jsonl") if row["stage"] == stage), default=0)
    name, every = CHECKPOINTS[stage]
    if reached - progress(stage, run) > every and not (run / "model").exists():
        return [f"{stage}: {reached} updates reached, the last checkpoint is {progress(stage, run)}"]
    return damaged(run / name)


def whole_lines(path: Path) -> list[dict]:
    """The rows of a file, without a torn last one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def damaged(folder: Path) -> list[str]:
    """Listed checkpoints whose files do not match their manifests."""
    from dail_jax.checkpoint import store

    bad = {step: store.damaged(folder, step) for step in listed(folder)}
    return [f"checkpoint {step}: {file} is damaged" for step, file in bad.items() if file]


def differences(stage: str, run: Path, whole: Path, folder: Path) -> list[str]:
    """How a finished run differs from the uninterrupted one."""
    if stage in JOURNALS:
        file = JOURNALS[stage][2]
        same = (run / file).read_bytes() == (whole / file).read_bytes()
        return [] if same else [f"{file} differs from an uninterrupted run's"]
    if stage == "pretrain":
        problems = (
            [] if pretrained(run) == pretrained(whole) else ["losses or weights differ from an uninterrupted run's"]
        )
        return problems + (["its checkpoints are still there"] if (run / "pretrain").exists() else [])
    got, want = tiny.losses(run), tiny.losses(whole)
    first = next(((g, w) for g, w in zip(got, want, strict=False) if g != w), (len(got), len(want)))
    problems = [] if got == want else [f"losses differ from an uninterrupted run's: {first[0]}, not {first[1]}"]
    adapters = []
    for place in (run, whole):
        status, _, err = tiny.finish(tiny.start("export", config("train", place, folder), folder / "programs"))
        assert status == 0, err
        adapters.append((place / "adapter" / "adapter_model.safetensors").read_bytes())
    return problems if adapters[0] == adapters[1] else [*problems, "final parameters differ"]


def pretrained(run: Path) -> tuple[list[tuple[int, float]], bytes]:
    """Losses and weights."""
    rows = [row for row in whole_lines(run / "metrics.jsonl") if row["stage"] == "pretrain"]
    return [(row["step"], row["loss"]) for row in rows], (run / "model" / "model.safetensors").read_bytes()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as stuck:
        sys.exit(f"stuck: {stuck}")
