"""The run directory that all stages share: lock, configuration, provenance, durable writes.

`run.json` records the environment (versions, XLA flags, devices, seed, source revision) and, for every stage, what it read
and what it wrote: the settings and the contents of inputs that determine its outputs, and the digests of the outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import mirror, provenance, shapes, storage, strict_json
from dail_jax.errors import UserError, writing
from dail_jax.metrics import log
from dail_jax.provenance import Recipe

CHECKSUMS = ".checksums.json"

# Between two calls of fsync for a journal: on a network's file system, each takes as long as many samples.
SYNC_SECONDS = 1.0


APART = (
    "not all processes see what the first one writes here: want a file system that all hosts share, or an object store "
    "such as gs://bucket/run"
)


def refuse_apart(folder: Path) -> None:
    """Raises UserError, in all processes, if they do not share a run directory."""
    if any(mesh_lib.first_sharers(folder)):
        raise UserError(APART, file=folder, field="run_dir")


def write_atomic(path: str | Path, text: str | bytes) -> None:
    """Replaces a file, atomically and durably; raises UserError if it cannot be written."""
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
            with contextlib.suppress(OSError):  # gives a full disk its space back
                temporary.unlink()
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes new files in a folder, and renames, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_line(row: Any) -> str:
    """One row of our own files: compact, ASCII, keys in the order of the row, ending in a newline."""
    return json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"


class Journal:
    """An append-only JSON-lines file. The first process writes; all of them have `rows`.

    No kill of the process loses a row; a failure of the machine may lose those of the last second (SYNC_SECONDS).

    Opening it drops an incomplete last line, which only a crash can leave. A bad line anywhere else is an error. Without
    a path nothing is kept: for work in memory.
    """

    def __init__(self, path: str | Path | None):
        self.path, self.keeps = Path(path or ""), path is not None
        self.rows: list[dict] = []
        self.file: Any = None
        self.synced = -math.inf
        if not self.keeps:
            return
        count = mesh_lib.from_first(self._open)
        if not mesh_lib.is_first() and count:
            self.rows = [line.value for line in itertools.islice(self._lines(), count)]
        if len(set(mesh_lib.from_all(len(self.rows)))) > 1:
            raise UserError(APART, file=self.path)

    def _open(self) -> int:
        size = 0
        if self.path.exists():
            for line in self._lines():
                self.rows.append(line.value)
                size = line.offset + line.size
        with writing(self.path):
            # Unbuffered: a buffer would keep what could not be written, and try again on close.
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (open as long as the journal)
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
                if time.monotonic() >= self.synced + SYNC_SECONDS:
                    os.fsync(self.file.fileno())
                    self.synced = time.monotonic()
            mirror.sync_alone(mirror.SECONDS)

    def close(self) -> None:
        """Makes all rows durable; nothing is appended afterwards."""
        if self.file is not None:
            with writing(self.path):
                os.fsync(self.file.fileno())
            self.file.close()


# ---------------------------------------------------------------------------------------------------
# run.json
# ---------------------------------------------------------------------------------------------------


class TakenInput(shapes.Shape):
    path: str | None
    sha256: str | None


class Record(shapes.Shape):
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, TakenInput] = Field(default_factory=dict)
    outputs: dict[str, str] = Field(default_factory=dict)
    summary: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str | None] = Field(default_factory=dict)
    place: dict[str, Any] = Field(default_factory=dict)


class Manifest(shapes.Shape):
    versions: dict[str, str | None] = Field(default_factory=dict)
    stages: dict[str, Record]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of run.json; without such a file, there are no stages."""
    path = folder / "run.json"
    if not path.exists():
        return {"stages": {}}
    return shapes.check(strict_json.read_object(path, own=True), Manifest, path)


# ---------------------------------------------------------------------------------------------------
# The directory
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that has begun: the state of its outputs, and what they are made from."""

    states: dict[str, provenance.State]
    made_of: dict[str, Any]
    done: bool

    @property
    def identity(self) -> str:
        """One digest of everything that determines the outputs."""
        return provenance.identity(self.made_of)

    def sha256(self, name: str) -> str:
        """The digest of an input."""
        return self.made_of["inputs"][name]["sha256"]


# Leftovers of `write_atomic` and similar functions whose process was killed, and the folders that may contain them.
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
WRITTEN = (".", "plots", "checkpoints/manifests", "pretrain/manifests")


class RunDir:
    """A locked run directory; use it as a context manager."""

    def __init__(self, config: config_lib.Config):
        if storage.is_remote(config.run_dir):  # the command line has one brought here
            raise UserError(f"got {config.run_dir!r}, {storage.LOCAL}", field="run_dir")
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
        for place in WRITTEN:
            for leftover in (self.path / place).glob(".*.tmp"):
                if TEMPORARY.fullmatch(leftover.name):
                    remove(leftover)

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _manifest(self) -> dict[str, Any]:
        return read_manifest(self.path)

    @functools.cached_property
    def checksum(self) -> provenance.Checksums:
        """Digests of files; those of large files are cached in the run directory."""
        try:
            return provenance.Checksums(json.loads((self.path / CHECKSUMS).read_text()))
        except (OSError, ValueError, TypeError, AttributeError):
            return provenance.Checksums()  # computing them again only costs time

    def output(self, stage: str, name: str) -> str:
        """The recorded identity of a finished stage's output."""
        return mesh_lib.from_first(lambda: self._manifest()["stages"][stage]["outputs"][name])

    @contextlib.contextmanager
    def stage(self, recipe: Recipe) -> Iterator[Stage]:
        """Begins a stage; the result is `done` if an earlier call finished it and its outputs are intact.

        If the configuration or an input differs from what the stage was started with, and anything has been written
        since, a UserError names the difference. The same goes for an earlier stage whose outputs this one reads, if they
        were made with another configuration or are not intact. The stage is marked as finished when the block ends
        without error, and only then is its scratch deleted, so that a kill at any moment loses nothing.
        """
        stage = Stage(**mesh_lib.from_first(lambda: self._begin(recipe)))
        yield stage
        if mesh_lib.is_first():
            if not stage.done:
                self._record(recipe, {"finished": _now()})
            for name in recipe.scratch:
                remove(self.path / name)
        mirror.share()

    @contextlib.contextmanager
    def amend(self, recipe: Recipe) -> Iterator[dict[str, provenance.State]]:
        """A block that makes the derived outputs of a finished stage again; for the first process only.

        Yields the states of the stage's outputs; none if the stage was not run in this directory.
        """
        manifest = self._manifest()
        known = recipe.stage in manifest["stages"]
        yield self._states(recipe, self._agreeing(manifest, recipe)) if known else {}
        if known:
            self._record(recipe, {"summary": recipe.summary})

    def _begin(self, recipe: Recipe) -> dict[str, Any]:
        """Records what a stage is started with; returns the fields of its Stage."""
        manifest = self._manifest()
        earlier = [(one, self._agreeing(manifest, one)) for one in recipe.after]
        made_of = recipe.made_of(self.checksum)
        for one, record in earlier:
            made_of["inputs"][one.stage] = {"path": None, "sha256": provenance.identity(record)}
        self._save_checksums()
        record = self._continued(recipe, manifest["stages"].get(recipe.stage), made_of)
        states = self._states(recipe, record)
        fields = {"states": states, "made_of": made_of, "done": False}
        if "finished" in record and all(state == "intact" for state in states.values()):
            return {**fields, "done": True}
        for one, theirs in earlier:
            for name, state in self._states(one, theirs).items():
                if state != "intact":
                    raise UserError(f"{state}: run the stage `{one.stage}` again", file=self.path / name)
        if "finished" in record:
            lost = ", ".join(f"{name} is {state}" for name, state in states.items() if state != "intact")
            log(f"{recipe.stage}: done before, but {lost}; made again")
        now = provenance.environment()
        place = {key: now[key] for key in ("platform", "device_kind", "devices", "xla_flags")}
        place |= {name: now["versions"].get(name) for name in ("jax", "jaxlib")}
        if self._work(recipe, {}) and record:
            self._refuse_versions(recipe, record)
            if record.get("place", {}) != place:
                moved = "; ".join(provenance.differences(record.get("place", {}), place))
                log(f"{recipe.stage}: resumed elsewhere ({moved}): results agree to rounding, not bit for bit")
        kept = {name: found for name, found in record.get("outputs", {}).items() if states.get(name) != "missing"}
        manifest["stages"][recipe.stage] = {
            **made_of,
            "summary": recipe.summary,
            "versions": provenance.versions(provenance.DECISIVE),
            "place": place,
            "started": _now(),
            "outputs": kept,
        }
        manifest.update(seed=self.config.seed, **now)
        self._save(manifest)
        mirror.sync()
        return fields

    def progress(self, recipe: Recipe) -> Literal["done", "begun", "to do"]:
        """How far a stage has come, as far as can be told without its weights and without looking into its outputs.

        Raises the UserError with which the stage would refuse to start, and changes nothing.
        """
        manifest = self._manifest()
        cheap = {name: one for name, one in recipe.inputs.items() if name != "model.path"}
        made_of = dataclasses.replace(recipe, inputs=cheap).made_of(provenance.Checksums(), lenient=True)
        record = manifest["stages"].get(recipe.stage)
        if record is not None and "inputs" in record:
            record = {**record, "inputs": {name: one for name, one in record["inputs"].items() if name in cheap}}
        record = self._continued(recipe, record, made_of)
        current = record.get("summary", {}) == recipe.summary
        if "finished" in record and current and all(output.exists(self.path) for output in recipe.outputs):
            return "done"
        if not self._work(recipe, {}):
            return "to do"
        self._refuse_versions(recipe, record)
        return "begun"

    def _continued(self, recipe: Recipe, record: dict[str, Any] | None, made_of: dict[str, Any]) -> dict[str, Any]:
        """The record of an earlier start, if the stage continues that; {} if it starts anew.

        Raises UserError if there is work that this configuration would be mixed with.
        """
        changed = _changes(record, made_of)
        if record is None or changed:
            self._refuse_work(recipe, record or {}, changed)
            return {}
        return record

    def _agreeing(self, manifest: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
        """The record of a finished stage.

        Raises UserError if it is not finished, or if it or a stage before it was run with another configuration.
        """
        record = manifest["stages"].get(recipe.stage, {})
        if "finished" not in record:
            raise UserError(
                f"not finished: run the stage `{recipe.stage}` first", file=self.path / recipe.outputs[0].name
            )
        for earlier in recipe.after:
            self._agreeing(manifest, earlier)
        now = recipe.made_of(self.checksum, lenient=True)
        then = {
            "settings": {key: record.get("settings", {}).get(key) for key in now["settings"]},
            "inputs": {key: one for key, one in record.get("inputs", {}).items() if one["path"] is not None},
        }
        if changed := provenance.changes(then, now):
            raise UserError(
                f"stage `{recipe.stage}` was run with another configuration: {'; '.join(changed[:5])}. "
                "Use that one, or another run_dir",
                file=self.path,
            )
        return record

    def _states(self, recipe: Recipe, record: dict[str, Any]) -> dict[str, provenance.State]:
        """The state of each output, by name."""
        recorded, states = record.get("outputs", {}), {}
        for output in recipe.outputs:
            known = output.name in recorded
            state = output.state(self.path, recorded[output.name], self.checksum) if known else "missing"
            outdated = output.derived and record.get("summary", {}) != recipe.summary
            states[output.name] = "stale" if outdated and state == "intact" else state
        return states

    def _work(self, recipe: Recipe, record: dict[str, Any]) -> list[str]:
        """The names of existing outputs, and of files with unfinished work."""
        made = [output.name for output in recipe.outputs if output.exists(self.path)]
        made += [name for name in record.get("outputs", {}) if name not in made and (self.path / name).exists()]
        begun = [
            str(path.relative_to(self.path))
            for pattern in recipe.partial
            for path in sorted(self.path.glob(pattern))
            if path.is_file() and path.stat().st_size
        ]
        return [*made, *begun]

    def _refuse_work(self, recipe: Recipe, record: dict[str, Any], changed: list[str]) -> None:
        """Raises UserError if there is work that another configuration began."""
        if not (work := self._work(recipe, record)):
            return
        names = ", ".join(work[:3])
        if not changed:
            raise UserError(
                f"already exists, and no stage `{recipe.stage}` of {self.path} is on record as having made it: "
                "use another run_dir, or move it away",
                file=self.path / work[0],
            )
        raise UserError(
            f"stage `{recipe.stage}` was started with another configuration: {'; '.join(changed[:5])}. "
            f"Use another run_dir, or delete {names} to start the stage anew",
            file=self.path,
        )

    def _refuse_versions(self, recipe: Recipe, record: dict[str, Any]) -> None:
        if changed := provenance.differences(record.get("versions", {}), provenance.versions(provenance.DECISIVE)):
            raise UserError(
                f"stage `{recipe.stage}` was started with other packages, which decide its results: "
                f"{'; '.join(changed)}. Install those, or use another run_dir",
                file=self.path,
            )

    def _record(self, recipe: Recipe, more: dict[str, Any]) -> None:
        """Records the identities of a stage's outputs, and `more`."""
        manifest = self._manifest()
        outputs = {output.name: output.identity(self.path, self.checksum) for output in recipe.outputs}
        manifest["stages"][recipe.stage] |= {"outputs": outputs, **more}
        self._save_checksums()
        self._save(manifest)

    def _save(self, manifest: dict[str, Any]) -> None:
        write_atomic(self.path / "run.json", json.dumps(manifest, indent=1) + "\n")
        write_atomic(self.path / "config.yaml", config_lib.dump(self.config))

    def _save_checksums(self) -> None:
        if self.checksum.known:
            write_atomic(self.path / CHECKSUMS, json.dumps(self.checksum.known) + "\n")


def _changes(record: dict[str, Any] | None, made_of: dict[str, Any]) -> list[str]:
    if record is None:
        return []
    if not record.keys() >= {"settings", "inputs"}:
        return ["its record is another version's"]
    return provenance.changes(record, made_of)


def remove(path: Path) -> None:
    """Deletes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _holder(lock: int) -> str:
    """The id of the process that holds a lock. The file may name an earlier holder until the new one has written its own."""
    pid = ""
    for _ in range(50):
        pid = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        try:
            os.kill(int(pid), 0)  # sends no signal, but fails if there is no such process
            break
        except PermissionError:  # it exists, and belongs to another user
            break
        except (ValueError, OverflowError, ProcessLookupError):
            time.sleep(0.02)
    return pid or "unknown"  # it may run on another machine


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Interrupt:
    """Turns SIGTERM and SIGINT into a request to stop soon: check `wanted` wherever it is safe to stop.

    All processes must read `wanted` equally often, since they agree on its value. Work that is not kept has nothing to
    save (`keeps` is false), and signals then do what they always do.
    """

    def __init__(self, keeps: bool = True):
        self.keeps = keeps

    def __enter__(self) -> Interrupt:
        self._wanted = False
        self._old = {}
        if self.keeps and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: object) -> None:
        if self._wanted and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second request
        self._wanted = True

    @property
    def wanted(self) -> bool:
        return mesh_lib.any_process(self._wanted or mirror.failed())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
