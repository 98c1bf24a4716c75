"""The one kind of error that is for the user to fix: a single line, exit status 2, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


class UserError(Exception):
    """Bad input. `str()` reads `FILE:ROW:FIELD: message`, with as many of the three as apply."""

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        row: int | str | None = None,
        field: str | None = None,
    ):
        self.file, self.row, self.field, self.message = file, row, field, message
        where = ":".join(str(part) for part in (file, row, field) if part is not None)
        line = f"{where}: {message}" if where else message
        super().__init__(visible(" ".join(line.split())))

    @property
    def lines(self) -> list[str]:
        """What to print."""
        return [str(self)]


class Waiting(UserError):
    """Work that can go on once something has been done elsewhere; other work need not wait for it."""


class UserErrors(UserError):
    """Several that were found at once: a line for each."""

    def __init__(self, errors: Sequence[UserError]):
        super().__init__("; ".join(map(str, errors)))
        self.errors = list(errors)

    @property
    def lines(self) -> list[str]:
        return [str(error) for error in self.errors]


class Interrupted(Exception):
    """A stage has saved its work and stopped on request: the command exits with status 75."""


def want_folder(folder: Path, what: str) -> None:
    """Raises UserError if a folder `what` is read from is not there; a model's name on a hub is recognised."""
    if not folder.is_dir():
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder))
        hint = f"; is it a name on a hub? Download it: hf download {folder} --local-dir DIR" if on_hub else ""
        raise UserError(f"got no such folder, want one with {what}{hint}", file=folder)


def visible(text: str) -> str:
    """The text made safe for a terminal: characters that would move its cursor, colour or reverse text are escaped.

    Newlines and tabs are kept.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def registered(registry: Mapping[str, _T], name: str, field: str) -> _T:
    """What a registry has under a name; raises UserError for the configuration's `field` where there is nothing."""
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, registry, 1, 0.0)
    raise UserError(f"got {name!r}, want one of {', '.join(registry)}; did you mean {near[0]!r}?", field=field)


@contextlib.contextmanager
def writing(path: str | Path, *others: type[Exception]) -> Iterator[None]:
    """Turns a failure to write `path` (the disk is full, over quota, read-only or broken) into a UserError.

    `others` are exceptions to treat in the same way, for libraries that raise their own.
    """
    try:
        yield
    except (OSError, *others) as error:
        raise UserError(f"cannot be written: {reason(error)}; what was finished is kept", file=path) from None


def reason(error: Exception) -> str:
    """The system's own message, even if a library has wrapped it, as Orbax and safetensors do."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    if number:
        return os.strerror(int(number[1] or number[2]))
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
