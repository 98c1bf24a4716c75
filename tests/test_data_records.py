"""Rows from JSON lines, parquet and a hub, and the one-line errors for bad ones."""

import hashlib
import json
import random
import sys
import types
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dail_jax import config, strict_json
from dail_jax.data import records
from dail_jax.data.records import Row, dataset_hash, read_rows
from dail_jax.errors import UserError

GOOD = [
    {"problem_id": "a", "problem": "1+1?", "solution": "2 \u2028 done", "answer": 2, "extra": [1, None]},
    {"problem_id": "b", "problem": "2+2?", "solution": "4 é", "answer": "4"},
    {"problem_id": 7, "problem": "prove", "solution": "clear", "answer": None},
]


def write(path, *lines):
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()) + b"\n" for line in lines
    )
    path.write_bytes(data)
    return config.Dataset(path=str(path))


def test_json_lines(tmp_path):
    cfg = write(tmp_path / "r.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD[0]).encode() + b"\r", GOOD[1], b"  ", GOOD[2])
    rows = read_rows(cfg)
    assert rows == [
        Row("a", "1+1?", "2 \u2028 done", "2", 0),
        Row("b", "2+2?", "4 é", "4", 1),
        Row("7", "prove", "clear", None, 2),
    ]
    assert read_rows(cfg.model_copy(update={"limit": 2})) == rows[:2]


def test_columns_and_content_ids(tmp_path):
    columns = config.Columns(problem="question", solution="steps", waypoints="hints")
    lines = [{"question": q, "steps": "s", "hints": ["one", "two"]} for q in ("x", "y")]
    cfg = write(tmp_path / "r.jsonl", *lines).model_copy(update={"columns": columns})
    x, y = read_rows(cfg)
    assert x.problem_id == hashlib.sha256(b'["x", "s", null]\n').hexdigest()[:16] != y.problem_id
    assert x.waypoints == "one\ntwo"
    cfg = write(tmp_path / "r.jsonl", lines[0], lines[0]).model_copy(update={"columns": columns})
    with pytest.raises(UserError, match=r"r.jsonl:2:problem_id: got .* again, first seen in row 1"):
        read_rows(cfg)


def test_evaluation_rows_need_no_solution(tmp_path):
    cfg = write(tmp_path / "r.jsonl", {"problem": "x", "answer": 12.0}, {"problem": "y", "answer": 0.5})
    assert [(r.solution, r.answer) for r in read_rows(cfg, ("problem", "answer"))] == [("", "12"), ("", "0.5")]
    with pytest.raises(UserError, match=r"r.jsonl:1:solution: got no such column \(there are: answer, problem\)"):
        read_rows(cfg)
    cfg = write(tmp_path / "r.jsonl", {"problem": "x", "answer": 1}, {"problem": "y", "answer": None})
    with pytest.raises(UserError, match=r"r.jsonl:2:answer: got null, want text"):
        read_rows(cfg, ("problem", "answer"))


def test_hash_is_of_content_and_order(tmp_path):
    rows = read_rows(write(tmp_path / "r.jsonl", *GOOD))
    assert dataset_hash(rows) == dataset_hash(list(rows)) and len(dataset_hash(rows)) == 64
    assert len({dataset_hash(r) for r in (rows, rows[::-1], rows[:2], [])}) == 4


BAD = {
    b'{"problem": "x", "solu': r":2: got a line that is not JSON: .* at character \d+",
    b'["x"]': r":2: got a list, want an object",
    b'{"problem": "x", "solution": ""}': r":2:solution: got an empty text",
    b'{"problem": null, "solution": "s"}': r":2:problem: got null, want text",
    b'{"problem": 3, "solution": "s"}': r":2:problem: got a number, want text",
    b'{"problem": ["x"], "solution": "s"}': r":2:problem: got a list, want text",
    b'{"problem": "x", "solution": "s", "answer": true}': r":2:answer: got a truth value, want text or a number",
    b'{"problem": "x", "solution": "s", "answer": {}}': r":2:answer: got an object, want text or a number",
    b'{"problem": "x", "solution": "s", "other": NaN}': r":2: got NaN",
    b'{"problem": "x", "solution": "s", "answer": -Infinity}': r":2: got -Infinity",
    b'{"problem": "x", "solution": "s", "answer": 1e999}': r":2: got the number 1e999, which is too large",
    b'{"problem": "x", "problem": "y", "solution": "s"}': r":2:problem: got the key twice",
    b'{"problem": "x", "solution": "s", "o": {"k": 1, "k": 2}}': r":2:k: got the key twice",
    b'{"problem": "x \\ud800", "solution": "s"}': r":2:problem: got half of a surrogate pair \(U\+D800\)",
    b'{"problem": "x", "solution": "s\\u0000"}': r":2:solution: got a NUL character",
    b'{"problem": "x", "solution": "s", "answer": ' + b"9" * 5000 + b"}": r":2: got a number of 5000 digits",
    b'{"problem": "x\xff", "solution": "s"}': r":2: got a byte that is not UTF-8 at position 14",
    b'{"problem": "x", "solution": ' + b"[" * 200_000: r":2: got a line nested too deeply",
    b'{"problem_id": "a", "problem": "x", "solution": "s"}': r":2:problem_id: got 'a' again, first seen in row 1",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_bad_lines(tmp_path, line):
    cfg = write(tmp_path / "r.jsonl", GOOD[0], line, GOOD[1])
    with pytest.raises(UserError, match=r"r\.jsonl" + BAD[line]):
        read_rows(cfg)


def test_bad_files(tmp_path, monkeypatch):
    for name, content, complaint in (
        ("none.jsonl", None, "no such file"),
        ("r.csv", "a,b", "want .jsonl, .parquet or a source \\(hub:...\\)"),
        ("e.jsonl", "\n \n", "empty dataset"),
        ("p.jsonl", "version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        ("x.parquet", "PAR1 no", "damaged parquet file"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=f"{name}: .*{complaint}"):
            read_rows(config.Dataset(path=str(tmp_path / name)))
    monkeypatch.setattr(strict_json, "MAX_LINE", 100)
    with pytest.raises(UserError, match="line of over"):
        read_rows(write(tmp_path / "l.jsonl", b'{"problem": "' + b"x" * 100 + b'"}'))


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return config.Dataset(path=str(path))


def test_parquet_equals_json_lines(tmp_path):
    texts = [f"problem {i} \u2028 é" for i in range(50)]
    cfg = table(
        tmp_path / "r.parquet",
        problem_id=[str(i) for i in range(50)],
        problem=texts,
        solution=texts,
        answer=[None, *range(1, 50)],
        when=pa.array([0] * 50, pa.timestamp("s")),
    )
    lines = [{"problem_id": str(i), "problem": t, "solution": t, "answer": i or None} for i, t in enumerate(texts)]
    assert dataset_hash(read_rows(cfg)) == dataset_hash(read_rows(write(tmp_path / "r.jsonl", *lines)))
    assert len(read_rows(cfg.model_copy(update={"limit": 20}))) == 20


def test_bad_parquet_rows(tmp_path):
    with pytest.raises(UserError, match=r"r.parquet:2:solution: got null"):
        read_rows(table(tmp_path / "r.parquet", problem=["a", "b"], solution=["s", None]))
    with pytest.raises(UserError, match=r"r.parquet:1:problem: got a list"):
        read_rows(table(tmp_path / "r.parquet", problem=[b"\xff", b"b"], solution=["s", "t"]))
    with pytest.raises(UserError, match=r"r.parquet:1:problem: got no such column \(there are: other, solution\)"):
        read_rows(table(tmp_path / "r.parquet", other=[1], solution=["s"]))
    with pytest.raises(UserError, match="empty dataset"):
        read_rows(table(tmp_path / "r.parquet", problem=pa.array([], pa.string()), solution=pa.array([], pa.string())))


def test_exploding_parquet(tmp_path):
    """One long text, stored once in the file, expands to 2 GB of rows."""
    cfg = table(tmp_path / "r.parquet", problem=["x" * 1_000_000] * 2000, solution=["y"] * 2000)
    assert (tmp_path / "r.parquet").stat().st_size < 100_000
    with pytest.raises(UserError, match="expand to more than 64 MiB"):
        list(records._from_parquet(str(cfg.path), cfg, cap=64 << 20))


def test_damaged_parquet(tmp_path):
    pq.write_table(
        pa.table({"problem": [f"p{i}" * 50 for i in range(99)], "solution": ["s"] * 99}),
        tmp_path / "r.parquet",
        write_page_checksum=True,
    )
    whole = (tmp_path / "r.parquet").read_bytes()
    cfg = config.Dataset(path=str(tmp_path / "d.parquet"))
    rng = random.Random(0)
    for trial in range(12):
        data = bytearray(whole)
        if trial % 2:
            data = data[: rng.randrange(4, len(data))]
        else:
            data[rng.randrange(40, len(data) // 2)] ^= 1 << rng.randrange(8)
        (tmp_path / "d.parquet").write_bytes(data)
        with pytest.raises(UserError, match=r"d.parquet: got a damaged parquet file"):
            read_rows(cfg)


def test_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hub:o/n: want the datasets package: pip install 'dail_jax\[hub\]'"):
        read_rows(config.Dataset(path="hub:o/n"))
    fake: Any = types.ModuleType("datasets")
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        if args[0] == "o/gone":
            raise ConnectionError("cannot reach it\ntraceback")
        return GOOD

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [r.problem_id for r in read_rows(config.Dataset(path="hub:o/n:main", split="test"))] == ["a", "b", "7"]
    assert asked == [(("o/n", "main"), {"split": "test"})]
    with pytest.raises(UserError, match=r"hub:o/gone: cannot be loaded: cannot reach it$"):
        read_rows(config.Dataset(path="hub:o/gone"))


def test_two_parts_of_one_file(tmp_path):
    """Disjoint, complete, chosen by the seed, and the same however the file is sorted."""
    lines = [json.dumps({"problem": f"{i} + {i}?", "solution": "add"}) for i in range(20)]
    path = tmp_path / "mine.jsonl"

    def part(use, seed=0):
        cfg = config.Dataset.model_validate({"path": str(path), "hold_out": {"rows": 6, "seed": seed, "use": use}})
        return [row.problem for row in read_rows(cfg)]

    path.write_text("\n".join(lines))
    rest, held = part("rest"), part("held_out")
    assert len(held) == 6 and sorted(rest + held) == sorted(json.loads(line)["problem"] for line in lines)
    assert held != part("held_out", seed=1) and rest == [
        p for p in (json.loads(x)["problem"] for x in lines) if p in rest
    ]
    path.write_text("\n".join(reversed(lines)))
    assert (part("rest"), part("held_out")) == (rest[::-1], held[::-1])
    path.write_text("\n".join(lines[:6]))
    with pytest.raises(UserError, match=r"got 6 rows, want more than hold_out.rows \(6\)"):
        part("rest")
