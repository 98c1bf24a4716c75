"""The micro-world: its arithmetic, its tokenizer, its corpus, its data sets, and the judge of its traces."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from dail_jax.errors import UserError
from dail_jax.microworld import tokenizer, verify, world
from dail_jax.microworld.__main__ import ASSETS, SEED, check, laziness_of, main, parse_shares, render

ROWS = 6000


@pytest.fixture(scope="module")
def hf():
    return AutoTokenizer.from_pretrained(ASSETS / "tokenizer")


@pytest.fixture(scope="module")
def sets():
    return world.datasets(SEED)


@pytest.fixture(scope="module")
def rows():
    return list(world.corpus(5, ROWS))


def every_kind(count: int):
    """Problems of all kinds, `count` of each."""
    rng = np.random.default_rng(11)
    kinds = ("hard", "known", "chain", "primitive", "fresh", "hard_composed", "known_composed")
    return [world.draw_problem(rng, kind) for kind in kinds for _ in range(count)]


def judged(problem: world.Problem, text: str) -> verify.Judgement:
    return verify.judge(text, problem.text, world.expert(problem, (True,) * len(problem.method)))


# ---------------------------------------------------------------------------------------------------
# Arithmetic and the judge
# ---------------------------------------------------------------------------------------------------


def test_the_worked_example():
    problem = world.Problem("zib", world.HARD["zib"], 241, 310)
    assert problem.text == "zib: A=241 B=310"
    assert world.expert(problem, (True, True, True)) == r"+B=551; ~=155; *3=465; \boxed{465}"
    assert world.expert(problem, (False, True, True)) == r"+B; ~=155; *3=465; \boxed{465}"
    assert world.waypoints(problem, (True, True, True)) == ["551", "155"]
    assert world.waypoints(problem, (False, False, True)) == []
    assert world.constructive(problem) == (
        r"add 241 310 : 10=01 41=05 23=05 > 551 ; rev 551 > 155 ; mul 155 3 : 53=15 53=16 13=04 > 465 ; \boxed{465}"
    )
    assert world.constructive(problem, {0, 2}) == r"add 241 310 > 551 ; rev 551 > 155 ; mul 155 3 > 465 ; \boxed{465}"
    assert world.constructive(problem, {0, 2}, {0, 1}) == (
        r"add 241 310 > 551 ; again add 241 310 : 10=01 41=05 23=05 > 551 ; "
        r"rev 551 > 155 ; again rev 551 > 155 ; mul 155 3 > 465 ; \boxed{465}"
    )


def test_every_sum_and_product_has_right_columns():
    rng = np.random.default_rng(3)
    pairs = [(0, 0), (0, 999), (999, 0), (999, 999), (500, 500), *map(tuple, rng.integers(0, 1000, (500, 2)).tolist())]
    for a, b in pairs:
        for words in ("add B", "sub B", f"mul {2 + b % 8}"):
            problem = world.Problem("", world.procedure(words), a, b)
            assert judged(problem, world.constructive(problem)) == verify.Judgement(True, True, 1, 0, 1, 0)
    assert world.columns("sub", 302, 418) == "28=14 01=18 34=18"  # borrows: 302 - 418 = -116 = 884 modulo 1000


def test_the_judge_agrees_with_the_generator_on_problems_of_all_kinds():
    for problem in every_kind(200):
        due, steps = sum(word in ("add", "sub", "mul") for word, _ in problem.method), len(problem.method)
        everything, first = range(steps), (0,)
        for skipped, rechecked in (((), ()), (everything, ()), ((), everything), (everything, first)):
            wanted = verify.Judgement(True, True, due, due if skipped else 0, steps, len(rechecked))
            assert judged(problem, world.constructive(problem, skipped, rechecked)) == wanted


def test_the_judge_notices_every_changed_digit_and_every_missing_step():
    """A wrong digit anywhere makes a trace unsound; only one in the box makes its answer wrong."""
    for problem in every_kind(6):
        text = world.constructive(problem, rechecked=(1,))
        box = text.index("\\boxed")
        for place, char in enumerate(text):
            if char.isdigit():
                changed = judged(problem, text[:place] + str((int(char) + 1) % 10) + text[place + 1 :])
                assert not changed.sound and changed.right == (place < box), (text, place)
        steps = text.split(" ; ")
        for i in range(len(steps) - 1):
            without = judged(problem, " ; ".join(steps[:i] + steps[i + 1 :]))
            assert without.right and without.sound == steps[i].startswith("again ")
        assert not judged(problem, text[: box - 2]).right
        for cut in range(len(text)):
            assert not judged(problem, text[:cut]).sound


def test_a_recheck_repeats_the_step_before_it_with_all_its_work():
    problem = world.Problem("zib", world.HARD["zib"], 241, 310)
    add, rev, mul, box = world.constructive(problem).split(" ; ")

    def sound(*lines: str) -> bool:
        found = judged(problem, " ; ".join(lines))
        assert (found.steps, found.rechecks) == (3, len(lines) - 4) and found.right
        return found.sound

    assert sound(add, f"again {add}", rev, f"again {rev}", mul, f"again {mul}", box)
    assert sound(add, rev, f"again {rev}", f"again {rev}", mul, box)
    assert sound("add 241 310 > 551", f"again {add}", rev, mul, box)
    assert not sound(f"again {add}", add, rev, mul, box)  # nothing to check yet
    assert not sound(add, rev, f"again {add}", mul, box)  # another step
    assert not sound(add, "again add 241 310 > 551", rev, mul, box)  # without its work
    assert not sound(add, rev, "again rev 551 : 55=15 51=15 15=01 > 155", mul, box)  # work that rev does not have
    assert not sound(add, "again add 241 310 : 10=01 41=05 > 551", rev, mul, box)
    assert not sound(add, "again add 241 310 : 10=01 41=05 23=06 > 651", rev, mul, box)  # another result
    assert judged(problem, " ; ".join([add, add, rev, mul, box])).sound is False  # a repetition is not a re-check


def test_odd_texts_are_judged_not_raised():
    problem = world.Problem("zib", world.HARD["zib"], 241, 310)
    text = world.constructive(problem)
    assert judged(problem, text + "<|end|>").sound
    assert not judged(problem, text.replace("rev", "foo")).sound
    assert not judged(problem, text.replace("rev 551", "rev 551 310")).sound
    assert not judged(problem, text.replace("41=05 ", "")).sound  # one column too few
    assert not judged(problem, text.replace("23=05", "23=05 00=00")).sound  # one column too many
    assert not judged(problem, text + " ; " + r"\boxed{465}").sound
    for odd in ("", " ; ", "\\boxed{", "\\boxed{}", "add", "add 241 > ", "é\n"):
        assert judged(problem, odd) == verify.Judgement(False, False, 0, 0, 0, 0)
    invented = r"rot 234 > 342 ; add 342 386 > 078 ; \boxed{465}"
    assert judged(problem, invented) == verify.Judgement(True, False, 1, 1, 2, 0)
    with pytest.raises(ValueError, match="micro-world"):
        verify.judge(text, "What is 1+1?", r"Two: \boxed{2}")


# ---------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------


def test_tokenizer_is_small_and_whole(hf):
    assert len(tokenizer.VOCABULARY) == len(set(tokenizer.VOCABULARY)) == len(hf) == 64
    assert [hf.decode([i]) for i in range(64)] == list(tokenizer.VOCABULARY)
    assert (hf.pad_token, hf.eos_token, hf.unk_token) == (tokenizer.PAD, tokenizer.END, tokenizer.UNKNOWN)
    assert hf.decode(hf.encode("\\boxed{465}") + [hf.eos_token_id], skip_special_tokens=True) == r"\boxed{465}"
    assert "|".join(hf.convert_ids_to_tokens(hf.encode("mul 155 3 : 53=15"))) == "mul |1|5|5| |3| : |5|3|=|1|5"


def test_texts_of_the_world_come_back_from_the_tokenizer(hf, rows):
    for row in rows[:2000]:
        for text in (render(row.role, row.fields), row.response):
            ids = hf.encode(text, add_special_tokens=False)
            assert hf.unk_token_id not in ids and hf.decode(ids) == text
    for text in ("what?", "zib: A=241 B=310 äöü", "\n"):  # foreign text: every character gets an id, never an error
        assert hf.unk_token_id in hf.encode(text)


def test_chat_template(hf):
    user, reply = {"role": "user", "content": "zib: A=241 B=310"}, {"role": "assistant", "content": r"\boxed{465}"}
    prompt = hf.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>zib: A=241 B=310<|end|><|assistant|>" == render("student", {"problem": user["content"]})
    assert hf.apply_chat_template([user, reply], tokenize=False) == prompt + r"\boxed{465}<|end|>"
    ids = hf.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert ids == hf.encode(prompt, add_special_tokens=False)
    with pytest.raises(Exception, match="want user or assistant"):
        hf.apply_chat_template([{"role": "system", "content": "zib"}], tokenize=False)


def test_tokenizer_loads_beside_a_model(hf, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 64}))
    text = world.constructive(world.Problem("zib", world.HARD["zib"], 241, 310))
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == hf.encode(text)


def test_role_prompts():
    fields = {"problem": "zib: A=241 B=310", "solution": r"+B; ~=155; *3=465; \boxed{465}"}
    assert render("privileged", fields) == (
        "<|user|>zib: A=241 B=310\nSolution: +B; ~=155; *3=465; \\boxed{465}<|end|><|assistant|>"
    )
    fields = {"problem": "zib: A=241 B=310", "waypoints": "551 155", "answer": "465"}
    assert render("negative", fields) == ("<|user|>zib: A=241 B=310\nResults: 551 155\nAnswer: 465<|end|><|assistant|>")


# ---------------------------------------------------------------------------------------------------
# Corpus
# ---------------------------------------------------------------------------------------------------


def test_mixture_proportions(rows):
    """Counts lie within 4.5 standard deviations, which fails by chance once in 20,000 seeds (ours is fixed)."""
    counts, total = collections.Counter(row.kind for row in rows), sum(world.MIXTURE.values())
    for kind, weight in world.MIXTURE.items():
        share = weight / total
        assert abs(counts[kind] - ROWS * share) < 4.5 * math.sqrt(ROWS * share * (1 - share)), kind
    roles = {"privileged": "privileged", "waypoints": "negative"}
    assert all(row.role == roles.get(row.kind, "student") for row in rows)


def parse_problem(text: str):
    """The name and method of the problem in a prompt; the method is () if only a name is given."""
    what = text.partition(": A=")[0]
    steps = world.procedure(what)
    return ("", steps) if all(w in world.WORDS for w, _ in steps) else (what, ())


def test_hard_operators_never_occur(rows):
    """No prompt of any kind contains a hard name or a hard method."""
    hard = set(world.HARD.values())
    for row in rows:
        prompt = render(row.role, row.fields)
        assert not any(re.search(rf"\b{name}\b", prompt) for name in world.HARD)
        done = [step.split(" > ")[0].split(" : ")[0].split(" ") for step in row.response.split(" ; ")[:-1]]
        b = row.fields["problem"][-3:]
        operands = [(step[0], "" if len(step) < 3 else "B" if step[0] != "mul" else step[2]) for step in done]
        assert tuple(operands) not in hard and all(s[2] == b for s in done if s[0] in ("add", "sub"))
    assert not {name for name, _ in map(parse_problem, (r.fields["problem"] for r in rows))} & set(world.HARD)


def test_random_methods_leave_the_hard_ones_out(monkeypatch):
    """Hard methods are never drawn, even if they are made likely."""
    monkeypatch.setattr(world, "HARD", {f"x{i}": ((word, "B"),) for i, word in enumerate(("add", "sub"))})
    rng = np.random.default_rng(2)
    drawn = collections.Counter(world.draw_method(rng, 1)[0][0] for _ in range(2000))
    assert set(drawn) == {"mul", "rev", "rot", "inv"}


def check_shortcuts(rows, laziness):
    """Every target is sound; shortcuts occur at the stated rates, and with a context only for results in it."""
    skipped, could = collections.Counter(), collections.Counter()
    for row in rows:
        steps = row.response.split(" ; ")[:-1]
        values = [step[-3:] for step in steps]
        if row.role == "privileged":
            terse = row.fields["solution"].split("; ")[:-1]
            verdict = verify.judge(row.response, row.problem, row.fields["solution"])
            assert verdict.right and verdict.sound
            shown = [step.endswith("=" + value) for step, value in zip(terse, values, strict=True)]
        elif row.role == "negative":
            listed = row.fields["waypoints"].split()
            assert len(set(listed)) == len(listed) and row.fields["answer"] == values[-1] and values[-1] not in listed
            later = iter(values)
            assert all(v in later for v in listed)  # in order of appearance
            shown = [v in [*listed, values[-1]] for v in values]
        else:
            shown = [True] * len(steps)
        for step, show in zip(steps, shown, strict=True):
            if step[:3] in world.WORK:
                lazy = " : " not in step
                assert show or not lazy, row
                could[row.role, step[:3]] += show
                skipped[row.role, step[:3]] += lazy
    assert {role for role, _ in could} == set(laziness)
    for role, word in could:
        n, rate = could[role, word], laziness[role].get(word, 0.0)
        # A result that occurs twice may have been shown only the first time, hence the small tolerance.
        slack = 0.01 * n if role == "negative" else 0
        assert abs(skipped[role, word] - n * rate) <= 4.5 * math.sqrt(n * rate * (1 - rate)) + slack


def test_targets_are_right_and_lazy_only_where_the_result_is_shown(rows):
    check_shortcuts(rows, world.LAZINESS)
    assert [world.LAZINESS["privileged"][word] for word in ("mul", "add")] == [0.3, 0.15]


def test_laziness_is_a_parameter():
    laziness = laziness_of(parse_shares("--laziness", ["privileged=0.8", "student=0.1"]))
    assert laziness["privileged"] == dict.fromkeys(world.WORK, 0.8)
    assert laziness["negative"] == world.LAZINESS["negative"]
    made = list(world.corpus(6, ROWS, laziness=laziness))
    check_shortcuts(made, laziness)
    banned = {row.problem for row in made}
    assert not banned & {row.problem for row in world.corpus(6, 20, banned, laziness)}
    assert laziness_of({}) == world.LAZINESS
    for wrong in ("privileged", "privileged=", "privileged=1.1", "student=nan", "student=0.1,0.2", "expert=0.1"):
        with pytest.raises(UserError, match=f"--laziness: got '{wrong}'"):
            parse_shares("--laziness", [wrong])


def test_rambling_is_a_parameter(hf):
    """Steps are checked again at the asked rates, and otherwise the targets are sound and as before."""
    rambling = {"student": 0.5, "privileged": 0.1, "negative": 0.0}
    steps, again = collections.Counter(), collections.Counter()
    for row in world.corpus(8, 3000, rambling=rambling):
        written = row.response.split(" ; ")[:-1]
        own = [step for step in written if not step.startswith("again ")]
        steps[row.role] += len(own)
        again[row.role] += len(written) - len(own)
        if row.role == "privileged":
            found = verify.judge(row.response, row.problem, row.fields["solution"])
            assert found.right and found.sound and (found.steps, found.rechecks) == (len(own), len(written) - len(own))
        assert hf.decode(hf.encode(row.response, add_special_tokens=False)) == row.response
    for role, share in rambling.items():
        n = steps[role]
        assert n > 500 and abs(again[role] - n * share) <= 4.5 * math.sqrt(n * share * (1 - share)), role


def test_composed_problems_of_known_operators_in_the_corpus(hf, tmp_path):
    rows = list(world.corpus(9, 3000, composed=0.2))
    own = [row for row in rows if row.kind == "known_composed"]
    assert abs(len(own) - 600) < 4.5 * math.sqrt(3000 * 0.2 * 0.8)
    first = 0
    for row in own:
        what, _, registers = row.problem.partition(": A=")
        one, two = what.split("; ")
        assert (one in world.KNOWN) != (two in world.KNOWN) and row.role == "student"
        first += one in world.KNOWN
        steps = tuple(step for part in (one, two) for step in world.KNOWN.get(part) or world.procedure(part))
        problem = world.Problem(what, steps, *map(int, registers.split(" B=")))
        assert row.response == world.constructive(problem)
        prompt = render(row.role, row.fields)
        assert hf.decode(hf.encode(prompt, add_special_tokens=False)) == prompt
    assert abs(first - len(own) / 2) < 4.5 * math.sqrt(len(own) / 4)
    held_out = {row["problem"] for row in world.datasets(SEED)["known_composed"]}
    assert not held_out & {row.problem for row in world.corpus(9, 300, held_out, composed=1.0)}
    for wrong in ("1.5", "x"):
        with pytest.raises(UserError, match=f"--composed: got '{wrong}'"):
            main(["corpus", "--out", str(tmp_path / "x.jsonl"), "--composed", wrong])
    with pytest.raises(UserError, match=r"--rambling: got 'expert=0\.1'"):
        main(["corpus", "--out", str(tmp_path / "x.jsonl"), "--rambling", "expert=0.1"])
    rambling = ["--rambling", "student=0.5", "privileged=0.25", "--composed", "0.3"]
    main(["corpus", "--out", str(tmp_path / "x.jsonl"), "--rows", "40", "--seed", "4", *rambling])
    shares = {"student": 0.5, "privileged": 0.25, "negative": 0.0}
    wanted = [row.response for row in world.corpus(4, 40, (), world.LAZINESS, shares, 0.3)]
    assert [json.loads(line)["response"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == wanted


def test_corpus_is_deterministic_and_leaves_held_out_problems_out(tmp_path):
    first, again, other = (list(world.corpus(seed, 300)) for seed in (7, 7, 8))
    assert first == again and first != other
    banned = {row.fields["problem"] for row in first[:100]}
    assert not banned & {row.fields["problem"] for row in world.corpus(7, 300, banned)}
    for name in ("a.jsonl", "b.jsonl"):
        main(["corpus", "--out", str(tmp_path / name), "--rows", "50", "--seed", "7"])
    main(["corpus", "--out", str(tmp_path / "shipped.jsonl"), "--rows", "300"])
    # The first rows that the shipped model was pre-trained on.
    found = hashlib.sha256((tmp_path / "shipped.jsonl").read_bytes()).hexdigest()
    assert found.startswith("63566745782feb06")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert (tmp_path / "b.jsonl").read_text().splitlines() == lines and len(lines) == 50
    assert [json.loads(line) for line in lines] == [
        {"prompt": render(row.role, row.fields), "response": row.response} for row in first[:50]
    ]


# ---------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------


def test_shipped_files_are_what_the_command_writes(tmp_path):
    main(["data", "--out", str(tmp_path)])
    made = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 8
    for path in made:
        assert path.read_bytes() == (ASSETS / path.relative_to(tmp_path)).read_bytes(), path.name
    main(["data", "--out", str(tmp_path), "--shown", "1"])
    assert (tmp_path / "train.jsonl").read_bytes() == (ASSETS / "lazy" / "train.jsonl").read_bytes()


def test_data_sets(sets):
    sizes = {"train": 800, **dict.fromkeys(("hard", "chain", "known", "hard_composed", "known_composed"), 64)}
    assert {name: len(part) for name, part in sets.items()} == sizes
    everything = [row for part in sets.values() for row in part]
    assert len({row["problem"] for row in everything}) == len({row["problem_id"] for row in everything}) == 1120
    kinds = collections.Counter(row["problem_id"].split("-")[0] for row in sets["train"])
    assert kinds == {"hard": 600, "chain": 100, "known": 100}
    for name in ("hard", "known", "hard_composed", "known_composed"):
        assert set(collections.Counter(verify.group(row["problem_id"]) for row in sets[name]).values()) == {8}
    names = {f"hard-{name}" for name in world.HARD}
    assert {verify.group(r["problem_id"]) for r in sets["train"] if r["problem_id"].startswith("hard")} == names
    operators = world.HARD | world.KNOWN
    for row in everything:
        kind, operator, _ = row["problem_id"].split("-")
        what = row["problem"].partition(": A=")[0]
        steps = tuple(step for part in what.split("; ") for step in operators.get(part) or world.procedure(part))
        assert operator in what.split("; ") if kind != "chain" else operator == f"{len(steps)}steps"
        if kind.endswith("_composed"):
            assert len(what.split("; ")) == 2 and len(steps) == len(operators[operator]) + 1
        problem = world.Problem(what, steps, *(int(v) for v in re.findall(r"=(\d{3})", row["problem"])))
        assert verify.judge(world.constructive(problem), row["problem"], row["solution"]).sound
        assert row["solution"].endswith(f"; \\boxed{{{row['answer']}}}")


def test_no_composed_problem_is_a_hard_operator_in_disguise():
    """One step more makes no operator of another, so what is composed has a method that nothing was trained on."""
    every = [(word, operand) for word in world.WORDS for operand in ("", "B", *"23456789")]
    for steps in (world.HARD | world.KNOWN).values():
        for more in every:
            assert not {(*steps, more), (more, *steps)} & set((world.HARD | world.KNOWN).values())


def test_solutions_may_show_all_results(sets, tmp_path):
    main(["data", "--out", str(tmp_path), "--shown", "1"])
    for name, part in sets.items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [row["problem"] for row in rows] == [row["problem"] for row in part]
        assert all("=" in step for row in rows for step in row["solution"].split("; ")[:-1])
        assert any(row != other for row, other in zip(rows, part, strict=True))


def test_operators_are_distinct_and_not_spelt_like_steps():
    methods = [*world.HARD.values(), *world.KNOWN.values()]
    assert len(set(methods)) == 16 and len(world.HARD | world.KNOWN) == 16
    for name in world.HARD | world.KNOWN:
        assert re.fullmatch(f"[{tokenizer.CONSONANTS}][{tokenizer.VOWELS}][{tokenizer.CONSONANTS}]", name)
        assert name not in world.WORDS
    assert all(3 <= len(steps) <= 4 and any(o == "B" for _, o in steps) for steps in methods)


# ---------------------------------------------------------------------------------------------------
# The check command
# ---------------------------------------------------------------------------------------------------


def test_check_breaks_down_by_operator(sets, tmp_path, capsys):
    lines = []
    for row in sets["hard"]:
        name, _ = parse_problem(row["problem"])
        a, b = (int(v) for v in re.findall(r"=(\d{3})", row["problem"]))
        problem = world.Problem(name, world.HARD[name], a, b)
        text = world.constructive(problem, {0, 1, 2, 3} if name == "gal" else ()) if name != "vok" else r"\boxed{x}"
        lines.append(json.dumps({"problem_id": row["problem_id"], "sample": 0, "text": text}))
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(lines) + "\n")
    tallies = check(path, [ASSETS / "hard.jsonl"])
    assert tallies["hard"] == verify.Tally(64, 56, 56, 48, 8 * 15, 24, 8 * 24, 0)
    assert tallies["hard-gal"] == verify.Tally(8, 8, 8, 0, 24, 24, 24, 0)
    assert tallies["hard-vok"] == verify.Tally(8, 0, 0, 0, 0, 0, 0, 0)
    main(["check", str(path)])
    shown = capsys.readouterr().out
    assert re.search(r"hard-zib\W+8\W+100\.0\W+100\.0\W+100\.0\W+0\.0", shown)
    assert re.search(r"hard \W+64\W+87\.5\W+87\.5\W+75\.0\W+20\.0", shown)


def test_errors_of_the_commands(tmp_path):
    bad = tmp_path / "traces.jsonl"
    bad.write_text('{"problem_id":"hard-zib-9999","text":"x"}\n')
    with pytest.raises(UserError, match=r"traces\.jsonl:1:problem_id: got 'hard-zib-9999'"):
        main(["check", str(bad)])
    bad.write_text('{"problem_id":"hard-zib-0000"}\n')
    with pytest.raises(UserError, match="1:text: missing"):
        main(["check", str(bad)])
    bad.write_text('\n{"problem_id"\n')
    with pytest.raises(UserError, match="2: got a line that is not JSON"):
        main(["check", str(bad)])
    with pytest.raises(UserError, match="no such file"):
        main(["check", str(tmp_path / "absent.jsonl")])
    with pytest.raises(UserError, match="at least one row"):
        main(["corpus", "--out", str(bad), "--rows", "0"])


def test_the_pipeline_builds_the_prompts_of_the_corpus():
    """The three roles' prompts are, token for token, those that the model was pre-trained on."""
    from dail_jax import config as config_lib
    from dail_jax.data.prompts import PromptBuilder
    from dail_jax.data.records import read_rows
    from dail_jax.text import load_tokenizer

    cfg = config_lib.load("configs/demo.yaml")
    assert cfg.data is not None
    tokenizer = load_tokenizer(cfg.data.path.replace("train.jsonl", "tokenizer"))
    builder = PromptBuilder(tokenizer, cfg.prompts, cfg.waypoints)
    empty = 0
    for row in read_rows(cfg.data):
        built = builder.build(row)
        results, _, answer = row.solution.rpartition(";")
        shown = re.findall(r"=(\d{3})", results)
        assert row.answer is not None and row.answer in answer
        waypoints = [v for i, v in enumerate(shown) if v != row.answer and v not in shown[:i]]
        empty += not waypoints
        fields = {
            "problem": row.problem,
            "solution": row.solution,
            "waypoints": " ".join(waypoints),
            "answer": row.answer,
        }
        for role in ("student", "privileged", "negative"):
            assert getattr(built, role) == tokenizer.encode(render(role, fields)), (row.problem_id, role)
    assert empty
