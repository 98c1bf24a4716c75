"""Traces: their file, their schema, and whether they were drawn under the prompts that they are trained with."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny

from dail_jax import config
from dail_jax.data import traces
from dail_jax.data.prompts import PromptBuilder
from dail_jax.data.records import read_rows
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError
from dail_jax.text import load_tokenizer

TEMPLATES = {role: str(tiny.ASSETS / "templates" / f"{role}.txt") for role in ("student", "privileged", "negative")}
VOCABULARY = 64
FILE = Path("t.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny.ASSETS / "tokenizer")


@pytest.fixture(scope="module")
def rows():
    return read_rows(config.Dataset(path=str(tiny.ASSETS / "train.jsonl"), limit=3))


def prompts_of(rows, tokenizer, **templates):
    builder = PromptBuilder(tokenizer, config.Prompts(**{**TEMPLATES, **templates}), config.Waypoints())
    return {row.problem_id: views for row, views in zip(rows, builder.build_views(rows), strict=True)}


def drawn(rows, tokenizer, roles=traces.ROLES):
    """A trace of each row's solution, as if it was drawn under today's prompts."""
    out = []
    for problem_id, (prompts,) in prompts_of(rows, tokenizer).items():
        ids = tuple(prompts.expert)
        hashes = {role: traces.prompt_hash(getattr(prompts, role)) for role in roles}
        text = tokenizer.decode(ids)
        out.append(
            Trace(problem_id=problem_id, sample=0, prompt_hash=hashes, response_ids=ids, text=text, finish="stop")
        )
    return out


def changed(rows, field, place=1):
    """The rows, with another digit in a field of one of them."""
    digits = str.maketrans("0123456789", "1234567890")
    other = dataclasses.replace(rows[place], **{field: getattr(rows[place], field).translate(digits)})
    return [*rows[:place], other, *rows[place + 1 :]]


def refused(found, prompts, tokenizer, path=FILE, vocabulary=VOCABULARY):
    with pytest.raises(UserError) as caught:
        traces.verify(found, prompts, tokenizer, vocabulary, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def other_tokenizer(folder):
    """The micro-world's tokenizer with other ids for digits."""
    shutil.copytree(tiny.ASSETS / "tokenizer", folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    ids = [vocabulary[str(digit)] for digit in range(10)]
    vocabulary |= {str(digit): ids[digit - 1] for digit in range(10)}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("roles", [("student",), ("privileged",), traces.ROLES])
def test_traces_of_these_prompts_pass(rows, tokenizer, roles):
    prompts = prompts_of(rows, tokenizer)
    traces.verify(drawn(rows, tokenizer, roles), prompts, tokenizer, VOCABULARY, FILE)
    bare = [trace.model_copy(update={"prompt_hash": {}}) for trace in drawn(rows, tokenizer)]
    traces.verify(bare, prompts_of(changed(rows, "problem"), tokenizer), tokenizer, VOCABULARY, FILE)


def test_another_problem_is_named(rows, tokenizer):
    message = refused(drawn(rows, tokenizer), prompts_of(changed(rows, "problem"), tokenizer), tokenizer)
    assert message.startswith(
        f"t.jsonl:2:problem: got a trace that was drawn from another text of problem {rows[1].problem_id!r}: want"
    )


@pytest.mark.parametrize("roles", [("privileged",), traces.ROLES])
def test_another_solution_is_named(rows, tokenizer, roles):
    message = refused(drawn(rows, tokenizer, roles), prompts_of(changed(rows, "solution"), tokenizer), tokenizer)
    assert message.startswith("t.jsonl:2:solution: got a trace that was drawn with another solution, or another cut")
    assert repr(rows[1].problem_id) in message


@pytest.mark.parametrize("role", traces.ROLES)
def test_another_template_is_named(rows, tokenizer, tmp_path, role):
    template = tmp_path / "template.txt"
    template.write_text("add {{problem}}" + (" {{solution}}" if role == "privileged" else ""))
    prompts = prompts_of(rows, tokenizer, **{role: str(template)})
    message = refused(drawn(rows, tokenizer), prompts, tokenizer)
    assert message.startswith(f"t.jsonl:1:template: got a trace that was drawn with another template (prompts.{role},")


def test_another_tokenizer_is_named(rows, tokenizer, tmp_path):
    other = load_tokenizer(other_tokenizer(tmp_path / "tokenizer"))
    message = refused(drawn(rows, tokenizer), prompts_of(rows, other), other)
    assert message.startswith("t.jsonl:1:tokenizer: got a trace that was drawn with another tokenizer")


def test_unknown_problems_and_tokens_are_named(rows, tokenizer):
    found, prompts = drawn(rows, tokenizer), prompts_of(rows[:2], tokenizer)
    want = f"t.jsonl:3:problem_id: got {rows[2].problem_id!r}, which is not in the data"
    assert refused(found, prompts, tokenizer) == want
    top = max(found[0].response_ids)
    message = refused(found[:1], prompts, tokenizer, vocabulary=top)
    assert message == f"t.jsonl:1:response_ids: got a token id at or above the model's vocabulary of {top}"


def test_training_refuses_traces_of_another_solution(tmp_path, pipeline, capsys):
    """A copy of the file, so that no run directory knows how it was made."""
    lines = (tiny.ASSETS / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[4])
    lines[4] = json.dumps({**row, "solution": row["solution"].replace("; ", " ; ", 1).replace("=", "= ", 1)})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copy(pipeline / "traces.jsonl", tmp_path / "t.jsonl")
    changes = {"traces": str(tmp_path / "t.jsonl"), "data__path": str(tmp_path / "rows.jsonl")}
    assert tiny.run("train", tiny.write(tmp_path / "r", **changes)) == 2
    err = capsys.readouterr().err
    number = next(n for n, t in enumerate(traces.read(tmp_path / "t.jsonl"), 1) if t.problem_id == row["problem_id"])
    assert err.startswith(f"error: {tmp_path / 't.jsonl'}:{number}:solution: got a trace") and err.count("\n") == 1


def test_what_is_read_is_written_again_byte_for_byte(tmp_path, pipeline):
    found = traces.read(pipeline / "traces.jsonl")
    traces.write(tmp_path / "t.jsonl", found)
    assert (tmp_path / "t.jsonl").read_bytes() == (pipeline / "traces.jsonl").read_bytes()
    places = [offset for offset, _ in traces.stream(pipeline / "traces.jsonl")]
    assert list(traces.read_at(pipeline / "traces.jsonl", places[3:5])) == found[3:5]


def test_a_torn_last_line_is_damage_unless_a_reader_expects_it(tmp_path):
    path = tmp_path / "t.jsonl"
    row = {"problem_id": "p", "sample": 0, "response_ids": [1], "text": "x", "finish": "stop"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "sample": 1}))
    with pytest.raises(UserError, match=r"t\.jsonl:2: got a torn last line, want the whole file: generate again"):
        traces.read(path)
    assert [trace.sample for _, trace in traces.stream(path, torn="drop")] == [0]


def test_every_field_is_documented():
    """In the order of the file, and marked as one that may be missing if it has a default."""
    text = (tiny.ROOT / "docs" / "traces.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", text, re.M)
    fields = Trace.model_fields.items()
    assert table == [(name, "no" if field.is_required() else "yes") for name, field in fields]
