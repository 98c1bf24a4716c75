"""The run directory that all stages share: lock, configuration, provenance, durable writes.

`run.json` says what made the run (versions, XLA flags, devices, seed, source revision) and, for every stage,
the part of the configuration that it was started with, so that a changed configuration is noticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import strict_json
from dail_jax.errors import UserError, writing
from dail_jax.metrics import log

PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "safetensors",
    "math-verify",
    "numpy",
)

# The sections that decide what a stage writes. `mesh` is not among them: other devices give the same traces,
# and losses that agree to rounding.
SECTIONS = {
    "generate": ("seed", "model", "data", "prompts", "generate", "filters"),
    "train": ("seed", "model", "data", "prompts", "waypoints", "filters", "train"),
    "evaluate": ("seed", "model", "prompts", "train", "evaluate"),
    "export": ("train", "export"),
    "pretrain": ("seed", "pretrain"),
}


def write_atomic(path: str | Path, text: str | bytes) -> None:
    """Replaces a file by its new content, whole or not at all, durable on return; raises UserError if it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(text.encode("utf-8") if isinstance(text, str) else text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):  # a full disk should have its space back
                temporary.unlink()
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes renames and new names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_line(row: Any) -> str:
    """One row of our own files: compact, ASCII, a fixed key order (the row's), a final newline."""
    return json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"


class Journal:
    """An append-only JSON-lines file whose rows are durable one by one; the first process writes, all have `rows`.

    Opening it drops a torn last line, which only a crash can leave; a bad line elsewhere is an error.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[dict] = []
        self.file: Any = None
        count = mesh_lib.from_first(self._open)
        if not mesh_lib.is_first() and count:
            self.rows = [line.value for line in itertools.islice(self._lines(), count)]

    def _open(self) -> int:
        size = 0
        if self.path.exists():
            for line in self._lines():
                self.rows.append(line.value)
                size = line.offset + line.size
        with writing(self.path):
            # Unbuffered: a buffer would hold on to what could not be written, and try again when it is closed.
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (held for the journal's life)
            sync_folder(self.path.parent)
            if size != self.file.tell():
                self.file.truncate(size)
                log(f"{self.path}: dropped a torn last line; its work is done again")
        return len(self.rows)

    def _lines(self) -> Iterator[strict_json.Line]:
        advice = "delete the file to make it anew"
        for line in strict_json.read_lines(self.path, own=True, torn="drop", advice=advice):
            strict_json.as_object(line.value, self.path, line.number)
            yield line

    def append(self, *rows: dict) -> None:
        if self.file is not None:
            data = memoryview("".join(map(json_line, rows)).encode("ascii"))
            with writing(self.path):
                while data:
                    data = data[self.file.write(data) :]
                os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def provenance() -> dict[str, Any]:
    """Versions, flags and devices: what a bug report or a reproduction needs."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    try:
        here = Path(__file__).parent
        revision = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    return {
        "python": platform.python_version(),
        "versions": versions,
        "source": revision or "unknown",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


class RunDir:
    """A locked run directory; use it as a context manager."""

    def __init__(self, config: config_lib.Config):
        self.config, self.path = config, Path(config.run_dir)
        self._lock: int | None = None

    def __enter__(self) -> RunDir:
        mesh_lib.from_first(self._acquire)
        return self

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot be used as a run directory: {error.strerror}", file=self.path) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _holder(self._lock)
            os.close(self._lock)
            self._lock = None
            raise UserError(
                f"in use by process {pid}: wait for it, or choose another run_dir", file=self.path
            ) from None
        with writing(self.path / ".lock"):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _manifest(self) -> dict[str, Any]:
        path = self.path / "run.json"
        try:
            return json.loads(path.read_text()) if path.exists() else {"stages": {}}
        except ValueError:
            raise UserError("got a damaged file, want JSON", file=path) from None

    def finished(self, name: str) -> bool:
        """Whether a stage has ended."""
        return mesh_lib.from_first(lambda: "finished" in self._manifest()["stages"].get(name, {}))

    @contextlib.contextmanager
    def stage(
        self, name: str, inputs: dict[str, str] | None = None, scratch: tuple[str, ...] = ()
    ) -> Iterator[Callable[[], bool]]:
        """Begins a stage. Yields `done()`, which is True when an earlier call finished it.

        `inputs` are hashes of the files that the stage reads. Raises UserError where the configuration or an
        input is not what the stage was started with. The stage is marked done when the block ends without error;
        only then are its `scratch` files deleted, so that no kill can cost what they hold.
        """
        finished = mesh_lib.from_first(lambda: self._begin(name, inputs or {}))
        yield lambda: finished
        if mesh_lib.is_first():
            if not finished:
                manifest = self._manifest()
                manifest["stages"][name]["finished"] = _now()
                self._save(manifest)
            for file in scratch:
                (self.path / file).unlink(missing_ok=True)
        mesh_lib.barrier(f"{name} is done")  # what the first process wrote is there for all

    def _begin(self, name: str, inputs: dict[str, str]) -> bool:
        """Writes down what a stage is started with, and returns whether it is finished already."""
        tree = self.config.model_dump(mode="json")
        wanted = {"config": {s: tree[s] for s in SECTIONS[name]}, "inputs": inputs}
        manifest = self._manifest()
        record = manifest["stages"].get(name)
        if record is not None:
            changes = _differences({k: record[k] for k in wanted}, wanted)
            if changes:
                raise UserError(
                    f"stage {name!r} was started with another configuration: {'; '.join(changes[:5])}. "
                    "Use another run_dir, or delete this one",
                    file=self.path,
                )
            if "finished" in record:
                return True
        now = provenance()
        place = {key: now[key] for key in ("platform", "device_kind", "devices", "xla_flags")}
        if record is not None and record.get("place") != place:
            changes = "; ".join(_differences(record.get("place"), place))
            log(f"{name}: resumed elsewhere ({changes}): results agree to rounding, not bit for bit")
        manifest["stages"][name] = {**wanted, "place": place, "started": _now()}
        manifest.update(seed=self.config.seed, **now)
        self._save(manifest)
        return False

    def _save(self, manifest: dict[str, Any]) -> None:
        write_atomic(self.path / "run.json", json.dumps(manifest, indent=1) + "\n")
        write_atomic(self.path / "config.yaml", config_lib.dump(self.config))


def _holder(lock: int) -> str:
    """The process that holds a lock. It may just have got it, and not have written its number over a former one's."""
    pid = ""
    for _ in range(50):
        pid = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        try:
            os.kill(int(pid), 0)  # no signal: is it alive?
            break
        except PermissionError:  # it is, and another user's
            break
        except (ValueError, OverflowError, ProcessLookupError):
            time.sleep(0.02)
    return pid or "unknown"  # on another machine nobody can tell


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `key: old -> new` for two nested values, long ones cut."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path.removeprefix('config.')}: {_cut(old)} -> {_cut(new)}"]


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Interrupt:
    """SIGTERM and SIGINT as a wish to stop soon: check `wanted` where work can be put down safely.

    The processes agree on the wish, so all of them must look at `wanted` equally often.
    """

    def __enter__(self) -> Interrupt:
        self._wanted = False
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: object) -> None:
        if self._wanted and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        self._wanted = True

    @property
    def wanted(self) -> bool:
        return mesh_lib.any_process(self._wanted)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """A stage was asked to stop, and has saved its work: the command ends with exit status 0."""
