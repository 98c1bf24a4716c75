"""Training checkpoints: LoRA, optimiser, Grain iterator and counters, as one Orbax step, under a SHA-256 manifest.

A step counts only once its manifest is there, which is written last: a step that was torn by a kill, or half
deleted, is never restored. Corrupt steps are named and passed over for the one before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import tensorstore

from dail_jax import mesh as mesh_lib
from dail_jax.errors import UserError, writing
from dail_jax.metrics import log
from dail_jax.rundir import sha256, write_atomic

TRASH = "trash"

# Orbax asks TensorStore for its metrics at every save and restore, only to log them, and what TensorStore 0.1.86 returns
# is never freed: some 50 KiB per save. See benchmarks/leak.py.
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Orbax's failure to write `path` as a UserError.

    Its threads print a traceback for every array as well, some of them only at the exit: those are silenced, after a
    failure for good.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda found: hook(found) if threading.current_thread() is threading.main_thread() else None
    with writing(path, ValueError):  # what TensorStore raises
        yield
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Store:
    """Checkpoints in a folder: `save(step, state, progress)` and `restore(abstract_state)`."""

    def __init__(self, folder: str | Path, keep: int):
        self.folder = Path(folder).absolute()
        self.manifests = self.folder / "manifests"
        self.keep = keep
        if mesh_lib.is_first():
            self.manifests.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)
            for path in self.folder.iterdir():  # what a kill left behind: not ours to restore
                if path.is_dir() and path.name.isdigit() and not self._manifest(int(path.name)).exists():
                    shutil.rmtree(path)
        mesh_lib.barrier("store")
        # Orbax would delete the old step before the new one has its manifest: `save` does it instead.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, enable_async_checkpointing=False, todelete_subdir=TRASH, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Durable on return. `progress` is JSON: the Grain iterator's state and what must not change."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with self._making_room(step), one_line(self.folder / str(step)):
            if not self.manager.save(step, args=args, force=True):
                raise RuntimeError(f"checkpoint {step} was not saved: it exists already")
            self.manager.wait_until_finished()
        if mesh_lib.is_first():
            root = self.folder / str(step)
            files = {str(p.relative_to(root)): sha256(p) for p in sorted(root.rglob("*")) if p.is_file()}
            write_atomic(self._manifest(step), json.dumps(files, indent=0))
        mesh_lib.barrier(f"saved {step}")
        self._delete(self.steps()[: -self.keep])

    @contextlib.contextmanager
    def _making_room(self, step: int) -> Iterator[None]:
        """Removes what a failed save has written, which would fill the disk that the run's other files need."""
        try:
            yield
        except UserError:
            for path in [self.folder / str(step), *self.folder.glob(f"{step}.orbax-checkpoint-tmp*")]:
                shutil.rmtree(path, ignore_errors=True)
            raise

    def _delete(self, steps: list[int]) -> None:
        mesh_lib.barrier("delete")  # all have listed the steps
        for step in steps:
            if mesh_lib.is_first():
                self._manifest(step).unlink()  # first, so that a half deleted step does not count
            self.manager.delete(step)
        if mesh_lib.is_first():
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)

    def steps(self) -> list[int]:
        """Whole checkpoints, oldest first."""
        return sorted(int(p.stem) for p in self.manifests.glob("*.json") if (self.folder / p.stem).is_dir())

    def progress(self, step: int) -> dict[str, Any]:
        return self.manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

    def restore(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, progress) of the newest undamaged checkpoint, or None if there is none yet."""
        steps = self.steps()
        for step in reversed(steps):
            damaged = self.damaged(step)
            if damaged:
                log(f"checkpoint {step} is damaged ({damaged}); falling back to the one before")
                continue
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
            out = self.manager.restore(step, args=args)
            self._delete([s for s in steps if s > step])
            return step, out["state"], out["progress"]
        if steps:
            raise UserError("every checkpoint is damaged: delete the folder to start anew", file=self.folder)
        return None

    def damaged(self, step: int) -> str | None:
        """The first file of a step that is missing or differs from its manifest."""
        root = self.folder / str(step)
        try:
            files = json.loads(self._manifest(step).read_text())
        except ValueError:
            return "manifest"
        return next((f for f, h in files.items() if not (root / f).is_file() or sha256(root / f) != h), None)

    def _manifest(self, step: int) -> Path:
        return self.manifests / f"{step}.json"

    def close(self) -> None:
        self.manager.close()
