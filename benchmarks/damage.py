"""Damages files at random and counts what loading them does.

    python benchmarks/damage.py --mutations 10000      (about ten minutes; --mutations 500: one minute)

Targets: an adapter, a merged model, a converted model, training checkpoints (two, so that loading can fall back to the
older one), cached references, a finished run directory, and a Hugging Face folder without checksums, where a flipped bit
of a weight goes unnoticed. A mutation hits one random file: a bit is flipped, a stretch is overwritten, zeroed, removed
or inserted, the end is cut off, or the file is emptied or deleted. Loading must refuse with a one-line error, or return
what was saved, bit for bit. For the finished run, every stage is called again: whatever it then accepts as done must be
unchanged, including the final checkpoint, which an older one must not replace; making an output again counts as refusing.
Exit status 1 if a folder with checksums ever loaded something else, or if anything but such an error was raised.
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
        share = options.mutations // len(loaders)
        rows = [{"target": t, **campaign(t, Path(name) / t, load, share, rng)} for t, load in loaders.items()]
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
        if not references.is_valid(path, "key"):
            raise UserError("computed again", file=path)
        found = references.References(path, references.CONTRAST, examples, cfg.D, jnp.bfloat16)
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
        stack.enter_context(mock.patch.object(evaluate, "ungradable", lambda _, tables: {name: [] for name in tables}))
        for stage in tiny.STAGES[:4]:
            if launch.main([stage, "--config", str(path)]):
                raise UserError(errors.getvalue().rstrip("\n"))
    final = folder / "checkpoints" / str(tiny.UPDATES)
    names = ("traces.jsonl", "samples.jsonl", "results.json")
    files = [*(folder / name for name in names), *final.rglob("*"), *(folder / "adapter").iterdir()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def write_references(folder: Path, examples: list[Example], d: int) -> None:
    """A cache of random states, as training writes it."""
    folder.mkdir()
    tokens, rng = sum(len(e.response) for e in examples), np.random.default_rng(0)
    files = {}
    for role in references.CONTRAST:
        file = folder / f"{role}.bin"
        file.write_bytes(rng.standard_normal((tokens, d)).astype(jnp.bfloat16).tobytes())
        files[file.name] = provenance.sha256(file)
    (folder / "manifest.json").write_text(json.dumps({"key": "key", "shape": (tokens, d), "files": files}))


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


if __name__ == "__main__":
    metrics.console.quiet = True
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it could not read
    sys.exit(main())
