"""The one kind of error that is the user's to mend: a single line, exit status 2, no traceback."""

from __future__ import annotations

from pathlib import Path


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
        super().__init__(" ".join(line.split()))
