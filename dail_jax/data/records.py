"""Rows of a dataset: problems with expert solutions, from JSON lines, parquet, a hub or a source of your own.

Rows are checked one by one: anything wrong raises a UserError that names file, row (counted from 1) and column.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dail_jax import config, strict_json
from dail_jax.errors import UserError


@dataclass(frozen=True)
class Row:
    """One problem. `index` is its position in the dataset, from 0; a missing text is empty, a missing answer None."""

    problem_id: str
    problem: str
    solution: str
    answer: str | None
    index: int
    waypoints: str | None = None  # one per line, for the extractor `file`
    choices: tuple[str, ...] = ()  # the choices of a question, the right one first; `answer` is then its text


def read_rows(cfg: config.Dataset, need: Sequence[str] = ("problem", "solution")) -> list[Row]:
    """The rows of a dataset, in its order: of the first `cfg.limit`, the part that `cfg.hold_out` leaves.

    `need` names the fields of Row that must hold text; the others may be missing. A row without a problem_id gets the
    hash of its content for one. Raises UserError at the first fault.
    """
    rows = checked_rows(_raw_rows(cfg), cfg, need)
    return rows if cfg.hold_out is None else _part(rows, cfg.hold_out, cfg.path)


def checked_rows(raw_rows: Iterable[tuple[int, Any]], cfg: config.Dataset, need: Sequence[str]) -> list[Row]:
    """The first `cfg.limit` rows of (number from 1, decoded row), whatever they come from, as in `read_rows`."""
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, raw in raw_rows:
        row = _row(raw, cfg, need, number, len(rows))
        if row.problem_id in seen:
            raise UserError(
                f"got {row.problem_id[:80]!r} again, first seen in row {seen[row.problem_id]}, want each once",
                file=cfg.path,
                row=number,
                field=cfg.columns.problem_id,
            )
        seen[row.problem_id] = number
        rows.append(row)
        if cfg.limit is not None and len(rows) >= cfg.limit:
            break
    if not rows:
        raise UserError("got an empty dataset, want at least one row", file=cfg.path)
    return rows


def _part(rows: list[Row], cfg: config.HoldOut, path: str) -> list[Row]:
    """Either part of the rows. Which rows are held out depends on their ids and the seed, not on their order."""
    if cfg.rows >= len(rows):
        raise UserError(f"got {len(rows)} rows, want more than hold_out.rows ({cfg.rows})", file=path)
    order = sorted(rows, key=lambda row: hashlib.sha256(_serial(str(cfg.seed), row.problem_id)).digest())
    held = {row.problem_id for row in order[: cfg.rows]}
    return [row for row in rows if (row.problem_id in held) == (cfg.use == "held_out")]


def dataset_hash(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) over the content of all rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_serial(row.problem_id, row.problem, row.solution, row.answer, row.waypoints, *row.choices))
    return digest.hexdigest()


def _serial(*fields: str | None) -> bytes:
    return json.dumps(fields).encode("ascii") + b"\n"


# ---------------------------------------------------------------------------------------------------
# One row
# ---------------------------------------------------------------------------------------------------


def _row(raw: Any, cfg: config.Dataset, need: Sequence[str], number: int, index: int) -> Row:
    """Checks one decoded row."""
    if not isinstance(raw, dict):
        raise UserError(f"got {strict_json.kind_of(raw)}, want an object with columns", file=cfg.path, row=number)
    columns = cfg.columns.model_dump(exclude={"choices"})
    choices = _choices(raw, cfg, number)
    if choices:
        raw = {**raw, columns["answer"]: choices[0]}
    values: dict[str, str | None] = {}
    for field, column in columns.items():
        value = raw.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            if field in need:
                got = "null" if value is None else "an empty text"
                if column not in raw:
                    got = f"no such column (there are: {', '.join(sorted(raw))[:200] or 'none'})"
                raise UserError(f"got {got}, want text", file=cfg.path, row=number, field=column)
            values[field] = None
            continue
        if field == "waypoints" and isinstance(value, list) and all(isinstance(v, str) for v in value):
            value = "\n".join(value)
        values[field] = _text(value, field in ("answer", "problem_id"), cfg.path, number, column)
    content = _serial(values["problem"], values["solution"], values["answer"])
    return Row(
        problem_id=values["problem_id"] or hashlib.sha256(content).hexdigest()[:16],
        problem=values["problem"] or "",
        solution=values["solution"] or "",
        answer=values["answer"],
        index=index,
        waypoints=values.get("waypoints"),
        choices=choices,
    )


def _choices(raw: dict[str, Any], cfg: config.Dataset, number: int) -> tuple[str, ...]:
    """The texts of a question's choices, the right one first; empty if no column is configured for them."""
    columns, answer = cfg.columns.choices, raw.get(cfg.columns.answer)
    if columns is None:
        return ()
    field = columns if isinstance(columns, str) else ", ".join(columns)
    found = raw.get(columns) if isinstance(columns, str) else [raw.get(column) for column in columns]
    if not isinstance(found, list) or not 2 <= len(found) <= 26:
        got = f"{len(found)} choices" if isinstance(found, list) else strict_json.kind_of(found)
        raise UserError(f"got {got}, want a list of 2 to 26 choices", file=cfg.path, row=number, field=field)
    texts = [_text(choice, True, cfg.path, number, field).strip() for choice in found]
    if len(set(texts)) < len(texts) or "" in texts:
        raise UserError("got an empty choice or the same one twice", file=cfg.path, row=number, field=field)
    right = answer if type(answer) is int else None
    if isinstance(answer, str):
        letter = answer.strip()
        right = texts.index(letter) if letter in texts else ord(letter) - ord("A") if len(letter) == 1 else None
    if right is None or not 0 <= right < len(texts):
        raise UserError(
            f"got {answer!r:.80}, want a choice's text, letter or index from 0",
            file=cfg.path,
            row=number,
            field=cfg.columns.answer,
        )
    return (texts[right], *texts[:right], *texts[right + 1 :])


def _text(value: Any, number_allowed: bool, path: str, row: int, column: str) -> str:
    """A field as text. Answers and ids may be numbers, as they are in many datasets."""
    if number_allowed and type(value) is int:
        return str(value)
    if number_allowed and type(value) is float:  # tables store integers as floats if one is missing
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if not isinstance(value, str):
        want = "text or a number" if number_allowed else "text"
        raise UserError(f"got {strict_json.kind_of(value)}, want {want}", file=path, row=row, field=column)
    strict_json.refuse_odd_text(value, path, row, column)
    return value


# ---------------------------------------------------------------------------------------------------
# Sources: each yields (row number from 1, decoded row)
# ---------------------------------------------------------------------------------------------------


def _raw_rows(cfg: config.Dataset) -> Iterator[tuple[int, Any]]:
    source, colon, _ = cfg.path.partition(":")
    if colon and source in SOURCES:
        return enumerate(SOURCES[source](cfg), 1)
    path = Path(cfg.path)
    readers = {".jsonl": _from_lines, ".parquet": _from_parquet}
    if path.suffix not in readers:
        names = ", ".join(f"{name}:..." for name in SOURCES)
        raise UserError(
            f"got the extension {path.suffix!r}, want .jsonl, .parquet or a source ({names})", file=cfg.path
        )
    if not path.is_file():
        raise UserError("got a folder, want a file" if path.is_dir() else "no such file", file=cfg.path)
    with open(path, "rb") as file:
        if file.read(200).startswith(b"version https://git-lfs"):
            raise UserError("got a git-LFS pointer, want the file itself: it was not downloaded", file=cfg.path)
    return readers[path.suffix](cfg)


def _from_lines(cfg: config.Dataset) -> Iterator[tuple[int, Any]]:
    for line in strict_json.read_lines(cfg.path):
        yield line.number, line.value


def _from_parquet(cfg: config.Dataset, cap: int = 2 << 30) -> Iterator[tuple[int, Any]]:
    """Reads Parquet of at most `cap` bytes when decompressed."""
    *columns, choices = cfg.columns.model_dump().values()
    columns += [choices] if isinstance(choices, str) else choices or ()
    with tempfile.TemporaryFile() as out:
        worker = str(Path(__file__).with_name("parquet_worker.py"))
        command = [sys.executable, "-I", worker, cfg.path, str(cap), str(cfg.limit or 0), *columns]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env={"ARROW_DEFAULT_MEMORY_POOL": "system"})
        if done.returncode == 3:
            reason = done.stderr.decode("utf-8", "replace").rpartition("\x1e")[2]
            raise UserError(reason[:300], file=cfg.path)
        if done.returncode:
            raise UserError("got a damaged parquet file: its reader crashed or exceeded its limits", file=cfg.path)
        out.seek(0)
        for number, line in enumerate(out, 1):
            yield number, strict_json.parse(line, cfg.path, number)


def hub(cfg: config.Dataset) -> Iterable[Any]:
    """`hub:NAME` or `hub:NAME:SUBSET` through the `datasets` package."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("want the datasets package: pip install 'dail_jax[hub]'", file=cfg.path) from None
    name, _, subset = cfg.path.partition(":")[2].partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=cfg.split)
    except Exception as error:  # whatever the network, the hub or the package raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"cannot be loaded: {reason[:300]}", file=cfg.path) from None


# Where rows may come from besides files: `path: NAME:ANYTHING` calls the function of that name with its section of the
# configuration. The rows that it yields, dicts by column, are checked like those of a file.
SOURCES: dict[str, Callable[[config.Dataset], Iterable[dict[str, Any]]]] = {"hub": hub}
