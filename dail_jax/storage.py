"""Object stores: what a URL such as `gs://bucket/model` names, as a path on this machine.

A URL may stand wherever a configuration names something to read. `file`, `folder` and `model` turn it into a path, and
leave any other path as it is. What they fetch is kept under DAIL_JAX_CACHE (by default ~/.cache/dail_jax) with the
version that the store gave it and a SHA-256, and is fetched anew where either differs. A model's weights are not
fetched: `objects` lists what was left on the store, whose bytes are read in ranges.

The stores are those of the package obstore, which finds credentials in the environment or asks the machine that it runs
on, and repeats what failed after growing pauses.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from dail_jax.errors import UserError, writing

CACHE = "DAIL_JAX_CACHE"
LOCAL = "want a path on this machine, where it is written"
WANTED = "want a path on this machine, or a URL such as gs://bucket/name (or s3://, az://)"

# How one logs in, by the scheme of the URL.
LOGINS = {
    "gs": "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS in the environment",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY in the environment",
}
# Signs of a missing login: the address that a virtual machine asks for credentials, and what the stores themselves say.
NO_LOGIN = re.compile(
    r"/latest/(api|meta-data)|/computeMetadata|/metadata/identity|must be specified|InvalidAccessKeyId"
)

RETRY: Any = {
    "max_retries": 6,
    "retry_timeout": datetime.timedelta(seconds=120),
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=200),
        "max_backoff": datetime.timedelta(seconds=15),
        "base": 2,
    },
}

PIECE = 16 << 20  # bytes that are asked for in one request
BLOCK = 8 * PIECE  # ... and that are held in memory while a file is fetched
_PIECES = concurrent.futures.ThreadPoolExecutor(8, "range")

# Of a model's folder, what is fetched: descriptions, the tokenizer, chat templates, manifests.
SMALL = (".json", ".jinja", ".txt", ".model", ".sha256")
TEMPLATES = "additional_chat_templates/"


def is_remote(path: str) -> bool:
    """Whether a path is a URL, of which the file system would make a folder `gs:`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def is_known(url: str) -> bool:
    """Whether a URL is one that can be read: it names a bucket of a known kind of store, and something in it."""
    parts = urlsplit(url)
    names = parts.path.strip("/").split("/")
    return (
        parts.scheme in LOGINS
        and bool(parts.netloc)
        and not parts.query
        and not parts.fragment
        and not {"", ".", ".."} & set(names)
    )


# ---------------------------------------------------------------------------------------------------
# Paths on this machine
# ---------------------------------------------------------------------------------------------------


def file(path: str | Path) -> Path:
    """A file; one on a store is fetched. Raises UserError where that fails."""
    return _fetched(look(path)) if is_remote(str(path)) else Path(path)


def folder(path: str | Path) -> Path:
    """A folder; one on a store is fetched with all that it holds. Raises UserError where that fails."""
    return _folder(str(path).rstrip("/"), False) if is_remote(str(path)) else Path(path)


def model(path: str | Path) -> Path:
    """A model's folder; of one on a store, small files are fetched, and the weights are left there."""
    return _folder(str(path).rstrip("/"), True) if is_remote(str(path)) else Path(path)


def objects(folder: Path) -> dict[str, Object]:
    """By name, what `model` left on the store; nothing of an ordinary folder."""
    return _LEFT.get(folder, {})


_LEFT: dict[Path, dict[str, Object]] = {}


@functools.cache
def _folder(url: str, leaves_weights: bool) -> Path:
    found = {one.url.removeprefix(f"{url}/"): one for one in listing(url) if one.size}  # what is empty marks a folder
    if not found:
        raise UserError("nothing there: want the URL of a folder", file=url)
    small = {n for n in found if n.endswith(SMALL) and ("/" not in n or n.startswith(TEMPLATES))}
    wanted = small if leaves_weights else found.keys()
    root = _place(url)
    for name in sorted(wanted):
        _fetched(found[name])
    for path in root.rglob("*"):  # what is no longer on the store
        if path.is_file() and not path.name.startswith(".") and path.relative_to(root).as_posix() not in found:
            path.unlink(missing_ok=True)
    _LEFT[root] = {name: one for name, one in found.items() if name not in wanted}
    return root


def _fetched(one: Object) -> Path:
    """The local copy of an object: what was fetched before, if that is the same and intact."""
    target = _place(one.url)
    origin = target.with_name(f".{target.name}.origin")
    known: Any = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(origin.read_text())
    if isinstance(known, dict) and known.get("version") == one.version:
        with contextlib.suppress(OSError):
            if _sha256(target) == known.get("sha256"):
                return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as copy:
                one.copy_to(copy)
            entry = {"url": one.url, "version": one.version, "sha256": _sha256(temporary)}
            origin.unlink(missing_ok=True)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        temporary.write_text(json.dumps(entry) + "\n")
        os.replace(temporary, origin)
    return target


def _place(url: str) -> Path:
    """Where the copy of an object or a folder is kept."""
    parts = urlsplit(url)
    root = os.environ.get(CACHE) or Path.home() / ".cache" / "dail_jax"
    return Path(root) / parts.scheme / parts.netloc / parts.path.strip("/")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------
# Objects
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Object:
    """An object as it was when it was looked for; `version` is the store's own mark of its contents (its ETag)."""

    url: str
    size: int
    version: str

    def read(self, start: int, stop: int) -> bytearray:
        """Its bytes [start, stop), and no others; raises UserError if it is gone or has been replaced since."""
        data = bytearray(stop - start)
        pieces = [(at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)]

        def fill(piece: tuple[int, int]) -> None:
            with asking(self.url) as (store, key):
                got = store.get(key, options={"range": piece, "if_match": self.version}).bytes()
            data[piece[0] - start : piece[1] - start] = memoryview(got)

        for _ in _PIECES.map(fill, pieces) if len(pieces) > 1 else map(fill, pieces):
            pass
        return data

    def copy_to(self, file: BinaryIO) -> None:
        """Writes all of it to an open file."""
        for start in range(0, self.size, BLOCK):
            file.write(self.read(start, min(start + BLOCK, self.size)))


@functools.cache
def look(url: str | Path) -> Object:
    """An object, as a process first found it; raises UserError if there is none."""
    url = str(url)
    with asking(url) as (store, key):
        return _object(url, store.head(key))


def listing(url: str) -> list[Object]:
    """The objects below a URL."""
    with asking(url) as (store, key):
        found = [one for page in store.list(key) for one in page]
    root = url.removesuffix(key)
    return [_object(root + one["path"], one) for one in found if is_known(root + one["path"])]


def _object(url: str, found: Any) -> Object:
    return Object(url, found["size"], found["e_tag"] or str(found["last_modified"]))


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------

Version = dict[str, Any]  # a store's marks of an object's contents


def put(url: str, data: bytes | Path) -> str:
    """Writes an object whole, from memory or from a file, in place of any other; returns its ETag."""
    with asking(url) as (store, key):
        return store.put(key, data)["e_tag"] or ""


def replace(url: str, data: bytes, version: Version | None) -> Version | None:
    """Writes an object if it still has this version (None: if there is none), and returns the new one; otherwise None.

    `data` must be unlike all that was ever written there: a request that is repeated because its answer was lost finds
    itself.
    """
    from obstore.exceptions import AlreadyExistsError, PreconditionError  # pyright: ignore[reportMissingImports]

    with asking(url) as (store, key):
        try:
            return _version(store.put(key, data, mode=version or "create"))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            pass
    found = current(url)
    return found[1] if found is not None and found[0] == data else None


def current(url: str) -> tuple[bytes, Version] | None:
    """What an object holds now, and its version; None if there is none."""
    with asking(url) as (store, key):
        try:
            got = store.get(key)
            return bytes(got.bytes()), _version(got.meta)
        except FileNotFoundError:
            return None


def _version(found: Any) -> Version:
    return {name: found[name] for name in ("e_tag", "version") if found[name] is not None}


def delete(urls: Sequence[str]) -> None:
    """Deletes objects of one bucket, where they are there."""
    if urls:
        with asking(urls[0]) as (store, _):
            store.delete([urlsplit(url).path.strip("/") for url in urls])


# ---------------------------------------------------------------------------------------------------
# The stores
# ---------------------------------------------------------------------------------------------------


@functools.cache
def _bucket(root: str) -> Any:
    from obstore.store import from_url  # pyright: ignore[reportMissingImports]

    return from_url(root, retry_config=RETRY)


@contextlib.contextmanager
def asking(url: str) -> Iterator[tuple[Any, str]]:
    """The store of a URL (an obstore.store) and the key there; in the block, its errors become UserErrors."""
    try:
        from obstore import exceptions  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("want the package obstore: pip install 'dail_jax[store]'", file=url) from None
    parts = urlsplit(url)
    try:
        yield _bucket(f"{parts.scheme}://{parts.netloc}"), parts.path.strip("/")
    except FileNotFoundError:
        raise UserError("no such object on the store", file=url) from None
    except exceptions.PreconditionError:
        raise UserError("was replaced on the store while it was read: call again", file=url) from None
    except exceptions.BaseError as error:
        denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
        if denied or NO_LOGIN.search(str(error)):
            what = f"the store wants a login that may do this ({_reason(error)}): {LOGINS[parts.scheme]}"
        else:
            what = f"the store failed: {_reason(error)}"
        raise UserError(what, file=url) from None


def _reason(error: Exception) -> str:
    """What a store said, in a few words."""
    text = str(error)
    status, code = re.search(r"status code: (\d{3} [A-Z]\w*( [A-Z]\w*)*)", text), re.search(r"<Code>(\w+)</Code>", text)
    retries = re.search(r"after (\d+) retries", text)
    words = [match[1] for match in (status, code) if match] or [text.split("\n")[0][:200].strip()]
    return ", ".join(words) + (f", after {retries[1]} retries" if retries else "")
