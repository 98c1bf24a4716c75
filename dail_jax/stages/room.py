"""The space on the disk that a command's steps take at most, against what is free."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from dail_jax.errors import UserError
from dail_jax.model import lora
from dail_jax.stages.subject import Finding, Subject
from dail_jax.train import references

TRACE_BYTES = 64  # per token of a trace, in the journal and in the file made of it
SAMPLE_BYTES = 8  # per token of a sample in the journal: its id
TEXT_BYTES = 6  # per token of a sample's text, which samples.jsonl holds for every budget
STATE_COPIES = 3  # of the adapter in a checkpoint: its weights and Adam's two averages


def space(s: Subject) -> dict[str, int]:
    """Bytes that a step writes at most, by what they are for."""
    config = s.config
    if s.stage == "generate":
        made = config.generate
        return {"traces": len(s.rows) * made.samples * made.sampling.max_tokens * TRACE_BYTES}
    if s.stage == "evaluate":
        drawn = config.evaluate
        problems = sum(len(s.table(benchmark)) for benchmark in drawn.benchmarks)
        return {"samples": problems * drawn.samples * (drawn.longest * SAMPLE_BYTES + sum(drawn.cuts) * TEXT_BYTES)}
    if s.stage == "convert":
        return {"weights": s.weight_bytes}
    if not s.method.trains:
        return {}
    cfg = config.train
    pairs = jax.tree.leaves(lora.abstract(s.model, cfg.lora, s.mesh))
    adapter_bytes = sum(x.size * x.dtype.itemsize for x in pairs)
    if s.stage == "export":
        return {"adapter": adapter_bytes, **({"merged": s.weight_bytes} if config.export.merged else {})}
    found = {"checkpoints": (cfg.keep_checkpoints + 1) * STATE_COPIES * adapter_bytes}
    if s.method.caches(cfg):
        need = references.bytes_needed(
            s.trained_tokens(), len(s.method.roles), s.model.D, jnp.dtype(config.model.dtype)
        )
        limit, exact = cfg.references_gib * 2**30, s.method.source == "solutions" or s.traces is not None
        if need <= limit or not exact:  # states that need more are not kept
            found["references"] = int(min(need, limit))
    return found


def check(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """The space that the steps will take, against what is free."""
    folder = Path(min((s.config.run_dir for s in subjects), key=len))
    needs: collections.Counter[str] = collections.Counter()
    there = 0
    for s in subjects:
        needs.update(space(s))
        there += sum(map(_bytes_of, _begun(s)))
    free, total = shutil.disk_usage(existing(folder)).free, needs.total()
    shown = ", ".join(f"{name} {size(count)}" for name, count in needs.most_common() if count)
    yield "disk", f"up to {size(total)} ({shown}); {size(free)} free"
    if total - there > free:
        less = ", or lower train.references_gib" if needs["references"] else ""
        raise UserError(
            f"up to {size(total)} will be written ({shown}), and {size(free)} are free: "
            f"free some, use another run_dir{less}",
            file=folder,
        )


def _begun(s: Subject) -> Iterator[Path]:
    """The files and folders in which a step's unfinished work lies."""
    recipe, folder = s.recipe, Path(s.config.run_dir)
    yield from (folder / output.name for output in recipe.outputs)
    for pattern in (*recipe.partial, *["references"] * (s.stage == "train")):
        yield from folder.glob(pattern)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next((one for one in (path, *path.absolute().parents) if one.exists()), path)


def _bytes_of(path: Path) -> int:
    """What a file or a folder holds."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def size(count: float) -> str:
    """Bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
