"""Strict JSON for data sets and runs: one parser, one reader of whole files and one of JSON lines.

Python's own parser keeps the last of two equal keys, and accepts `NaN` as a number, half of a surrogate pair as text,
and any depth that its stack happens to survive. Here each of these is a one-line UserError with file, row and field, and
so are files that are missing, truncated or not text at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dail_jax.errors import UserError

MAX_LINE = 64 << 20  # bytes of one row of a dataset
MAX_OWN_LINE = 1 << 30  # bytes of one row of a journal, which holds all samples of a problem
MAX_FILE = 64 << 20  # bytes of a file that is one JSON value
MAX_DEPTH = 50  # levels of lists and objects
MAX_DIGITS = 1000  # of a number

_ESCAPED = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")  # may stand for a NUL or for half of a surrogate pair
_OVERFLOW = re.compile(r"[eE]\+?\d{3}")


class Line(NamedTuple):
    """One row: its number, from 1; its offset and size in the file, in bytes; and its value."""

    number: int
    offset: int
    size: int
    value: Any


def parse(data: bytes | str, file: str | Path, row: int | None = None, *, own: bool = False) -> Any:
    """One JSON value in UTF-8; raises UserError.

    `own` marks what this package wrote: there, `NaN` is a loss that diverged, and a model's text may contain anything.
    """

    def wrong(message: str, field: str | None = None) -> UserError:
        return UserError(message, file=file, row=row, field=field)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise wrong("got the key twice, want it once", printable(twice))
        return found

    def constant(name: str) -> float:
        if own:
            return float(name)
        raise wrong(f"got {name}, which is not a JSON value, want a number, text or null")

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise wrong(f"got a number of {len(digits)} digits, want at most {MAX_DIGITS}")
        return int(digits)

    def real(digits: str) -> float:
        if (value := float(digits)) in (float("inf"), float("-inf")):
            raise wrong(f"got the number {digits[:40]}, which is too large")
        return value

    hooks: dict[str, Any] = {"object_pairs_hook": unique, "parse_constant": constant}
    kind = "a line" if row is not None else "a file"
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if not own or _OVERFLOW.search(text):  # one call per number, which triples the time for rows of numbers
            hooks |= {"parse_int": integer, "parse_float": real}
        value = json.loads(text, **hooks)
    except UnicodeDecodeError as error:
        raise wrong(f"got a byte that is not UTF-8 at position {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"character {error.pos + 1}" if row is not None else f"line {error.lineno}, character {error.colno}"
        raise wrong(f"got {kind} that is not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise wrong(f"got {kind} nested too deeply, want at most {MAX_DEPTH} levels") from None
    except ValueError:  # Python's own limit on digits
        raise wrong(f"got a number of thousands of digits, want at most {MAX_DIGITS}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise wrong(f"got {kind} nested too deeply, want at most {MAX_DEPTH} levels")
    if not own and _ESCAPED.search(text):
        _refuse_odd_text(value, file, row)
    return value


def read_object(path: str | Path, *, own: bool = False) -> dict[str, Any]:
    """The JSON object that a file holds; raises UserError."""
    with _open(path) as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise UserError(f"got a file of over {MAX_FILE >> 20} MiB, want a JSON object", file=path)
    return as_object(parse(data.removeprefix(b"\xef\xbb\xbf"), path, own=own), path)


def read_lines(
    path: str | Path, *, own: bool = False, torn: Literal["row", "refuse", "drop"] = "row", advice: str = ""
) -> Iterator[Line]:
    r"""The rows of a JSON-lines file, parsed one by one; raises UserError at the first that is bad.

    Only \n ends a line: Unicode's other line separators are ordinary characters in texts. A byte order mark and blank
    lines are skipped. `torn` says how to treat a last line without \n: as a row like any other ("row"), as damage
    ("refuse"), or as what a crash left of a row, to be skipped ("drop"). `advice` is appended to every error message.
    """
    limit, offset, number = MAX_OWN_LINE if own else MAX_LINE, 0, 0
    with _open(path) as file:
        while line := file.readline(limit + 1):
            number += 1
            try:
                if len(line) > limit:
                    raise UserError(f"got a line of over {limit >> 20} MiB, want a row", file=path, row=number)
                if not line.endswith(b"\n") and torn != "row":
                    if torn == "drop":
                        return
                    raise UserError("got a torn last line, want the whole file", file=path, row=number)
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield Line(number, offset, len(line), parse(text, path, number, own=own))
            except UserError as error:
                if not advice:
                    raise
                raise UserError(f"{error.message}: {advice}", file=path, row=number, field=error.field) from None
            offset += len(line)


def read_at(path: str | Path, offsets: Sequence[int]) -> Iterator[Any]:
    """The rows of one of our own files at these byte offsets, as given by `read_lines`."""
    with _open(path) as file:
        for offset in offsets:
            file.seek(offset)
            yield parse(file.readline(MAX_OWN_LINE), path, own=True)


def as_object(value: Any, file: str | Path, row: int | None = None) -> dict[str, Any]:
    """The value, if it is an object; otherwise raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"got {kind_of(value)}, want a JSON object", file=file, row=row)
    return value


def refuse_odd_text(text: str, file: str | Path, row: int | str | None = None, field: str | None = None) -> None:
    """Raises UserError if a text contains what files and terminals cannot: a NUL, or half of a surrogate pair."""
    if "\0" in text:
        raise UserError("got a NUL character, want plain text", file=file, row=row, field=field)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"got half of a surrogate pair (U+{code:04X}), want Unicode text", file=file, row=row, field=field
        ) from None


def kind_of(value: Any) -> str:
    """The kind of a JSON value, as named in messages."""
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def printable(text: str) -> str:
    """The start of a text from a file, made safe to show in a message."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:80])


def _open(path: str | Path) -> Any:
    """Opens a regular file for reading; raises UserError for others, since reading a FIFO could block forever."""
    path = Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "something that is not a regular file" if path.exists() else None
        raise UserError(f"got {got}, want a file" if got else "no such file", file=path)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=path) from None


def _depth(value: Any) -> int:
    """Levels of lists and objects, found level by level: no recursion."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, list | dict)]:
        depth += 1
        level = [x for node in level for x in (node.values() if isinstance(node, dict) else node)]
    return depth


def _refuse_odd_text(value: Any, file: str | Path, row: int | None) -> None:
    """`refuse_odd_text` for all texts in a value, each reported under the name of its column."""
    columns = value.items() if isinstance(value, dict) else [(None, value)]
    for column, content in columns:
        if column is not None:
            refuse_odd_text(column, file, row)
        nodes = [content]
        while nodes:
            node = nodes.pop()
            if isinstance(node, str):
                refuse_odd_text(node, file, row, None if column is None else printable(column))
            elif isinstance(node, list | dict):
                nodes += node.values() if isinstance(node, dict) else node
                nodes += node if isinstance(node, dict) else ()
