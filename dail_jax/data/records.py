"""Rows of a dataset: problems with expert solutions, from JSON lines, parquet, a hub or a source of your own.

Rows are checked one by one: anything wrong raises a UserError that names file, row (counted from 1) and column.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from dail_jax import config, storage, strict_json
from dail_jax.data import chats
from dail_jax.data.chats import Message
from dail_jax.errors import UserError


class Further(NamedTuple):
    """An expert solution besides the first one, with waypoints of its own, if any."""

    solution: str
    waypoints: str | None


@dataclass(frozen=True)
class Row:
    """One problem. `index` is its position in the dataset, from 0; a missing text is empty, a missing answer None.

    `file` and `number`, from 1, are where the row was read.
    """

    problem_id: str
    problem: str
    solution: str
    answer: str | None
    index: int
    waypoints: str | None = None  # the row's own, one per line; they take the place of the extractor's
    choices: tuple[str, ...] = ()  # the choices of a question, the right one first; `answer` is then its text
    before: tuple[Message, ...] = ()  # the chat before the problem: a system message, if any, and earlier turns
    further: tuple[Further, ...] = ()  # where a problem has several expert solutions, those after the first
    file: str = field(default="", compare=False, repr=False)
    number: int = field(default=0, compare=False, repr=False)

    @property
    def place(self) -> dict[str, Any]:
        """Where it was read, for a UserError."""
        return {"file": self.file or None, "row": self.number or self.problem_id}

    @property
    def views(self) -> tuple[Row, ...]:
        """The row once for each expert solution, as if it had that one alone: what a privileged student sees."""
        first = dataclasses.replace(self, further=())
        return first, *(dataclasses.replace(first, solution=text, waypoints=own) for text, own in self.further)


def read_rows(cfg: config.Dataset, need: Sequence[str] = ("problem", "solution")) -> list[Row]:
    """The rows of a dataset, in its order: of the first `cfg.limit`, the part that `cfg.hold_out` leaves.

    Several files follow one another. `need` names the fields of Row that must hold text; the others may be missing. A row
    without a problem_id gets the hash of its content for one. Raises UserError at the first fault.
    """
    if isinstance(cfg.path, str):
        rows = checked_rows(_raw_rows(cfg.path, cfg), cfg, need)
    else:
        rows = _from_several(cfg.path, cfg, need)
    return rows if cfg.hold_out is None else _part(rows, cfg.hold_out, cfg.shown_path)


def checked_rows(raw_rows: Iterable[tuple[int, Any]], cfg: config.Dataset, need: Sequence[str]) -> list[Row]:
    """The first `cfg.limit` rows of (number from 1, decoded row), whatever they come from, as in `read_rows`."""
    return _checked(raw_rows, cfg.shown_path, cfg, need, {})[: cfg.limit]


def _checked(
    raw_rows: Iterable[tuple[int, Any]], file: str, cfg: config.Dataset, need: Sequence[str], seen: dict[str, str]
) -> list[Row]:
    """The rows of one file, no more than `cfg.limit`. `seen` says where each id was met, in this file or in others."""
    rows: list[Row] = []
    for number, raw in raw_rows:
        row = _row(raw, file, cfg, need, number, len(rows))
        if row.problem_id in seen:
            raise UserError(
                f"got {row.problem_id[:80]!r} again, first seen in {seen[row.problem_id]}, want each once",
                file=file,
                row=number,
                field=cfg.columns.problem_id,
            )
        seen[row.problem_id] = f"row {number}" + ("" if isinstance(cfg.path, str) else f" of {file}")
        rows.append(row)
        if cfg.limit is not None and len(rows) >= cfg.limit and isinstance(cfg.path, str):
            break
    if not rows:
        raise UserError("got an empty dataset, want at least one row", file=file)
    return rows


def _from_several(sources: Sequence[config.Source], cfg: config.Dataset, need: Sequence[str]) -> list[Row]:
    """The rows that are taken of each file, one file after the other. No id may be in two of them."""
    seen: dict[str, str] = {}
    files = [_checked(_raw_rows(source.path, cfg), source.path, cfg, need, seen) for source in sources]
    if sources[0].weight is not None:
        files = [
            _chosen(rows, count, cfg.seed)
            for rows, count in zip(files, _shares(sources, [*map(len, files)], cfg.limit), strict=True)
        ]
    rows = [row for rows in files for row in rows][: cfg.limit]
    return [dataclasses.replace(row, index=index) for index, row in enumerate(rows)]


def _shares(sources: Sequence[config.Source], sizes: Sequence[int], limit: int | None) -> list[int]:
    """How many rows of each file are taken: as many as the weights allow without taking any twice, `limit` at most.

    With weights w and sizes n these are floor(w * m), where m is the least n / w, and at most limit / sum(w).
    """
    weights = [Fraction(str(source.weight)) for source in sources]
    most = min(Fraction(size) / weight for size, weight in zip(sizes, weights, strict=True))
    if limit is not None:
        most = min(most, limit / sum(weights))
    counts = [math.floor(weight * most) for weight in weights]
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise UserError(
                f"got the weight {source.weight:g}, by which none of its rows is taken: want more, or a higher limit",
                file=source.path,
                field="data.path",
            )
    return counts


def _chosen(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` of the rows, in their order. Which ones depends on their ids and the seed, not on their order."""
    order = sorted(rows, key=lambda row: hashlib.sha256(_serial(str(seed), row.problem_id)).digest())
    chosen = {row.problem_id for row in order[:count]}
    return [row for row in rows if row.problem_id in chosen]


def _part(rows: list[Row], cfg: config.HoldOut, path: str) -> list[Row]:
    """Either part of the rows."""
    if cfg.rows >= len(rows):
        raise UserError(f"got {len(rows)} rows, want more than hold_out.rows ({cfg.rows})", file=path)
    held = {row.problem_id for row in _chosen(rows, cfg.rows, cfg.seed)}
    return [row for row in rows if (row.problem_id in held) == (cfg.use == "held_out")]


def dataset_hash(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) over the content of all rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_serial(row.problem_id, row.problem, row.solution, row.answer, row.waypoints, *row.choices))
        digest.update(_more(row.before, row.further))
    return digest.hexdigest()


def as_json(row: Row) -> dict[str, Any]:
    """A row as a line of a .jsonl file, which `read_rows` reads as the same row. (Of choices, the right one's text.)"""

    def lines(text: str | None) -> list[str] | None:
        return text.split("\n") if text else None if text is None else []

    chat = [message._asdict() for message in row.before]
    own = [lines(view.waypoints) for view in row.views]
    found = {
        "problem_id": row.problem_id,
        "messages": [*chat, Message("user", row.problem)._asdict()] if chat else None,
        "problem": None if chat else row.problem,
        "solution": [view.solution for view in row.views] if row.further else row.solution,
        "answer": row.answer,
        "waypoints": own if row.further and any(one is not None for one in own) else row.waypoints or own[0],
    }
    return {name: value for name, value in found.items() if value is not None and value != ""}


def _serial(*fields: str | None) -> bytes:
    return json.dumps(fields).encode("ascii") + b"\n"


def _more(before: Sequence[Message], further: Sequence[Further]) -> bytes:
    """What only some rows have, for their hashes; nothing where a row is a problem with one solution."""
    return json.dumps({"before": before, "further": further}).encode("ascii") + b"\n" if before or further else b""


# ---------------------------------------------------------------------------------------------------
# One row
# ---------------------------------------------------------------------------------------------------


def _row(raw: Any, file: str, cfg: config.Dataset, need: Sequence[str], number: int, index: int) -> Row:
    """Checks one decoded row."""
    if not isinstance(raw, dict):
        raise UserError(f"got {strict_json.kind_of(raw)}, want an object with columns", file=file, row=number)
    columns, chat = cfg.columns, None
    if _is_missing(raw.get(columns.problem)) and raw.get(columns.messages) is not None:
        chat = chats.read(raw[columns.messages], file, number, columns.messages)
        raw = {**raw, columns.problem: chat.problem}
        if _is_missing(raw.get(columns.solution)) and chat.solution is not None:
            raw[columns.solution] = chat.solution
    choices = _choices(raw, file, cfg, number)
    if choices:
        raw = {**raw, columns.answer: choices[0]}

    def text(name: str) -> str | None:
        column = getattr(columns, name)
        return _text(raw, column, name in need, name in ("answer", "problem_id"), file, number)

    problem_id, problem, answer = text("problem_id"), text("problem"), text("answer")
    solutions = _solutions(raw, file, columns, number) or [text("solution")]
    waypoints = _waypoints(raw, file, columns, number, len(solutions))
    before = chat.before if chat else ()
    further = tuple(Further(text or "", own) for text, own in zip(solutions[1:], waypoints[1:], strict=True))
    content = _serial(problem, solutions[0], answer) + _more(before, further)
    return Row(
        problem_id=problem_id or hashlib.sha256(content).hexdigest()[:16],
        problem=problem or "",
        solution=solutions[0] or "",
        answer=answer,
        index=index,
        waypoints=waypoints[0],
        choices=choices,
        before=before,
        further=further,
        file=file,
        number=number,
    )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _solutions(raw: dict[str, Any], file: str, columns: config.Columns, number: int) -> list[str | None]:
    """The texts in a list of expert solutions; empty if the row has no list."""
    value = raw.get(columns.solution)
    if not isinstance(value, list):
        return []
    if not value:
        raise UserError("got an empty list, want expert solutions", file=file, row=number, field=columns.solution)
    each = {f"{columns.solution}.{i}": text for i, text in enumerate(value)}
    return [_text(each, name, True, False, file, number) for name in each]


def _waypoints(raw: dict[str, Any], file: str, columns: config.Columns, number: int, count: int) -> list[str | None]:
    """The row's own waypoints for each of `count` solutions, one per line: the same for all, or a list for each."""
    value, column = raw.get(columns.waypoints), columns.waypoints

    def joined(one: Any, field: str) -> str | None:
        if isinstance(one, list) and all(isinstance(part, str) for part in one):
            one = "\n".join(one)
            strict_json.refuse_odd_text(one, file, number, field)
            return one  # of an empty list, no waypoints; of null, the extractor's
        return _text({field: one}, field, False, False, file, number)

    if not isinstance(value, list) or not any(isinstance(part, list) for part in value):
        return [joined(value, column)] * count
    if len(value) != count:
        raise UserError(
            f"got {len(value)} lists, want one for each of {count} solutions", file=file, row=number, field=column
        )
    return [joined(one, f"{column}.{i}") for i, one in enumerate(value)]


def _choices(raw: dict[str, Any], file: str, cfg: config.Dataset, number: int) -> tuple[str, ...]:
    """The texts of a question's choices, the right one first; empty if no column is configured for them."""
    columns, answer = cfg.columns.choices, raw.get(cfg.columns.answer)
    if columns is None:
        return ()
    field = columns if isinstance(columns, str) else ", ".join(columns)
    found = raw.get(columns) if isinstance(columns, str) else [raw.get(column) for column in columns]
    if not isinstance(found, list) or not 2 <= len(found) <= 26:
        got = f"{len(found)} choices" if isinstance(found, list) else strict_json.kind_of(found)
        raise UserError(f"got {got}, want a list of 2 to 26 choices", file=file, row=number, field=field)
    texts = [_plain(choice, True, file, number, field).strip() for choice in found]
    if len(set(texts)) < len(texts) or "" in texts:
        raise UserError("got an empty choice or the same one twice", file=file, row=number, field=field)
    right = answer if type(answer) is int else None
    if isinstance(answer, str):
        letter = answer.strip()
        right = texts.index(letter) if letter in texts else ord(letter) - ord("A") if len(letter) == 1 else None
    if right is None or not 0 <= right < len(texts):
        raise UserError(
            f"got {answer!r:.80}, want a choice's text, letter or index from 0",
            file=file,
            row=number,
            field=cfg.columns.answer,
        )
    return (texts[right], *texts[:right], *texts[right + 1 :])


def _text(raw: dict[str, Any], column: str, needed: bool, number_allowed: bool, file: str, row: int) -> str | None:
    """A column's text; None where it is missing and may be."""
    value = raw.get(column)
    if not _is_missing(value):
        return _plain(value, number_allowed, file, row, column)
    if not needed:
        return None
    got = "null" if value is None else "an empty text"
    if column not in raw:
        got = f"no such column (there are: {', '.join(sorted(raw))[:200] or 'none'})"
    raise UserError(f"got {got}, want text", file=file, row=row, field=column)


def _plain(value: Any, number_allowed: bool, file: str, row: int, column: str) -> str:
    """A field as text. Answers and ids may be numbers, as they are in many datasets."""
    if number_allowed and type(value) is int:
        return str(value)
    if number_allowed and type(value) is float:  # tables store integers as floats if one is missing
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if not isinstance(value, str):
        want = "text or a number" if number_allowed else "text"
        raise UserError(f"got {strict_json.kind_of(value)}, want {want}", file=file, row=row, field=column)
    strict_json.refuse_odd_text(value, file, row, column)
    return value


# ---------------------------------------------------------------------------------------------------
# Sources: each yields (row number from 1, decoded row)
# ---------------------------------------------------------------------------------------------------


def _raw_rows(file: str, cfg: config.Dataset) -> Iterator[tuple[int, Any]]:
    """The rows of one of the dataset's files; at least the first `cfg.limit` if it is the only one."""
    limit = cfg.limit if isinstance(cfg.path, str) else None
    cfg = cfg.model_copy(update={"path": file, "limit": limit})
    source, colon, _ = file.partition(":")
    if colon and source in SOURCES:
        return enumerate(SOURCES[source](cfg), 1)
    path = storage.file(file)
    readers = {".jsonl": _from_lines, ".parquet": _from_parquet}
    if path.suffix not in readers:
        names = ", ".join(f"{name}:..." for name in SOURCES)
        raise UserError(f"got the extension {path.suffix!r}, want .jsonl, .parquet or a source ({names})", file=file)
    if not path.is_file():
        raise UserError("got a folder, want a file" if path.is_dir() else "no such file", file=file)
    with open(path, "rb") as opened:
        if opened.read(200).startswith(b"version https://git-lfs"):
            raise UserError("got a git-LFS pointer, want the file itself: it was not downloaded", file=file)
    return readers[path.suffix](str(path), cfg)


def _from_lines(file: str, cfg: config.Dataset) -> Iterator[tuple[int, Any]]:
    for line in strict_json.read_lines(file):
        yield line.number, line.value


def _from_parquet(file: str, cfg: config.Dataset, cap: int = 2 << 30) -> Iterator[tuple[int, Any]]:
    """Reads Parquet of at most `cap` bytes when decompressed."""
    *columns, choices = cfg.columns.model_dump().values()
    columns += [choices] if isinstance(choices, str) else choices or ()
    with tempfile.TemporaryFile() as out:
        worker = str(Path(__file__).with_name("parquet_worker.py"))
        command = [sys.executable, "-I", worker, file, str(cap), str(cfg.limit or 0), *columns]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env={"ARROW_DEFAULT_MEMORY_POOL": "system"})
        if done.returncode == 3:
            reason = done.stderr.decode("utf-8", "replace").rpartition("\x1e")[2]
            raise UserError(reason[:300], file=file)
        if done.returncode:
            raise UserError("got a damaged parquet file: its reader crashed or exceeded its limits", file=file)
        out.seek(0)
        for number, line in enumerate(out, 1):
            yield number, strict_json.parse(line, file, number)


def hub(cfg: config.Dataset) -> Iterable[Any]:
    """`hub:NAME` or `hub:NAME:SUBSET` through the `datasets` package."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("want the datasets package: pip install 'dail_jax[hub]'", file=cfg.shown_path) from None
    name, _, subset = cfg.shown_path.partition(":")[2].partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=cfg.split)
    except Exception as error:  # whatever the network, the hub or the package raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"cannot be loaded: {reason[:300]}", file=cfg.shown_path) from None


# Where rows may come from besides files: `path: NAME:ANYTHING` calls the function of that name with its section of the
# configuration. The rows that it yields, dicts by column, are checked like those of a file.
SOURCES: dict[str, Callable[[config.Dataset], Iterable[dict[str, Any]]]] = {"hub": hub}
