"""Budgets, forced answers, and the exported adapter in transformers."""

import pytest
import tiny

from dail_jax.text import load_tokenizer


@pytest.fixture(autouse=True)
def one(programs):
    with tiny.alone(programs):
        yield


THINKING = {
    "train__objective": "none", "prompts__opening": "<think>\n", "evaluate__samples": 2,
    "evaluate__force": {"text": "\n</think>\n\\boxed{", "max_tokens": 6},
}  # fmt: skip


def test_forced_answers_at_budgets(tmp_path, programs):
    """A sample cut at budget b is the sample of a run with max_tokens b; those still thinking are asked for an answer."""
    assert tiny.run("evaluate", tiny.write(tmp_path / "all", evaluate__budgets=[12, 40, 96], **THINKING)) == 0
    rows = {(s["problem_id"], s["sample"], s["budget"]): s for s in tiny.lines(tmp_path / "all" / "samples.jsonl")}
    assert len(rows) == 6 * 2 * 3
    finishes = {budget: [s["finish"] for s in rows.values() if s["budget"] == budget] for budget in (12, 40, 96)}
    assert set(finishes[12]) == {"forced"} and {"forced", "stop"} <= set(finishes[40]) | set(finishes[96])
    for s in rows.values():
        assert s["tokens"] <= s["budget"]
        if s["finish"] == "stop":  # it ended by itself without closing its thoughts: no answer
            assert s["forced_text"] is None and s["forced_tokens"] == 0 and s["answer"] is None
        else:
            assert s["finish"] == "forced" and s["tokens"] == s["budget"] and 1 <= s["forced_tokens"] <= 6
            assert s["forced_text"].startswith("\n</think>\n\\boxed{")
            assert s["correct"] <= (s["answer"] is not None)
    assert any(s["answer"] is not None for s in rows.values())
    for problem, sample, budget in rows:
        longest = rows[problem, sample, 96]
        assert longest["text"].startswith(rows[problem, sample, budget]["text"])
    assert tiny.run("evaluate", tiny.write(tmp_path / "short", evaluate__sampling__max_tokens=40, **THINKING)) == 0
    alone = tiny.lines(tmp_path / "short" / "samples.jsonl")
    assert alone == [s for s in tiny.lines(tmp_path / "all" / "samples.jsonl") if s["budget"] == 40]


def test_the_exported_adapter_answers_alike_in_transformers(tmp_path, pipeline, capsys):
    """Greedy answers of transformers + peft equal ours, token by token."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    overrides = ("evaluate.samples=1", "evaluate.sampling.temperature=0", "evaluate.benchmarks.0.rows.limit=4",
                 "evaluate.benchmarks.1.rows.limit=4")  # fmt: skip
    manifest = (pipeline / "run.json").read_text()
    greedy = tmp_path / "run"
    greedy.mkdir()
    (greedy / "checkpoints").symlink_to(pipeline / "checkpoints")
    (greedy / "run.json").write_text(manifest.replace('"evaluate"', '"sampled"', 1))
    assert tiny.run("evaluate", tiny.write(greedy), *overrides) == 0
    ours = tiny.lines(greedy / "samples.jsonl")
    tokenizer = load_tokenizer(tiny.ASSETS / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny.ASSETS / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(pipeline / "adapter")).eval()
    problems = {r["problem_id"]: r["problem"] for n in ("hard", "chain") for r in tiny.lines(tiny.ASSETS / f"{n}.jsonl")}
    assert len(ours) == 8
    for s in ours:
        prompt = torch.tensor([tokenizer.render([{"role": "user", "content": problems[s["problem_id"]]}])])
        with torch.no_grad():
            out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                 max_new_tokens=96, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)  # fmt: skip
        theirs = out[0, prompt.shape[1] :].tolist()
        assert tokenizer.decode(theirs) == s["text"] and len(theirs) == s["tokens"]
