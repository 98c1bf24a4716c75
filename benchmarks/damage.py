"""Damages files, and mixes runs, at random; counts what loading them does.

    python benchmarks/damage.py --mutations 10000      (half an hour; --mutations 900: some three minutes)

Targets: an adapter, a merged model, a converted model, training checkpoints (two, so that the older one can be fallen
back to), cached references, a finished run directory; and a Hugging Face folder without checksums, where a flipped bit
of a weight cannot be noticed. A mutation hits one random file: a bit is flipped, a stretch is overwritten, zeroed, taken
out or put in, the end is cut off, or the file is emptied or removed. Loading must refuse in one line, or give what was
saved, bit for bit. Of the finished run every stage is called again: what it then calls done must be what it was, also
the final checkpoint, which no older one may stand in for; to make an output again counts as a refusal.

Two more targets are mixed up instead, a finished run and one that was interrupted: a setting is changed, contents are
replaced behind their paths (weights, tokenizer, templates, data, a benchmark, an adapter), or outputs are replaced by
another run's or by stale ones. Then some stage that depends on it is called. It must refuse in one line, or make its
outputs again, or find them to be what they were.

Exit status 1 if a folder with checksums ever loaded something else, a stage went on as if nothing had changed, or
anything but such a refusal was raised.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.numpy import load_file, save_file

from dail_jax import config as config_lib
from dail_jax import launch, metrics, provenance, rundir
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import base, hf, peft, store
from dail_jax.data.batches import Example
from dail_jax.errors import UserError
from dail_jax.model import lora as lora_lib
from dail_jax.stages import evaluate, export, generate, train
from dail_jax.text import load_tokenizer
from dail_jax.train import references

MODEL = Path(__file__).resolve().parent.parent / "dail_jax/microworld/assets/model"
OUTCOMES = ("refused", "unharmed", "changed", "crashed")
UNCHECKED = "folder without checksums"
RUN = "finished run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write one object per row")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        loaders = targets(Path(name))
        share = options.mutations // (len(loaders) + 2)
        rows = [{"target": t, **campaign(t, Path(name) / t, load, share, rng)} for t, load in loaders.items()]
        mixes = (("mixed runs", FINISHED), ("mixed after an interrupt", INTERRUPTED))
        with working(Path(name) / "mixed") as world:
            rows += [{"target": t, **mixed(t, world, stages, share, rng)} for t, stages in mixes]
    table = Table(title=f"{share * len(rows)} damaged files")
    for column in ("target", *OUTCOMES):
        table.add_column(column, justify="left" if column == "target" else "right")
    for row in rows:
        table.add_row(*(str(row[column]) for column in ("target", *OUTCOMES)))
    Console().print(table)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(any(row["crashed"] or (row["changed"] and row["target"] != UNCHECKED) for row in rows))


def targets(folder: Path) -> dict[str, Callable[[Path], Any]]:
    """How to load each target, by the name of its folder; makes the folders."""
    mesh = mesh_lib.make_mesh(config_lib.Mesh())
    jax.set_mesh(mesh)
    params, cfg = hf.load(MODEL, mesh, "float32")
    settings = config_lib.LoraConfig(rank=4)
    lora = jax.tree.map(lambda x: x + 0.5, lora_lib.init(jax.random.key(0), cfg, settings))
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), lora)
    examples = [Example(str(n), {}, tuple(range(5 + n))) for n in range(4)]

    def read_model(path: Path):
        weights = base.load(path, mesh, "float32")[0]
        return weights, load_tokenizer(path).render([{"role": "user", "content": "add 1 2"}])

    def read_checkpoint(path: Path):
        kept = store.Store(path, keep=2)
        try:
            return kept.restore(shape)
        finally:
            kept.close()

    def read_references(path: Path):
        found = references.load(path, "key", examples, cfg.D, jnp.bfloat16)
        if found is None:
            raise UserError("computed again", file=path)
        return [np.array(found(role, i)) for role in references.CONTRAST for i in range(len(examples))]

    peft.save(folder / "adapter", lora, cfg, settings, "base")
    hf.save(folder / "merged model", params, cfg, json.loads((MODEL / "config.json").read_text()), MODEL)
    base.save(folder / "converted model", params, MODEL)
    shutil.copytree(folder / "merged model", folder / UNCHECKED)
    (folder / UNCHECKED / hf.MANIFEST).unlink()
    kept = store.Store(folder / "checkpoints", keep=2)
    for step in (1, 2):
        kept.save(step, jax.tree.map(lambda x, step=step: x * 2.0**step, lora), {"data": step})
    kept.close()
    write_references(folder / "references", examples, cfg.D)
    finish_run(folder / RUN)
    return {
        "adapter": lambda path: peft.load(path, cfg, mesh)[0].tree,
        "merged model": read_model,
        "converted model": read_model,
        "checkpoints": read_checkpoint,
        "references": read_references,
        RUN: read_run,
        UNCHECKED: read_model,
    }


def finish_run(folder: Path) -> None:
    """A run of all stages on the tiny configuration, without the files that no stage reads again."""
    path = tiny.write(folder)
    for stage in tiny.STAGES[:4]:
        if launch.main([stage, "--config", str(path)]):
            raise SystemExit(f"{stage} failed")
    for name in ("references", "token_scores.jsonl", "metrics.jsonl", ".lock"):
        rundir.remove(folder / name)


def read_run(folder: Path) -> dict[str, bytes]:
    """The outputs that the stages accept as done; raises UserError where one refuses, or would make an output again."""

    def work(_):
        raise UserError("made again")

    path, errors = tiny.write(folder), io.StringIO()
    stages = (generate, train, evaluate, export)
    with contextlib.ExitStack() as stack, contextlib.redirect_stderr(errors):
        for stage in stages:
            stack.enter_context(mock.patch.object(stage, "open_session", work))
        stack.enter_context(mock.patch.object(evaluate, "ungradable", every_row))
        for stage in tiny.STAGES[:4]:
            if launch.main([stage, "--config", str(path)]):
                raise UserError(errors.getvalue().rstrip("\n"))
    final = folder / "checkpoints" / str(tiny.UPDATES)
    names = ("traces.jsonl", "samples.jsonl", "results.json")
    files = [*(folder / name for name in names), *final.rglob("*"), *(folder / "adapter").iterdir()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def every_row(_, tables: dict[str, list]) -> dict[str, list[str]]:
    """In place of `evaluate.ungradable`, which asks a worker process about each gold answer."""
    return {name: [] for name in tables}


def write_references(folder: Path, examples: list[Example], d: int) -> None:
    """A cache of random states, as training writes it."""
    folder.mkdir()
    tokens, rng = sum(len(e.response) for e in examples), np.random.default_rng(0)
    files = {}
    for role in references.CONTRAST:
        file = folder / f"{role}.bin"
        file.write_bytes(rng.standard_normal((tokens, d)).astype(jnp.bfloat16).tobytes())
        files[file.name] = provenance.sha256(file)
    parts = {role: [list(range(len(examples)))] for role in references.CONTRAST}
    (folder / "manifest.json").write_text(json.dumps({"key": "key", "files": files, "parts": parts}))


def campaign(name: str, folder: Path, load: Callable[[Path], Any], count: int, rng: random.Random) -> dict[str, int]:
    """How often each outcome occurred."""
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    want, work = load(folder), folder.with_name("work")
    answers = [jax.tree.map(np.asarray, want)]
    if name == "checkpoints":  # the older step is acceptable as well: the store logs that it falls back
        step, tree, _ = answers[0]
        answers.append((step - 1, jax.tree.map(lambda x: x / 2, tree), {"data": step - 1}))
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    for _ in track(range(count), description=name):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        file = rng.choice(files)
        kind = mutate(work / file, rng)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                got = jax.tree.map(np.asarray, load(work))
            outcome = "unharmed" if any(same(got, answer) for answer in answers) else "changed"
        except UserError as error:
            outcome = "refused" if "\n" not in str(error) else "crashed"
        except Exception:
            outcome = "crashed"
            print(f"{name}: {file}, {kind}:\n{traceback.format_exc()}", file=sys.stderr)
        if outcome == "changed" and name != UNCHECKED:
            print(f"{name}: {file}, {kind}: loaded something other than what was saved", file=sys.stderr)
        counts[outcome] += 1
    shutil.rmtree(work)
    return dict(counts)


def same(a: Any, b: Any) -> bool:
    """Equal trees, bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def mutate(file: Path, rng: random.Random) -> str:
    """Damages a file in place and returns how."""
    data = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "overwrite", "zero", "take out", "put in", "cut", "empty", "remove"))
    at = rng.randrange(len(data)) if data else 0
    # Half of the mutations lie in the first 4 KiB, where headers are.
    if rng.random() < 0.5:
        at = min(at, rng.randrange(4096))
    end = min(len(data), at + rng.choice((1, 4, 64, 4096)))
    if kind == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        data[at:end] = rng.randbytes(end - at)
    elif kind == "zero":
        data[at:end] = bytes(end - at)
    elif kind == "take out":
        del data[at:end]
    elif kind == "put in":
        data[at:at] = rng.randbytes(end - at)
    elif kind == "cut":
        del data[at:]
    elif kind == "empty":
        data.clear()
    if kind == "remove":
        file.unlink()
    else:
        file.write_bytes(data)
    return f"{kind} at {at}"


# ---------------------------------------------------------------------------------------------------
# Mixed runs
# ---------------------------------------------------------------------------------------------------

# Stage: what it makes, in a run of the world below.
FINISHED = {
    "generate": ("traces.jsonl",),
    "train": ("checkpoints",),
    "evaluate": ("samples.jsonl", "results.json"),
    "grade": ("samples.jsonl", "results.json"),
    "export": ("adapter",),
    "judge": ("samples.jsonl", "results.json"),  # evaluate, of an adapter that the configuration names
}
INTERRUPTED = {"generate": (), "train": (), "evaluate": (), "judge": ()}
TRAINED = ("train", "evaluate", "grade", "export")
DRAWN = ("evaluate", "grade", "judge")
ALL = tuple(FINISHED)
SETTINGS = {  # of the configuration: the stages that must notice
    "seed=6": ALL,
    "model.dtype=bfloat16": ALL,
    "prompts.opening=x": ALL,
    "prompts.max_solution_tokens=50": ALL,
    "generate.tau=0.5": ("generate", *TRAINED),
    "generate.sampling.temperature=0.9": ("generate", *TRAINED),
    "data.limit=11": ("generate", *TRAINED),
    "filters.keep=1": TRAINED,
    "waypoints.extractor=reference": TRAINED,
    "train.gamma=0.2": TRAINED,
    "train.epochs=1": TRAINED,
    "train.lora.rank=2": TRAINED,
    "train.reduce=sequence": TRAINED,
    "train.optimizer.learning_rate=1e-4": TRAINED,
    "evaluate.samples=2": DRAWN,
    "evaluate.sampling.temperature=0.5": DRAWN,
    "evaluate.max_prompt_tokens=100": DRAWN,
}
CONTENTS = {  # files beside the run: the stages that must notice
    "model/model.safetensors": ALL,
    "model/tokenizer_config.json": ALL,
    "templates/student.txt": ALL,
    "templates/privileged.txt": ("generate", *TRAINED),
    "templates/negative.txt": TRAINED,
    "train.jsonl": ("generate", *TRAINED),
    "hard.jsonl": DRAWN,
    "adapter/adapter_model.safetensors": ("judge",),
    "adapter/adapter_config.json": ("judge",),
}


@contextlib.contextmanager
def working(folder: Path):
    """The folder with all that runs read in it, a finished run, and for each stage one that was interrupted in it."""
    folder.mkdir()
    for name in ("model", "templates"):
        shutil.copytree(tiny.ASSETS / name, folder / name)
    (folder / "model" / hf.MANIFEST).unlink()  # as after a download
    for name in ("train.jsonl", "hard.jsonl"):
        shutil.copy(tiny.ASSETS / name, folder / name)
    call(folder, "finished", "generate")
    call(folder, "finished", "train")
    call(folder, "finished", "export")
    shutil.copytree(folder / "finished" / "adapter", folder / "adapter")
    call(folder, "finished", "evaluate")
    call(folder, "judged", "judge")
    shutil.copytree(folder / "finished", folder / "other")  # with outputs that are valid, and not these
    for name in ("traces.jsonl", "samples.jsonl"):
        lines = (folder / "other" / name).read_text().splitlines(keepends=True)
        (folder / "other" / name).write_text("".join(lines[:-1]))
    shutil.rmtree(folder / "other" / "checkpoints" / str(tiny.UPDATES))
    (folder / "other" / "checkpoints" / "manifests" / f"{tiny.UPDATES}.json").unlink()
    for file in (folder / "other" / "adapter").glob("*.safetensors"):
        nudge(file)
    results = (folder / "other" / "results.json").read_text()
    (folder / "other" / "results.json").write_text(results.replace('"seed": 5', '"seed": 6'))
    for stage in INTERRUPTED:
        run = folder / f"begun {stage}"
        if stage in ("train", "evaluate"):
            shutil.copytree(folder / "finished", run)
            names = ["samples.jsonl", "results.json"] + ["checkpoints"] * (stage == "train")
            for name in names:
                rundir.remove(run / name)
            manifest = json.loads((run / "run.json").read_text())
            for name in ("evaluate", "train")[: 1 + (stage == "train")]:
                del manifest["stages"][name]
            (run / "run.json").write_text(json.dumps(manifest))
        seen: list[int] = []
        wanted = property(lambda _, seen=seen: seen.append(1) or len(seen) == 2)
        with mock.patch.object(rundir.Interrupt, "wanted", wanted):
            call(folder, run.name, stage)
    yield folder


def call(folder: Path, run: str, stage: str, *overrides: str) -> None:
    """A stage of FOLDER/RUN, with what lies in the folder; raises UserError."""
    errors, more = io.StringIO(), {}
    if stage == "judge":
        more = {"train__objective": "none", "evaluate__adapter": str(folder / "adapter")}
    path = tiny.write(
        folder / run,
        model__path=str(folder / "model"),
        data__path=str(folder / "train.jsonl"),
        prompts={role: str(folder / "templates" / f"{role}.txt") for role in ("student", "privileged", "negative")},
        evaluate__benchmarks=[{"name": "hard", "rows": {"path": str(folder / "hard.jsonl"), "limit": 3}}],
        **more,
    )
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = launch.main([stage.replace("judge", "evaluate"), "--config", str(path), *overrides])
    if status not in (0, launch.STOPPED):
        raise UserError(errors.getvalue().rstrip("\n").removeprefix("error: "))


def mixed(name: str, world: Path, stages: dict[str, tuple[str, ...]], count: int, rng: random.Random) -> dict[str, int]:
    """How often each outcome came, where a stage of a run meets what is not its own."""
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    finished = stages is FINISHED
    for _ in track(range(count), description=name):
        stage = rng.choice(list(stages))
        run = ("judged" if stage == "judge" else "finished") if finished else f"begun {stage}"
        with tempfile.TemporaryDirectory(prefix="mixed-") as place:
            folder = Path(place) / "world"
            shutil.copytree(world, folder)
            want = contents(folder / run, stages[stage])
            overrides: tuple[str, ...] = ()
            kind = rng.choice(
                ("setting", "contents", "swap") if finished and stage != "judge" else ("setting", "contents")
            )
            if kind == "setting":
                what = rng.choice([one for one, noticed in SETTINGS.items() if stage in noticed])
                overrides = (what,)
            elif kind == "contents":
                what = rng.choice([one for one, noticed in CONTENTS.items() if stage in noticed])
                replace(folder / what, rng)
            else:
                what = rng.choice([output for outputs in stages.values() for output in outputs])
                rundir.remove(folder / run / what)
                if rng.random() < 0.8:
                    (shutil.copytree if (folder / "other" / what).is_dir() else shutil.copy)(
                        folder / "other" / what, folder / run / what
                    )
            outcome = met(folder, run, stage, overrides)
            if outcome == "done":
                same = kind == "swap" and contents(folder / run, stages[stage]) == want
                outcome = "unharmed" if same else "changed"
            if outcome in ("changed", "crashed"):
                print(f"{name}: {stage} after {kind} {what}: {outcome}", file=sys.stderr)
            counts[outcome] += 1
    return dict(counts)


def met(folder: Path, run: str, stage: str, overrides: tuple[str, ...]) -> str:
    """What a stage makes of it: `refused`, `done`, or `crashed`. To begin work on an interrupted run is `done`, too."""

    class Begins(BaseException):
        pass

    def work(*_):
        raise Begins

    with contextlib.ExitStack() as stack:
        for module in (generate, train, evaluate, export):
            stack.enter_context(mock.patch.object(module, "open_session", work))
        stack.enter_context(mock.patch.object(evaluate, "ungradable", every_row))
        try:
            call(folder, run, stage, *overrides)
        except UserError as error:
            return "crashed" if "\n" in str(error) else "refused"
        except Begins:
            return "done" if run.startswith("begun") else "refused"  # made again
        except Exception:
            traceback.print_exc()
            return "crashed"
    return "done"


def contents(run: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    files = [file for name in names for file in ((run / name).rglob("*") if (run / name).is_dir() else [run / name])]
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}


def replace(file: Path, rng: random.Random) -> None:
    """Another version of a file, as valid as the first: of the rows that are read, where it has rows."""
    if file.suffix == ".safetensors":
        nudge(file)
    elif file.suffix == ".jsonl":
        lines = file.read_text().splitlines(keepends=True)
        row = json.loads(lines[0])
        field = rng.choice(("problem", "answer"))
        row[field] += "1"
        file.write_text(json.dumps(row) + "\n" + "".join(lines[1:]))
    elif file.suffix == ".json":
        tree = json.loads(file.read_text())
        key, value = (
            ("lora_alpha", 5) if "lora_alpha" in tree else ("chat_template", tree.get("chat_template", "") + "x")
        )
        file.write_text(json.dumps({**tree, key: value}))
    else:
        file.write_text(f"{file.read_text()} And {rng.random()}.")


def nudge(file: Path) -> None:
    """Changes one weight in a file of them."""
    weights = load_file(file)
    first = weights[min(weights)]
    first.flat[0] += 1
    save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    metrics.console.quiet = True
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it could not read
    sys.exit(main())
