"""Training checkpoints: the state and the feed's progress as one Orbax step, with a SHA-256 manifest.

The first process writes all of a step, and every process reads its own shards. They need not share a disk, as long as what
the first one has written is brought to the others before they read.

A step counts only once its manifest exists, which is written last, so a step that a kill left incomplete, or half
deleted, is never restored. During training, a damaged step is logged and the one before it is used; after training, only
the step that training ended with counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental.multihost_utils import process_allgather

from dail_jax import mesh as mesh_lib
from dail_jax import mirror
from dail_jax.errors import UserError, writing
from dail_jax.metrics import log
from dail_jax.provenance import Checksums, Output, State, sha256
from dail_jax.rundir import write_atomic

TRASH = "trash"
MANIFESTS = "manifests"


def steps(folder: Path) -> list[int]:
    """The steps of complete checkpoints, oldest first."""
    found = (p.stem for p in (folder / MANIFESTS).glob("*.json"))
    return sorted(int(stem) for stem in found if stem.isdigit() and (folder / stem).is_dir())


def manifest_of(folder: Path, step: int) -> Path:
    return folder / MANIFESTS / f"{step}.json"


def damaged(folder: Path, step: int, checksum: Callable[[Path], str] = sha256) -> str | None:
    """The first file of a step that is missing or differs from its manifest; None if the step is undamaged."""
    root = folder / str(step)
    try:
        files = json.loads(manifest_of(folder, step).read_text()).items()
    except (OSError, ValueError, AttributeError):
        return "manifest"
    return next((f for f, h in files if not (root / f).is_file() or checksum(root / f) != h), None)


# Orbax asks TensorStore for metrics at every save and restore, only to log them, and TensorStore 0.1.86 never frees what
# it returns: about 50 KiB per save. See benchmarks/leak.py.
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


@contextlib.contextmanager
def as_one_line(path: Path) -> Iterator[None]:
    """Turns Orbax's failure to write `path` into a UserError.

    Its threads also print a traceback for every array, some of them only when the process exits. They are silenced in
    the block, and after a failure for good.
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
    """Checkpoints in a folder: `save(step, state, progress)` and `restore(abstract_state)`; the last `keep` are kept.

    `made_of` identifies what the state follows from; checkpoints made of something else are refused.
    """

    def __init__(self, folder: str | Path, keep: int, made_of: str | None = None):
        self.folder = Path(folder).absolute()
        self.keep, self.made_of = keep, made_of
        (self.folder / MANIFESTS).mkdir(parents=True, exist_ok=True)
        if mesh_lib.is_first():
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)
            for path in self.folder.iterdir():  # left incomplete by a kill
                if path.is_dir() and path.name.isdigit() and not manifest_of(self.folder, int(path.name)).exists():
                    shutil.rmtree(path)
        mesh_lib.barrier("store")
        me = jax.process_index()
        # Orbax would delete the old step before the new one has its manifest, so `save` deletes it instead.
        options = ocp.CheckpointManagerOptions(
            create=False,
            max_to_keep=None,
            enable_async_checkpointing=False,
            todelete_subdir=TRASH,
            cleanup_tmp_directories=mesh_lib.is_first(),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
            ),
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves a step, durably on return. `progress` is JSON, for the feed to resume from."""
        whole = process_allgather(state, tiled=True) if jax.process_count() > 1 else state
        mesh_lib.from_first(lambda: self._save(step, whole, {**progress, "made_of": self.made_of}))

    def _save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        root = self.folder / str(step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with self._making_room(step), as_one_line(root):
            if not self.manager.save(step, args=args, force=True):
                raise RuntimeError(f"checkpoint {step} was not saved: it already exists")
            self.manager.wait_until_finished()
        files = {str(p.relative_to(root)): sha256(p) for p in sorted(root.rglob("*")) if p.is_file()}
        write_atomic(manifest_of(self.folder, step), json.dumps(files, indent=0))
        self._delete(self.steps()[: -self.keep])
        mirror.sync()

    @contextlib.contextmanager
    def _making_room(self, step: int) -> Iterator[None]:
        """Removes what a failed save has written: the run's other files need the space."""
        try:
            yield
        except UserError:
            for path in [self.folder / str(step), *self.folder.glob(f"{step}.orbax-checkpoint-tmp*")]:
                shutil.rmtree(path, ignore_errors=True)
            raise

    def _delete(self, unwanted: list[int]) -> None:
        for step in unwanted:
            manifest_of(self.folder, step).unlink()  # first, so that a half-deleted step does not count
            self.manager.delete(step)
        shutil.rmtree(self.folder / TRASH, ignore_errors=True)

    def steps(self) -> list[int]:
        return steps(self.folder)

    def progress(self, step: int) -> dict[str, Any]:
        return self.manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

    def restore(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, progress) of the newest undamaged checkpoint, or None if there is none yet.

        The first process chooses for all: others may not see yet, or no longer, what it sees on a shared disk.
        """
        step = mesh_lib.from_first(self._newest)
        if step is None:
            return None
        if self.progress(step).get("made_of") != self.made_of:
            raise UserError(
                "was made by another run: use another run_dir, or move the checkpoints away",
                file=self.folder / str(step),
            )
        state, progress = _read(self.manager, step, abstract)
        mesh_lib.from_first(lambda: self._delete([s for s in self.steps() if s > step]))
        return step, state, progress

    def _newest(self) -> int | None:
        """The newest step that is not damaged; None if there is none at all."""
        found = self.steps()
        for step in reversed(found):
            if not (file := damaged(self.folder, step)):
                return step
            log(f"checkpoint {step} is damaged ({file}); falling back to the one before")
        if found:
            raise UserError("every checkpoint is damaged: delete the folder to start again", file=self.folder)
        return None

    def close(self) -> None:
        self.manager.close()


def _read(manager: ocp.CheckpointManager, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
    out = manager.restore(step, args=args)
    out["progress"].pop("made_of", None)
    return out["state"], out["progress"]


# ---------------------------------------------------------------------------------------------------
# After training
# ---------------------------------------------------------------------------------------------------


class Final(Output):
    """The output of training: its last checkpoint."""

    def exists(self, folder: Path) -> bool:
        return bool(steps(folder / self.name))

    def identity(self, folder: Path, checksum: Checksums) -> str:
        root = folder / self.name
        step = steps(root)[-1]
        return f"{step} {sha256(manifest_of(root, step))}"

    def state(self, folder: Path, recorded: str, checksum: Checksums) -> State:
        """No older checkpoint takes the place of the final one unless the user deletes that."""
        root, step = folder / self.name, final_step(recorded)
        found = steps(root)
        if step not in found:
            return "missing"
        older = [s for s in found if s < step and not damaged(root, s, checksum)]
        if older:
            again = f"to train again from checkpoint {older[-1]}, delete {root / str(step)} and run the stage `train`"
        else:
            again = f"to train again from the beginning, delete {root} and run the stage `train`"
        if file := damaged(root, step, checksum):
            raise UserError(f"damaged ({file}), and it is what training ended with: {again}", file=root / str(step))
        if self.identity(folder, checksum) != recorded:
            raise UserError(f"is not what training ended with here: put that back; {again}", file=root)
        return "intact"


def final_step(recorded: str) -> int:
    """The step in a recorded identity of `Final`."""
    return int(recorded.split()[0])


def load(folder: Path, step: int, abstract: Any) -> Any:
    """The state of a step; the folder is only read."""
    # Not by a CheckpointManager: one that is read-only warns that it is.
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute() / str(step) / "state", abstract)
