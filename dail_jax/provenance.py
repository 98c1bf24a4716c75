"""What made an output: versions and devices, the settings that decided it, and the contents of what was read.

Contents are compared by SHA-256, never by path or time: a model that was moved is the same model, and one that was
replaced behind its path is not. Gigabytes of weights are read for it once a run directory: the digest of a large file
is kept with the file's size, inode and both of its times, any of which a write changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from dail_jax import config as config_lib
from dail_jax.errors import UserError

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
    "sentencepiece",
    "safetensors",
    "math-verify",
    "numpy",
)

# Those whose versions decide more than rounding: token ids, the order of batches, the update rule. Work that was begun
# with one is not continued with another.
DECISIVE = ("transformers", "tokenizers", "sentencepiece", "grain", "optax")

LARGE = 64 << 20  # bytes: the digest of a smaller file is computed every time
SETTLED = 2_000_000_000  # ns: a file that changed more recently could change again within one tick of its times


def instruction_set() -> str:
    """A name for what this machine's CPU can run: programs that are compiled for one may crash another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """The versions of packages; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """Versions, flags and devices: what a bug report or a reproduction needs."""
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
        "versions": {name: version for name, version in versions(PACKAGES).items() if version},
        "source": revision or "unknown",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


# ---------------------------------------------------------------------------------------------------
# Digests
# ---------------------------------------------------------------------------------------------------


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


_HERE: dict[str, list[Any]] = {}  # what this process has read, for all its run directories


class Checksums:
    """`sha256` with a memory for large files, which callers keep in `known` from one process to the next."""

    def __init__(self, known: Mapping[str, Sequence[Any]] | None = None):
        self.known: dict[str, list[Any]] = {path: list(entry) for path, entry in (known or {}).items()}

    def __call__(self, path: str | Path) -> str:
        before = os.stat(path)
        if before.st_size < LARGE:
            return sha256(path)
        key = [before.st_size, before.st_ino, before.st_mtime_ns, before.st_ctime_ns]
        name = os.path.realpath(path)
        entry = next((e for e in (self.known.get(name), _HERE.get(name)) if e and e[:-1] == key), None)
        if entry is None:
            entry = [*key, sha256(path)]
            if time.time_ns() - max(key[2:]) < SETTLED:
                return entry[-1]
        self.known[name] = _HERE[name] = entry
        return entry[-1]


# ---------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------

State = Literal["intact", "stale", "missing"]


@dataclass(frozen=True)
class Output:
    """Something that a stage writes: a path in the run directory, or an absolute one."""

    name: str
    derived: bool = False  # follows from the stage's other outputs

    def exists(self, folder: Path) -> bool:
        """Whether there is anything of it."""
        return (folder / self.name).exists()

    def identity(self, folder: Path, checksum: Checksums) -> str:
        """What is recorded when the stage ends."""
        raise NotImplementedError

    def state(self, folder: Path, recorded: str, checksum: Checksums) -> State:
        """How the output is now: `stale` where it can be made again at no cost.

        Raises UserError where something else is in its place.
        """
        raise NotImplementedError


class File(Output):
    """An output that is one file."""

    def identity(self, folder: Path, checksum: Checksums) -> str:
        return checksum(folder / self.name)

    def state(self, folder: Path, recorded: str, checksum: Checksums) -> State:
        if not self.exists(folder):
            return "missing"
        if checksum(folder / self.name) == recorded:
            return "intact"
        if self.derived:
            return "stale"
        raise UserError(
            "is not what was written here, by its SHA-256: put that back, or delete the file to make it again",
            file=folder / self.name,
        )


class Drawn(File):
    """A file of rows that were drawn, with verdicts on them: what was drawn must not change, verdicts can be made again."""

    def drawn(self, path: Path) -> Iterable[Any]:
        """The rows as JSON values, without the verdicts."""
        raise NotImplementedError

    def identity(self, folder: Path, checksum: Checksums) -> str:
        return f"{self._digest(folder / self.name)} {checksum(folder / self.name)}"

    def state(self, folder: Path, recorded: str, checksum: Checksums) -> State:
        path = folder / self.name
        if not path.exists():
            return "missing"
        drawn, whole = recorded.split()
        if checksum(path) == whole:
            return "intact"
        if self._digest(path) == drawn:
            return "stale"
        raise UserError("is not what was drawn here: put that back, or delete the file to draw it again", file=path)

    def _digest(self, path: Path) -> str:
        total = hashlib.sha256()
        for row in self.drawn(path):
            total.update(digest(row).encode())
        return total.hexdigest()


@dataclass(frozen=True)
class Input:
    """Something that a stage reads: where it lies, and how the digest of its contents is computed.

    (In records, an input without a path is an earlier stage.)
    """

    path: str
    read: Callable[[Checksums], str]


@dataclass(frozen=True)
class Recipe:
    """What decides the outputs of a stage, and what these are."""

    stage: str
    settings: dict[str, Any]  # sections and keys of the configuration, without paths
    inputs: dict[str, Input]  # by the key of the configuration that names them
    outputs: tuple[Output, ...]
    partial: tuple[str, ...] = ()  # patterns of the files that hold unfinished work
    scratch: tuple[str, ...] = ()  # files and folders to delete when the stage has ended
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings of derived outputs alone
    after: tuple[Recipe, ...] = ()  # the stages whose outputs this one reads

    def made_of(self, checksum: Checksums, lenient: bool = False) -> dict[str, Any]:
        """Settings and digests as they are recorded. `lenient`: what cannot be read has no digest."""
        inputs = {}
        for name, one in self.inputs.items():
            try:
                found = one.read(checksum)
            except (UserError, OSError):
                if not lenient:
                    raise
                found = None
            inputs[name] = {"path": one.path, "sha256": found}
        return {"settings": self.settings, "inputs": inputs}


def identity(made_of: dict[str, Any]) -> str:
    """One digest for settings and contents, whatever the paths."""
    return digest([made_of["settings"], {name: one["sha256"] for name, one in made_of["inputs"].items()}])


def published(made_of: dict[str, Any]) -> dict[str, Any]:
    """Settings and contents as a folder holds them that others may get: inputs by their names, not where they lay here."""
    inputs = {key: {**one, "path": one["path"] and _name(one["path"])} for key, one in made_of["inputs"].items()}
    return {**made_of, "inputs": inputs}


def hub_name(path: str | Path) -> str | None:
    """A model's name on a hub, if its folder lies in the hub's cache: .../models--OWNER--NAME/snapshots/REVISION."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(Path(path).resolve()))
    return f"{cached[1]}/{cached[2]}" if cached else None


def _name(path: str) -> str:
    """The last part of a path, or of several in words; a name on a hub stays as it is."""
    names = [one if "hub:" in one else one.rstrip("/").rpartition("/")[2] for one in path.split(", ")]
    return hub_name(path) or ", ".join(names)


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two values of `Recipe.made_of`, one text for each setting and input."""
    found = differences(old["settings"], new["settings"])
    for name in dict.fromkeys([*old["inputs"], *new["inputs"]]):
        before, now = old["inputs"].get(name), new["inputs"].get(name)
        if before is None or now is None:
            found.append(f"{name}: {_cut(before and before['path'])} -> {_cut(now and now['path'])}")
        elif now["path"] is None and before["sha256"] != now["sha256"]:
            found.append(f"stage `{name}` has been run again, with another configuration")
        elif before["path"] != now["path"] and before["sha256"] != now["sha256"]:
            found.append(f"{name}: {_cut(before['path'])} -> {_cut(now['path'])}")
        elif now["sha256"] not in (before["sha256"], None):
            found.append(f"{name}: the contents of {_cut(now['path'])} have changed")
    return found


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `key: old -> new` for two nested values, long ones cut."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    return [] if old == new else [f"{path}: {_cut(old)} -> {_cut(new)}"]


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def select(config: config_lib.Config, *keys: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """The nested settings under dotted keys; those `without` are left out, also inside of lists."""
    tree = config.model_dump(mode="json")
    for key in without:
        _remove(tree, key.split("."))
    out: dict[str, Any] = {}
    for key in keys:
        *sections, last = key.split(".")
        source, target = tree, out
        for section in sections:
            source, target = source[section], target.setdefault(section, {})
        target[last] = source[last]
    return out


def _remove(node: Any, parts: Sequence[str]) -> None:
    if isinstance(node, list):
        for one in node:
            _remove(one, parts)
    elif isinstance(node, dict) and parts[0] in node:
        if len(parts) == 1:
            del node[parts[0]]
        else:
            _remove(node[parts[0]], parts[1:])
