"""The readers of JSON and of JSON lines: what they refuse, and with what message."""

import json
import os

import pytest

from dail_jax import strict_json
from dail_jax.errors import UserError

DEEP = b"[" * 50 + b"]" * 50

BAD = {
    b'{"a": 1, "b": 2, "a": 3}': "f:7:a: got the key twice, want it once",
    b'[{"x": {"\\u0007": 1, "\\u0007": 1}}]': "f:7:\ufffd: got the key twice, want it once",
    b"NaN": "f:7: got NaN, which is not a JSON value, want a number, text or null",
    b"[-Infinity]": "f:7: got -Infinity, which is not a JSON value, want a number, text or null",
    b"1e400": "f:7: got the number 1e400, which is too large",
    b"9" * 309 + b".5": "f:7: got the number " + "9" * 40 + ", which is too large",
    b"9" * 1001: "f:7: got a number of 1001 digits, want at most 1000",
    b'{"a": ["\\ud800"]}': "f:7:a: got half of a surrogate pair (U+D800), want Unicode text",
    b'{"\\udfff": 1}': "f:7: got half of a surrogate pair (U+DFFF), want Unicode text",
    b'["a\\u0000"]': "f:7: got a NUL character, want plain text",
    b'{"a": {"b": [["\\u0000"]]}}': "f:7:a: got a NUL character, want plain text",
    b"[" + DEEP + b"]": "f:7: got a line nested too deeply, want at most 50 levels",
    b'{"a":' * 200_000: "f:7: got a line nested too deeply, want at most 50 levels",
    b'"\xff"': "f:7: got a byte that is not UTF-8 at position 1",
    b'"a\x00"': "f:7: got a line that is not JSON: Invalid control character at at character 3",
    b"{} {}": "f:7: got a line that is not JSON: Extra data at character 4",
    b"": "f:7: got a line that is not JSON: Expecting value at character 1",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_json(text):
    with pytest.raises(UserError) as error:
        strict_json.parse(text, "f", 7)
    assert str(error.value) == BAD[text]


def test_good_json():
    text = '{"a": ["\\ud83d\\ude00", "\u2028", 1.5e300, -2, null], "b": {"a": true}}'
    assert strict_json.parse(text.encode(), "f") == json.loads(text) == strict_json.parse(text.encode(), "f", own=True)
    assert strict_json.parse(b"[" + DEEP[1:-1] + b"]", "f") == json.loads(DEEP)
    wide = [[i] for i in range(100)]  # many brackets, few levels
    assert strict_json.parse(json.dumps(wide), "f") == wide


def test_what_only_our_own_files_may_hold():
    values = strict_json.parse(b'[NaN, Infinity, "\\ud800 \\u0000"]', "f", own=True)
    assert str(values) == "[nan, inf, '\\ud800 \\x00']"
    for text in (b"1e400", b"9" * 5000, b'{"a": 1, "a": 1}', b"[" + DEEP + b"]"):
        with pytest.raises(UserError):
            strict_json.parse(text, "f", own=True)


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n \n[2]\n"last"')
    rows = list(strict_json.read_lines(path))
    assert [(r.number, r.offset, r.value) for r in rows] == [(1, 0, {"a": "\u2028"}), (3, 19, [2]), (4, 23, "last")]
    assert list(strict_json.read_at(path, [23, 19])) == ["last", [2]]
    assert [r.number for r in strict_json.read_lines(path, torn="drop")] == [1, 3]
    with pytest.raises(UserError, match=r"r.jsonl:4: got a torn last line, want the whole file: make it again$"):
        list(strict_json.read_lines(path, torn="refuse", advice="make it again"))


def test_files_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list.json").write_text("\n[1]\n")
    (tmp_path / "cut.json").write_text('{\n "a"')
    for name, message in (
        ("none", "no such file"),
        (".", "got a folder, want a file"),
        ("pipe", "got something that is not a regular file, want a file"),
    ):
        for read in (strict_json.read_object, lambda path: list(strict_json.read_lines(path))):
            with pytest.raises(UserError) as error:
                read(tmp_path / name)
            assert str(error.value) == f"{tmp_path / name}: {message}"
    with pytest.raises(UserError, match=r"list.json: got a list, want a JSON object"):
        strict_json.read_object(tmp_path / "list.json")
    with pytest.raises(UserError, match=r"cut.json: got a file that is not JSON: .* at line 2, character 5"):
        strict_json.read_object(tmp_path / "cut.json")
