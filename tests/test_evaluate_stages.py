"""evaluate, grade and compare on a random model of bytes that thinks: budgets, choices, ungraded sets, the schema."""

import copy
import functools
import json
import re

import pytest
import tiny
import torch
import transformers
from test_text import byte_tokenizer

from dail_jax import config as config_lib
from dail_jax import launch, rundir
from dail_jax.data.prompts import PromptBuilder
from dail_jax.data.records import read_rows
from dail_jax.errors import UserError
from dail_jax.evaluate import answers, files, protocol
from dail_jax.evaluate.answers import AnswerType, Verdict
from dail_jax.evaluate.grading import Grader
from dail_jax.model import transformer
from dail_jax.sample import engine
from dail_jax.stages import evaluate, recipes
from dail_jax.text import load_tokenizer

BUDGETS = (8, 16)
SAMPLES = 32


def dump(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, function that evaluates a configuration with changes and returns its run directory)."""
    # (prompts are padded to a common length: each length class is a program to compile)
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(3)
    cfg = transformers.Qwen3Config(
        vocab_size=260,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=None,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    transformers.Qwen3ForCausalLM(cfg).save_pretrained(root / "model")
    byte_tokenizer(root / "model")
    (root / "t.txt").write_text("{{problem}}\n{{choices}}")
    (root / "plain.txt").write_text("{{problem}}")
    sums = dump(
        root / "sums.jsonl",
        [{"problem_id": f"s{i}", "problem": f"{i}+{i}?".rjust(27, "."), "answer": str(2 * i)} for i in (1, 2)],
    )
    proofs = dump(root / "proofs.jsonl", [{"problem_id": "p", "problem": "Prove!".rjust(27, ".")}])
    quiz = dump(root / "quiz.jsonl", [{"Q": "Red?".rjust(12, "."), "right": "r", "no": "g", "nor": "b"}])
    (root / "quiz.yaml").write_text(
        f"name: quiz\nanswer: choice\ntemplate: {root / 't.txt'}\n"
        f"rows: {{path: nowhere.jsonl, columns: {{problem: Q, answer: right, choices: [right, 'no', nor]}}}}\n"
    )
    tree = {
        "model": {"path": str(root / "model"), "dtype": "float32"},
        "prompts": {"student": str(root / "plain.txt"), "opening": "<think>\n"},
        "train": {"objective": "none"},
        "evaluate": {
            "samples": SAMPLES,
            "slots": 64,
            "bootstrap": 20,
            "budgets": list(BUDGETS),
            "force": {"text": "\\boxed{", "max_tokens": 3},
            "sampling": {"temperature": 0.6, "top_p": 0.95, "presence_penalty": 1.5, "max_tokens": 16},
            "benchmarks": [
                {"name": "sums", "rows": {"path": sums}},
                {"name": "proofs", "answer": "none", "rows": {"path": proofs}},
                {"from": str(root / "quiz.yaml"), "rows": {"path": quiz}},
            ],
        },
    }

    def run(name, **changes):
        path = root / f"{name}.yaml"
        whole = {**copy.deepcopy(tree), "run_dir": str(root / name)}
        for key, value in changes.items():
            config_lib.assign(whole, key.replace("__", "."), value)
        path.write_text(json.dumps(whole))
        with tiny.alone():
            assert tiny.run("evaluate", path) == 0
        return root / name

    return root, run


@pytest.fixture(scope="module")
def long_run(world):
    return world[1]("long")


@pytest.fixture(scope="module")
def thoughts_run(world):
    return world[1]("thoughts", evaluate__budget="thoughts")


@pytest.mark.parametrize(("kind", "budget"), [("all", 8), ("all", 16), ("thoughts", 8)])
def test_one_long_generation_cut_is_a_run_at_that_budget(world, long_run, thoughts_run, kind, budget):
    """All of a sample's row is the same: its tokens, its forced answer, its verdict; and so are the results."""
    long = {"all": long_run, "thoughts": thoughts_run}[kind]
    alone = world[1](
        f"{kind}{budget}",
        evaluate__budget=kind,
        evaluate__budgets=[budget],
        evaluate__sampling__max_tokens=budget,
    )
    rows = {(r["benchmark"], r["problem_id"], r["sample"]): r for r in tiny.lines(alone / "samples.jsonl")}
    cut = [r for r in tiny.lines(long / "samples.jsonl") if r["budget"] == budget]
    assert len(rows) == len(cut) == 4 * SAMPLES
    assert all(rows[r["benchmark"], r["problem_id"], r["sample"]] == r for r in cut)
    mine, theirs = (json.loads((run / "results.json").read_text()) for run in (long, alone))
    assert mine["budget"] == theirs["budget"] == kind
    for name, found in mine["benchmarks"].items():
        assert found[str(budget)] == theirs["benchmarks"][name][str(budget)]


def test_thoughts_and_forced_answers(long_run):
    rows = tiny.lines(long_run / "samples.jsonl")
    # raw: with the tag that the prompt opened and those that the model wrote, which this tokenizer has as control
    # tokens, but without the token that ended the reply
    assert all(r["text"].startswith("<think>\n") and not r["text"].endswith("<|end|>") for r in rows)
    # This model answers nothing by itself: it is always asked, but where nothing is graded.
    assert {r["finish"] for r in rows if r["benchmark"] != "proofs"} == {"forced"}
    assert {r["finish"] for r in rows if r["benchmark"] == "proofs"} == {"stop", "length"}
    for r in rows:
        assert r["tokens"] <= r["budget"] and r["answer_tokens"] == 0
        if r["finish"] == "forced":
            close = "" if "</think>" in r["text"] else "\n</think>"
            assert r["forced_text"].startswith(close + "\\boxed{") and 1 <= r["forced_tokens"] <= 3
        else:
            assert r["forced_text"] is None and r["forced_tokens"] == 0
            assert (r["finish"] == "stop") == (r["tokens"] < r["budget"]) or r["tokens"] == r["budget"]
    forced = [r for r in rows if r["finish"] == "forced"]
    short, full = (
        {(r["benchmark"], r["problem_id"], r["sample"]): r for r in forced if r["budget"] == b} for b in BUDGETS
    )
    # drawn once for each cut, from its own tokens: the same answer where the larger budget cuts nothing more
    other = [(short[key], full[key]) for key in short if short[key]["tokens"] < full[key]["tokens"]]
    assert len(other) > 50 and sum(a["forced_text"] == b["forced_text"] for a, b in other) < len(other) / 4
    same = [(short[key], full[key]) for key in short if short[key]["tokens"] == full[key]["tokens"]]
    assert same and all({**a, "budget": 16} == b for a, b in same)
    # cut in its thoughts, ended in them, cut in its answer
    found = {("</think>" in r["text"], r["tokens"] < r["budget"]) for r in forced}
    assert found == {(False, False), (False, True), (True, False)}


def figures(run):
    """Of the sampler."""
    return next(row for row in tiny.lines(run / "metrics.jsonl") if "prefills" in row)


def test_answers_follow_from_samples_or_have_prompts_of_their_own(world, long_run, monkeypatch):
    """The same rows; where a row can go back, four prompts are read in all."""
    forced = {
        (r["problem_id"], r["sample"], r["tokens"]) for r in tiny.lines(long_run / "samples.jsonl") if r["forced_text"]
    }
    assert figures(long_run)["prefills"] == 4 and figures(long_run)["continued"] == len(forced) > 100
    monkeypatch.setattr(transformer, "can_rewind", lambda _: False)
    other = world[1]("prompts")
    assert figures(other)["prefills"] == 4 and "continued" not in figures(other)
    assert (other / "samples.jsonl").read_bytes() == (long_run / "samples.jsonl").read_bytes()


def test_a_run_that_has_samples_without_their_answers_draws_these(world, long_run, monkeypatch):
    root, folder, looks = world[0], world[0] / "stopped", []
    run = functools.partial(tiny.run, "evaluate", root / "long.yaml", f"run_dir={folder}")
    with tiny.alone(), monkeypatch.context() as patch:
        patch.setattr(rundir.Interrupt, "wanted", property(lambda _: looks.append(1) or len(looks) == 40))
        assert run() == launch.STOPPED
    texts, forced = (tiny.lines(folder / name) for name in recipes.DRAWN)
    assert len(texts) + len(forced) == 40
    graded = {f"{row['name']}/{row['sample']}" for row in texts if "proofs" not in row["name"]}
    answered = {row["name"].split("/", 2)[2] for row in forced}
    assert answered < graded
    asked = []
    monkeypatch.setattr(engine.Engine, "run", lambda *args, run=engine.Engine.run: asked.extend(args[1]) or run(*args))
    with tiny.alone():
        assert run() == 0
    again = {f"{one.name}/{s.sample}" for one in asked for s in one.drawn}
    assert graded - answered <= again <= graded and not any(one.name.startswith("force/") for one in asked)
    assert (folder / "samples.jsonl").read_bytes() == (long_run / "samples.jsonl").read_bytes()


def test_a_budget_of_thoughts_leaves_room_for_the_answer(thoughts_run):
    rows = [r for r in tiny.lines(thoughts_run / "samples.jsonl") if "</think>" in r["text"]]
    assert {r["answer_tokens"] for r in rows} == {3} and all(r["tokens"] <= r["budget"] for r in rows)
    at = {(r["benchmark"], r["problem_id"], r["sample"]): r for r in rows if r["budget"] == 8}
    later = [r for r in rows if r["budget"] == 16 and (r["benchmark"], r["problem_id"], r["sample"]) in at]
    assert len(later) == len(at) > 5  # what has thought in 8 tokens is the same in 16
    assert all({**at[r["benchmark"], r["problem_id"], r["sample"]], "budget": 16} == r for r in later)


def test_choices_are_shown_as_letters_and_graded(world, long_run):
    rows = [r for r in tiny.lines(long_run / "samples.jsonl") if r["benchmark"] == "quiz"]
    (row,) = read_rows(config_lib.load(long_run / "config.yaml").evaluate.benchmarks[2].rows, ("problem", "answer"))
    shown, gold = evaluate.question(row)
    assert row.choices == ("r", "g", "b") and sorted(shown.split("\n")) == [
        f"{c}. {shown[3 + 5 * i]}" for i, c in enumerate("ABC")
    ]
    assert f"{gold}. r" in shown and {r["gold"] for r in rows} == {gold}
    assert {r["reason"] for r in rows} <= {"equal", "different", "no answer", "unparseable"}


def test_the_order_of_choices_is_each_questions_own(tmp_path):
    rows = [
        {"q": f"Question {i}?", "options": list("wxyz"), "answer": answer}
        for i, answer in enumerate((2, "C", "y") * 40)
    ]
    path = dump(tmp_path / "q.jsonl", rows)
    cfg = config_lib.Dataset.model_validate({"path": path, "columns": {"problem": "q", "choices": "options"}})
    found = read_rows(cfg, ("problem", "answer"))
    assert {r.choices for r in found} == {("y", "w", "x", "z")} and {r.answer for r in found} == {"y"}
    letters = [evaluate.question(r)[1] for r in found]
    assert letters == [evaluate.question(r)[1] for r in found]
    assert all(15 <= letters.count(letter) <= 45 for letter in "ABCD")  # 30 each, 3 standard deviations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "v"}, "answer: got 'v', want a choice's text, letter or index from 0"),
        ({"answer": 4}, "answer: got 4, want a choice's text, letter or index from 0"),
        ({"answer": True}, "answer: got True, want"),
        ({"options": ["w", "w", "x"]}, "options: got an empty choice or the same one twice"),
        ({"options": ["w"]}, "options: got 1 choices, want a list of 2 to 26 choices"),
        ({"options": "wxyz"}, "options: got text, want a list"),
    ],
)
def test_bad_choices_are_named(tmp_path, change, message):
    path = dump(tmp_path / "q.jsonl", [{"problem": "?", "options": list("wxyz"), "answer": "w", **change}])
    cfg = config_lib.Dataset.model_validate({"path": path, "columns": {"choices": "options"}})
    with pytest.raises(UserError, match=re.escape(f"{path}:1:{message}")):
        read_rows(cfg, ("problem", "answer"))


def test_what_is_not_graded(long_run):
    rows = [r for r in tiny.lines(long_run / "samples.jsonl") if r["benchmark"] == "proofs"]
    assert {(r["answer"], r["correct"], r["reason"]) for r in rows} == {(None, None, "not graded")}
    results = json.loads((long_run / "results.json").read_text())
    cell = results["benchmarks"]["proofs"]["16"]
    assert cell["pass@k"] == cell["maj@k"] == cell["per_problem"] == {} and cell["problems"] == 1
    assert "proofs: budget=16, problems=1, samples=32, tokens" in protocol.headline(results)


class Length(AnswerType):
    """The number of characters of the answer part, right where it is even if the gold answer is."""

    def extract(self, part):
        return str(len(part))

    def gold_problem(self, gold, algebra):
        return None if gold.isdigit() else "want digits"

    def compare(self, gold, answer, algebra):
        equal = int(gold) % 2 == int(answer) % 2
        return Verdict(equal, "same parity" if equal else "other parity")

    def key(self, answer):
        return int(answer) // 10


def test_an_answer_type_from_outside(world, long_run, monkeypatch, capsys):
    """Registered under a name, it is what a configuration may ask for, and grades; unknown names stop every stage."""
    run = world[0] / "mine"
    run.mkdir()
    cfg = config_lib.with_overrides(
        config_lib.load(long_run / "config.yaml"),
        {"run_dir": str(run), "evaluate.benchmarks.0.answer": "lenght"},
        "test",
    )
    (world[0] / "mine.yaml").write_text(config_lib.dump(cfg))
    dump(run / "samples.jsonl", tiny.lines(long_run / "samples.jsonl"))
    monkeypatch.setitem(answers.ANSWERS, "length", Length())
    for stage in ("grade", "generate", "run"):
        assert tiny.run(stage, world[0] / "mine.yaml") == 2
        error = "error: evaluate.benchmarks.0.answer: got 'lenght', want one of math, integer, choice, none, length; "
        assert capsys.readouterr().err == error + "did you mean 'length'?\n"
    assert tiny.run("grade", world[0] / "mine.yaml", "evaluate.benchmarks.0.answer=length") == 0
    rows = [row for row in tiny.lines(run / "samples.jsonl") if row["benchmark"] == "sums"]
    assert {row["reason"] for row in rows} <= {"same parity", "other parity", "no answer"}
    part = [row["forced_text"] or row["text"].rpartition("</think>")[2] for row in rows if row["answer"]]
    assert [row["answer"] for row in rows if row["answer"]] == [str(len(text)) for text in part]
    lengths = {(row["problem_id"], int(row["answer"]) // 10, row["vote"]) for row in rows if row["answer"]}
    wrong = [(problem, length) for problem, length, vote in lengths if vote]
    assert len(wrong) == len(set(wrong)) and {row["vote"] for row in rows if row["correct"]} <= {0}
    with Grader() as grader:
        assert grader.check_gold("x", "length") == "got 'x', want digits" and grader.check_gold("7", "length") is None
        assert grader.votes([("length", ["11", "12", "21"], [Verdict(False, "")] * 3)]) == [[1, 1, 2]]


def documented(title: str) -> list[set[str]]:
    """The keys in each table of a section of docs/results.md."""
    text = (tiny.ROOT / "docs" / "results.md").read_text()
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [{key for line in t.splitlines()[2:] for key in re.findall("`(.+?)`", line.split("|")[1])} for t in tables]


def test_the_files_have_the_documented_keys(long_run):
    (keys,) = documented("samples.jsonl")
    assert all(row.keys() == keys for row in tiny.lines(long_run / "samples.jsonl"))
    top, cell = documented("results.json")
    results = json.loads((long_run / "results.json").read_text())
    assert results.keys() == top and results["schema"] == files.SCHEMA == 1
    assert all(found.keys() == cell for budgets in results["benchmarks"].values() for found in budgets.values())


def test_grade_again_needs_no_model(world, long_run, capsys):
    run = world[0] / "again"
    run.mkdir()
    cfg = config_lib.with_overrides(
        config_lib.load(long_run / "config.yaml"), {"run_dir": str(run), "model.path": "nowhere"}, "test"
    )
    (world[0] / "again.yaml").write_text(config_lib.dump(cfg))
    rows = tiny.lines(long_run / "samples.jsonl")
    dump(run / "samples.jsonl", rows)
    assert tiny.run("grade", world[0] / "again.yaml") == 0
    assert f"grade: {run}: 0 of {len(rows)} verdicts changed" in capsys.readouterr().out
    assert (run / "samples.jsonl").read_bytes() == (long_run / "samples.jsonl").read_bytes()
    before, after = (json.loads((r / "results.json").read_text()) for r in (long_run, run))
    assert after == {**before, "arm": "again"}
    # an answer that these rules find, and those that wrote the file did not
    at = next(i for i, r in enumerate(rows) if r["benchmark"] == "sums" and not r["correct"] and r["budget"] == 16)
    rows[at] |= {
        "forced_text": None,
        "finish": "stop",
        "text": f"<think>\n\\boxed{{9}}</think> \\boxed{{{rows[at]['gold']}.0}}",
    }
    dump(run / "samples.jsonl", rows)
    assert tiny.run("grade", world[0] / "again.yaml") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"1 of {len(rows)} verdicts changed 1 from correct=False to correct=True" in out
    graded = tiny.lines(run / "samples.jsonl")
    assert (graded[at]["answer"], graded[at]["correct"], graded[at]["reason"]) == (
        f"{rows[at]['gold']}.0",
        True,
        "equal",
    )
    count = sum(
        c for c, _ in json.loads((run / "results.json").read_text())["benchmarks"]["sums"]["16"]["per_problem"].values()
    )
    assert count == 1 + sum(c for c, _ in before["benchmarks"]["sums"]["16"]["per_problem"].values())
    whole = (run / "samples.jsonl").read_bytes()
    for damaged, message in (
        (whole[:-20], f":{len(rows)}: got a torn last line, want the whole file"),
        (whole[:-1], f":{len(rows)}: got a torn last line, want the whole file"),
        (whole.replace(b'"gold":', b'"god":', 1), ":1:gold: missing"),
        (b"[]\n" + whole, ":1: got a list, want a JSON object"),
        (b"", ": got an empty file, want samples"),
    ):
        (run / "samples.jsonl").write_bytes(damaged)
        assert tiny.run("grade", world[0] / "again.yaml") == 2
        assert capsys.readouterr().err.startswith(f"error: {run / 'samples.jsonl'}{message}")
        assert (run / "samples.jsonl").read_bytes() == damaged  # nothing is written
    (run / "samples.jsonl").unlink()
    assert tiny.run("grade", world[0] / "again.yaml") == 2
    assert "no samples: run the stage `evaluate` first" in capsys.readouterr().err


def test_gold_answers_that_cannot_be_graded_against(world, long_run, capsys):
    """They stop an evaluation before anything is sampled; or their rows are skipped, as if they were not there."""
    root, run = world
    rows = tiny.lines(root / "sums.jsonl")
    rows.insert(1, {"problem_id": "odd", "problem": "9^9^9?".rjust(27, "."), "answer": "9^{9^{9^9}}"})
    path = dump(root / "odd.jsonl", rows)
    cfg = json.loads((root / "long.yaml").read_text())["evaluate"]
    cfg["benchmarks"][0] = {"name": "sums", "ungradable": "skip", "rows": {"path": path}}
    capsys.readouterr()
    skipping = run("skipping", evaluate=cfg)
    said = "evaluate: 1 of 3 problems of sums skipped: their gold answers cannot be graded against: odd\n"
    assert said in capsys.readouterr().out
    assert (skipping / "samples.jsonl").read_bytes() == (long_run / "samples.jsonl").read_bytes()
    refused = ["run_dir=nowhere", "evaluate.benchmarks.0.ungradable=refuse"]
    assert tiny.run("evaluate", root / "skipping.yaml", *refused) == 2
    assert f"error: {path}:2:answer: got '9^{{9^{{9^9}}}}', want mathematics" in capsys.readouterr().err
    dump(root / "odd.jsonl", rows[1:2])
    assert tiny.run("evaluate", root / "skipping.yaml") == 2  # nothing would be left
    assert f"error: {path}:1:answer: got" in capsys.readouterr().err


ENTRIES = sorted((tiny.ROOT / "configs" / "benchmarks").glob("*.yaml"))


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_entries_of_benchmarks(path, tmp_path, monkeypatch):
    """Each is valid, named like its file, and reads rows with the columns that it says."""
    monkeypatch.chdir(tiny.ROOT)
    tree = {**tiny.tree(tmp_path / "r"), "evaluate": {"benchmarks": [{"from": str(path.relative_to(tiny.ROOT))}]}}
    (benchmark,) = config_lib.build(tree, "test").evaluate.benchmarks
    assert benchmark.name.lower() == path.stem.removeprefix("microworld_")
    assert benchmark.ungradable == ("skip" if path.stem == "imo_answerbench" else "refuse")
    if not path.stem.startswith("microworld"):
        columns = benchmark.rows.columns
        row = {columns.problem: "Why?", columns.answer: "42", columns.problem_id: 7}
        names = columns.choices if isinstance(columns.choices, tuple) else ()
        row |= {name: str(42 + i) for i, name in enumerate(names)}
        rows = {"path": dump(tmp_path / "rows.jsonl", [row]), "columns": columns.model_dump()}
        benchmark = benchmark.model_copy(update={"rows": config_lib.Dataset.model_validate(rows)})
    rows = read_rows(benchmark.rows, ("problem", "answer"))
    with Grader(workers=1) as grader:
        assert all(grader.check_gold(evaluate.question(row)[1], benchmark.answer) is None for row in rows)


def test_keys_beside_from_replace_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    path = tiny.write(
        tmp_path / "r", evaluate__benchmarks=[{"from": "configs/benchmarks/gpqa_diamond.yaml", "name": "g"}]
    )
    (one,) = config_lib.load(path, ["evaluate.benchmarks.0.rows.path=my.jsonl"]).evaluate.benchmarks
    assert (one.name, one.rows.path, one.answer, one.rows.columns.problem) == ("g", "my.jsonl", "choice", "Question")
    with pytest.raises(UserError, match=r"configs/none\.yaml: no such file"):
        config_lib.load(path, ["evaluate.benchmarks.0.from=configs/none.yaml"])
    with pytest.raises(UserError, match=r"benchmarks\.0\.templat: unknown key; did you mean 'template'"):
        config_lib.load(path, ["evaluate.benchmarks.0.templat=x"])


def test_the_package_shows_choices_by_its_own_template(tmp_path):
    tokenizer = load_tokenizer(byte_tokenizer(tmp_path / "t"))
    builder = PromptBuilder(tokenizer, config_lib.Prompts(), config_lib.Waypoints())
    text = tokenizer.decode(builder.student_only("Which?", None, "A. {{answer}}\nB. two"), keep_special=True)
    assert "Which?\n\nA. {{answer}}\nB. two\n" in text and "\\boxed{}" in text
    (tmp_path / "bad.txt").write_text("{{problem}}")
    with pytest.raises(UserError, match=r"bad.txt: got a template without \{\{choices\}\}"):
        builder.student_only("Which?", str(tmp_path / "bad.txt"), "A. 1\nB. 2")
