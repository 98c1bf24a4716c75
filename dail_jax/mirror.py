"""A run directory on an object store: work goes on in a folder of this machine, and what is finished is sent.

A store has no rename, no append and no lock; it writes whole objects, and on request only over a version that the writer
knows. So everything hangs on one object, the index, which lists the run's files. It is replaced last, and only if it is
still the one that this process wrote before: the files that it lists are what the folder held at one moment between two
steps of the work, as if the process had been killed there. `sync` is called at such moments: when a stage begins and
ends, with every checkpoint, and while samples are drawn every few seconds.

Every file has an object under its own name. Journals, which grow, are sent in parts. Small descriptions such as run.json
are part of the index, and their objects copies for people to read. Other objects may be newer than the index, after a
kill in the middle: a run directory expects that of its outputs, since it also finds it after a kill here.

A second object names the owner, who renews it every few seconds. One that has not been renewed for LEASE seconds is
taken over; its process, should it wake up, can no longer replace the index.

Of several processes the first is the owner, and alone replaces the index. Each machine has a folder of its own, and the
store stands for the disk that they do not share: after `share`, all folders hold what any of them held.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import provenance, storage, strict_json
from dail_jax.errors import Interrupted, UserError, writing
from dail_jax.metrics import log

SCRATCH = "DAIL_JAX_SCRATCH"
SECONDS = 10.0  # between two syncs while samples are drawn: what a failure of the machine may lose
BEAT, LEASE = 5.0, 30.0  # seconds between renewals, and after which an owner who does not renew is taken for dead

OURS = ".dail"  # the folder on the store for what is not a file of the run
INDEX, OWNER, PARTS = f"{OURS}/index.json", f"{OURS}/owner.json", f"{OURS}/parts"
TAIL = 4096  # bytes by which a journal is known to go on
MOST_PARTS = 64  # of one journal, before they are joined
SMALL = 64 << 10  # bytes of a description that the index holds itself

# Not sent: locks and what is half written; caches of this machine's files.
LEFT_HERE = re.compile(
    r"(.*/)?(\.lock|\.checksums\.json|\.[^/]*\.(tmp(/.*)?|mark)|[^/]*\.orbax-checkpoint-tmp[^/]*/.*"
    r"|(checkpoints|pretrain)/trash/.*|wandb/([^/]*run-.*|debug.*))"
)
# Gigabytes that can be computed again: sent only once they are complete, and to machines that need each other's.
REFERENCES = re.compile(r"(.*/)?references/(\w+(\.\d+)?\.bin|manifest\.json)")
GROWING = re.compile(r"(.*/)?([\w-]+\.partial|metrics)\.jsonl")
DESCRIPTION = re.compile(r".*\.(json|yaml)")

Mark = tuple[int, int, int]  # inode, size and time of a file: what a write changes


@dataclass
class Sent:
    """A file as the store has it: as the index lists it, and as it was here then."""

    entry: dict[str, Any]
    mark: Mark | None
    tail: bytes = b""  # of a journal: the last bytes that were sent


class Lease:
    """The object that says who works on a run directory. A thread renews it."""

    def __init__(self, url: str, place: str):
        self.url, self.place = f"{url}/{OWNER}", place
        self.token, self.count = uuid.uuid4().hex, 0
        self.version: storage.Version | None = None
        self.lost, self.ended = False, threading.Event()
        self.renewal, self.renewed = threading.Lock(), -math.inf

    def take(self) -> None:
        """Becomes the owner; raises UserError if there is another who is alive."""
        found = storage.current(self.url)
        if found is not None and not self._is_free(found[0]):
            log(f"{self.url}: {_named(found[0])} had this run directory; seeing whether it is alive")
            deadline = time.monotonic() + LEASE
            while time.monotonic() < deadline:
                time.sleep(min(1.0, BEAT / 2))
                now = storage.current(self.url)
                if now is None or now[1] != found[1]:
                    self.refuse()
        self.version = found and found[1]
        if not self._renew():
            self.refuse()
        threading.Thread(target=self._keep, daemon=True).start()

    def _is_free(self, data: bytes) -> bool:
        """Whether an owner has left, or worked where this process now holds the lock."""
        owner = _owner(data)
        return bool(owner.get("released")) or owner.get("place") == self.place

    def refuse(self) -> NoReturn:
        """Raises the UserError that names the owner."""
        found = storage.current(self.url)
        who = _named(found[0]) if found else "another process"
        where = self.url.removesuffix(f"/{OWNER}")
        raise UserError(f"in use by {who}: wait for it, or choose another run_dir", file=where)

    def _renew(self, released: bool = False) -> bool:
        with self.renewal:
            self.count += 1
            owner = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "place": self.place}
            owner["count"] = self.count
            data = json.dumps({**owner, "released": released}).encode()
            version = storage.replace(self.url, data, self.version)
            self.version, self.renewed = version or self.version, time.monotonic()
            return version is not None

    def hold(self) -> None:
        """Raises UserError unless this process still is the owner: it may have been asleep for longer than it knows."""
        if self.lost or (time.monotonic() > self.renewed + 1 and not self._renew()):
            self.lost = True
            self.refuse()

    def _keep(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(UserError):  # the store fails: tried again, and `sync` would say so
                if not self._renew():
                    self.lost = True
                    return

    def release(self) -> None:
        """Lets others have the run directory at once; does nothing in a process that never was the owner."""
        self.ended.set()
        if self.version is not None and not self.lost:
            with contextlib.suppress(UserError):  # then it ends by itself
                self._renew(released=True)


class Mirror:
    """A folder here and the same on a store.

    Of the processes that share the folder, one `leads` and does the work. `apart` says that there are other folders, too.
    """

    def __init__(self, url: str, folder: Path, place: str, leads: bool = True, apart: bool = False):
        self.url, self.folder, self.leads, self.apart = url, folder, leads, apart
        self.lease = Lease(url, place)
        self.sent: dict[str, Sent] = {}
        self.version: storage.Version | None = None  # of the index
        self.number, self.synced = 0, time.monotonic()
        self.busy = False
        self.status: int | None = None  # the exit status that a signal during `sync` asked for
        self.failure: UserError | None = None  # of a `sync` that the other processes knew nothing of

    def bring(self) -> None:
        """Makes the folder what the index says; what is there already is not fetched again."""
        found = storage.current(f"{self.url}/{INDEX}")
        entries: dict[str, Any] = {}
        if found is not None:
            self.version = found[1]
            content = strict_json.parse(found[0], f"{self.url}/{INDEX}", own=True)
            entries = strict_json.as_object(content, INDEX)["files"]
        for path in entries:
            if not storage.is_known(f"{self.url}/{path}"):
                raise UserError(f"damaged: it names the file {path!r:.80}", file=f"{self.url}/{INDEX}")
        self.folder.mkdir(parents=True, exist_ok=True)
        files = self._files(shared=True)
        for path in files.keys() - entries.keys():
            (self.folder / path).unlink(missing_ok=True)
        self.sent = {
            path: self.sent[path]
            for path in entries.keys() & self.sent.keys()
            if self.sent[path].entry == entries[path] and self.sent[path].mark == files.get(path)
        }
        self._receive({path: entry for path, entry in entries.items() if path not in self.sent})

    def _receive(self, entries: dict[str, Any]) -> None:
        """Brings these files."""
        there = {one.url.removeprefix(f"{self.url}/"): one for one in storage.listing(self.url)} if entries else {}
        for path, entry in entries.items():
            if REFERENCES.fullmatch(path) and not self.apart:  # of no use here: the next `share` deletes them
                self.sent[path] = Sent(entry, None)
            elif "parts" not in entry and path not in there:  # deleted there
                (self.folder / path).unlink(missing_ok=True)
            else:
                same = self._fetch(path, entry, there)
                self.sent[path] = Sent(entry, _mark(self.folder / path) if same else None, self._tail(path))

    def _fetch(self, path: str, entry: dict[str, Any], there: dict[str, storage.Object]) -> bool:
        """Brings one file; returns whether it is as the index says, and not newer."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with writing(target):
            if "text" in entry:
                target.write_text(entry["text"], encoding="utf-8")
            elif "parts" in entry:
                with open(target, "wb") as file:
                    for name, size in entry["parts"]:
                        part = there.get(f"{PARTS}/{name}")
                        if part is None or part.size != size:
                            raise UserError("a part of a journal is gone", file=f"{self.url}/{PARTS}/{name}")
                        part.copy_to(file)
            else:
                one = there[path]
                same = one.version == entry["version"]
                if same and target.is_file() and provenance.sha256(target) == entry["sha256"]:
                    return True
                with open(target, "wb") as file:
                    one.copy_to(file)
                if same and entry["sha256"] and provenance.sha256(target) != entry["sha256"]:
                    raise UserError("damaged: it is not what was sent", file=one.url)
                return same
        return True

    def sync(self) -> None:
        """Sends what is new and then the index; raises UserError if that fails, or if the run has another owner."""
        with self._uninterrupted():
            self._sync({}, shared=False)

    def offer(self) -> dict[str, Any]:
        """Sends what is new here, of a process that is not the first; returns its entries for the index."""
        new = self._new(self._files(shared=True))
        made = {path: one for path, one in self._send_all(new).items() if one is not None}
        self.sent |= made
        return {path: one.entry for path, one in made.items()}

    def accept(self, entries: dict[str, Any]) -> None:
        """Brings what the other processes have sent, and sends what is new here and then the index, with all of that."""
        with self._uninterrupted():
            self._receive(entries)
            self._sync(entries, shared=True)

    @contextlib.contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """A block that goes on to its end before a signal ends the process."""
        self.busy = True
        try:
            if self.failure is not None:
                raise self.failure
            yield
        finally:
            self.busy = False
            if self.status is not None:
                self.lease.release()
                os._exit(self.status)
        self.synced = time.monotonic()

    def _sync(self, accepted: dict[str, Any], shared: bool) -> None:
        files = self._files(shared)
        new = self._new(files)
        kept = {path for path in self.sent if REFERENCES.fullmatch(path) and not shared}
        gone = [path for path in self.sent if path not in files and path not in kept]
        if new or gone or accepted:
            self.lease.hold()
            now: dict[str, Sent | None] = {**self.sent, **self._send_all(new)}
            sent = {path: one for path in [*files, *kept] if (one := now[path]) is not None}
            self.number += 1
            content = {"files": {path: one.entry for path, one in sent.items()}}
            data = json.dumps({**content, "by": self.lease.token, "number": self.number}).encode()
            version = storage.replace(f"{self.url}/{INDEX}", data, self.version)
            if version is None:
                self.lease.refuse()
            joined = _parts(self.sent) - _parts(sent)
            self.sent, self.version = sent, version
            with contextlib.suppress(UserError):  # nothing reads it
                storage.delete([f"{self.url}/{path}" for path in gone])
                storage.delete([f"{self.url}/{PARTS}/{name}" for name in joined])

    def _new(self, files: dict[str, Mark]) -> dict[str, Mark]:
        """Those of the files that the store does not have as they are here."""
        return {path: mark for path, mark in files.items() if path not in self.sent or self.sent[path].mark != mark}

    def _send_all(self, new: dict[str, Mark]) -> dict[str, Sent | None]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return dict(zip(new, pool.map(lambda path: self._send(path, new[path]), new), strict=True))

    def _send(self, path: str, mark: Mark) -> Sent | None:
        """Sends one file, of a journal what is new; None if it is gone."""
        file, url, old = self.folder / path, f"{self.url}/{path}", self.sent.get(path)
        if GROWING.fullmatch(path):
            parts = list(old.entry["parts"]) if old and len(old.entry["parts"]) < MOST_PARTS else []
            start = sum(size for _, size in parts)
            with open(file, "rb") as journal:
                if old and parts:  # does the file go on, or has it been written anew?
                    journal.seek(start - len(old.tail))
                    if start > mark[1] or journal.read(len(old.tail)) != old.tail:
                        parts, start = [], 0
                journal.seek(start)
                data = journal.read(mark[1] - start)
            if data:
                name = f"{path}/{start:012d}-{uuid.uuid4().hex[:8]}"
                storage.put(f"{self.url}/{PARTS}/{name}", data)
                parts.append([name, len(data)])
            tail = ((old.tail if old and start else b"") + data)[-TAIL:]
            return Sent({"parts": parts}, mark, tail)
        if mark[1] <= SMALL and DESCRIPTION.fullmatch(path):
            text = file.read_text(encoding="utf-8")
            storage.put(url, text.encode())
            return Sent({"text": text}, mark)
        try:
            found = provenance.sha256(file)
        except FileNotFoundError:
            return None
        entry = {"sha256": found, "version": storage.put(url, file)}
        if _mark(file) != mark:  # something writes to it, such as TensorBoard's thread
            return Sent({**entry, "sha256": ""}, None)
        return Sent(entry, mark)

    def _tail(self, path: str) -> bytes:
        if not GROWING.fullmatch(path):
            return b""
        with open(self.folder / path, "rb") as journal:
            journal.seek(max(0, os.fstat(journal.fileno()).st_size - TAIL))
            return journal.read()

    def _files(self, shared: bool = False) -> dict[str, Mark]:
        """The files here that belong on the store; with references if those of several machines are `shared`."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            left = LEFT_HERE.fullmatch(name) or (REFERENCES.fullmatch(name) and not (shared and self.apart))
            if not left and path.is_file() and (mark := _mark(path)):
                found[name] = mark
        return found


_open: Mirror | None = None


def sync(least: float = 0.0) -> None:
    """Sends what is new, if the run directory is on a store and the last time was `least` seconds ago.

    To be called in the first process, where a kill would leave the run directory as it should be. Raises UserError.
    """
    if _open is not None and time.monotonic() >= _open.synced + least:
        _open.sync()


def sync_alone(least: float) -> None:
    """`sync` where the other processes are at work: they hear of a failure when they ask whether to stop, and then stop.

    A single process raises UserError at once.
    """
    try:
        if not failed():
            sync(least)
    except UserError as error:
        if _open is None or jax.process_count() == 1:
            raise
        _open.failure = error


def failed() -> bool:
    """Whether `sync_alone` has failed in this process; the next `sync` raises it."""
    return _open is not None and _open.failure is not None


def is_apart() -> bool:
    """Whether the run directory is on a store, and processes work in folders that others do not see."""
    return _open is not None and _open.apart


def share() -> None:
    """All processes: from here on, each sees what any of them has written to the run directory.

    On a shared disk that takes a barrier. On a store, everyone sends what is new, the first process makes it count, and
    the others bring it to their machines.
    """
    mirror = _open
    if mirror is None:
        return mesh_lib.barrier("shared")
    elsewhere = mirror.leads and not mesh_lib.is_first()
    offered = mesh_lib.from_each(lambda: mirror.offer() if elsewhere else {})
    entries = {path: entry for one in offered for path, entry in one.items()}
    mesh_lib.from_first(lambda: mirror.accept(entries))
    mesh_lib.from_each(lambda: mirror.bring() if elsewhere else None)


def leave(status: int) -> None:
    """Ends the process once what is durable here is on the store: what SIGTERM does where nothing has to be saved first.

    In the middle of `sync`, that goes on and then ends the process.
    """
    if _open is not None and _open.busy:
        _open.status = status
        return
    try:
        if _open is not None and mesh_lib.is_first():
            _open.sync()
            _open.lease.release()
    finally:
        os._exit(status)


@contextlib.contextmanager
def opened(config: config_lib.Config) -> Iterator[config_lib.Config]:
    """The configuration with a run directory on this machine, which is sent to the store whenever something is finished.

    All processes enter and leave together. Raises UserError where another run works on it, or the store fails.
    """
    global _open
    url, me = config.run_dir, jax.process_index()
    folder = _place(url)
    sharers = mesh_lib.first_sharers(folder)
    leads = sharers[me] == me
    with contextlib.ExitStack() as stack:
        locks = mesh_lib.from_each(lambda: stack.enter_context(_alone(folder)) if leads else "")
        mirror = Mirror(url, folder, locks[0], leads, apart=any(sharers))
        mesh_lib.from_first(mirror.lease.take)
        stack.callback(mirror.lease.release)
        mesh_lib.from_each(lambda: mirror.bring() if leads else None)
        log(f"{url}: {len(mirror.sent)} files, worked on in {folder}")
        _open = mirror
        try:
            yield config_lib.with_overrides(config, {"run_dir": str(folder)}, "run_dir")
        except Interrupted:
            mesh_lib.from_first(mirror.sync)
            raise
        except BaseException:  # which the other processes may know nothing of
            with contextlib.suppress(UserError):  # what is raised says more
                if mesh_lib.is_first():
                    mirror.sync()
            raise
        else:
            mesh_lib.from_first(mirror.sync)
            log(f"run_dir: everything is in {url}")
        finally:
            _open = None


def _place(url: str) -> Path:
    """Where a run directory is worked on: in a folder of the same name, which tables and pages show."""
    root = os.environ.get(SCRATCH) or Path.home() / ".cache" / "dail_jax" / "runs"
    return Path(root).absolute() / hashlib.sha256(url.encode()).hexdigest()[:12] / url.rpartition("/")[2]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[str]:
    """Refuses a second process of this machine; yields a name for the lock that it holds, unlike that of any other."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        boot, stat = Path("/proc/sys/kernel/random/boot_id"), os.fstat(lock)
        machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
        yield f"{machine} {stat.st_dev} {stat.st_ino}"
    except BlockingIOError:
        raise UserError("another process works here: wait for it, or choose another run_dir", file=folder) from None
    finally:
        os.close(lock)


def _parts(sent: dict[str, Sent]) -> set[str]:
    """The names of all journals' parts."""
    return {name for one in sent.values() for name, _ in one.entry.get("parts", ())}


def _mark(path: Path) -> Mark | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _owner(data: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(data)
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {}


def _named(data: bytes) -> str:
    owner = _owner(data)
    return f"process {owner.get('pid')} of {owner.get('host')}"
