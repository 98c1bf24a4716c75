"""Budgets, forced answers, and the exported adapter in transformers."""

import json

import numpy as np
import pytest
import tiny

from dail_jax.text import load_tokenizer


@pytest.fixture(autouse=True)
def one():
    with tiny.alone():
        yield


THINKING = {
    "train__objective": "none",
    "prompts__opening": "<think>\n",
    "evaluate__benchmarks": [{"name": "hard", "rows": {"path": str(tiny.ASSETS / "hard.jsonl"), "limit": 3}}],
    "evaluate__force": {"text": "\n\\boxed{", "max_tokens": 6},
}


def test_forced_answers_at_budgets(tmp_path):
    """A sample cut at budget b is that of a run with max_tokens b; those without an answer are asked for one."""
    assert tiny.run("evaluate", tiny.write(tmp_path / "all", evaluate__budgets=[24, 96], **THINKING)) == 0
    samples = tiny.lines(tmp_path / "all" / "samples.jsonl")
    rows = {(s["problem_id"], s["sample"], s["budget"]): s for s in samples}
    assert len(rows) == len(samples) == 3 * 4 * 2
    assert {s["finish"] for s in samples if s["budget"] == 24} == {"forced"}
    for s in samples:
        assert s["finish"] in ("forced", "stop") and s["answer_tokens"] == 0
        if s["finish"] == "stop":  # it ended by itself, with an answer: it is not asked
            assert s["tokens"] <= s["budget"] and s["forced_text"] is None and s["forced_tokens"] == 0
            assert s["answer"] is not None
        else:  # (this tokenizer has no tags, so that no thoughts are open)
            assert s["tokens"] == s["budget"] and 1 <= s["forced_tokens"] <= 6
            assert s["forced_text"].startswith("\n\\boxed{")
        longest = rows[s["problem_id"], s["sample"], 96]
        assert longest["text"].startswith(s["text"])
    cells = json.loads((tmp_path / "all" / "results.json").read_text())["benchmarks"]["hard"]
    assert cells["24"]["forced"] == 1.0 and cells["24"]["mean_tokens"] == 24.0
    assert cells["96"]["forced"] == pytest.approx(
        np.mean([s["finish"] == "forced" for s in samples if s["budget"] == 96]), abs=1e-6
    )
    assert tiny.run("evaluate", tiny.write(tmp_path / "short", evaluate__sampling__max_tokens=24, **THINKING)) == 0
    short = tiny.lines(tmp_path / "short" / "samples.jsonl")
    for s in (*short, *samples):
        del s["vote"]  # counts the values of all budgets
    assert short == [s for s in samples if s["budget"] == 24]


def test_the_exported_adapter_answers_alike_in_transformers(tmp_path, pipeline, capsys):
    """Greedy answers of transformers + peft equal ours, token by token."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    config, adapter = tiny.write(tmp_path / "run", evaluate__sampling__temperature=0), f"evaluate.adapter={tmp_path}"
    assert tiny.run("evaluate", config, adapter) == 2
    assert "want train.objective: none" in capsys.readouterr().err
    assert tiny.run("evaluate", config, adapter, "train.objective=none") == 2
    assert "adapter_config.json: not found: want a PEFT adapter folder" in capsys.readouterr().err
    adapter = f"evaluate.adapter={pipeline / 'adapter'}"
    arms = 'arms={"nll": {"train.objective": "nll"}}'  # of which an adapter from elsewhere is none
    assert tiny.run("evaluate", config, adapter, "train.objective=none", arms) == 0
    samples = tiny.lines(tmp_path / "run" / "samples.jsonl")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["objective"] == "adapter"
    ours = [s for s in samples if s["sample"] == 0]
    assert all(s["text"] == o["text"] for s in samples for o in ours if s["problem_id"] == o["problem_id"])
    tokenizer = load_tokenizer(tiny.ASSETS / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny.ASSETS / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(pipeline / "adapter")).eval()
    rows = [r for name in ("hard", "chain") for r in tiny.lines(tiny.ASSETS / f"{name}.jsonl")]
    problems = {r["problem_id"]: r["problem"] for r in rows}
    assert len(ours) == 6
    for s in ours:
        prompt = torch.tensor([tokenizer.render([{"role": "user", "content": problems[s["problem_id"]]}])])
        with torch.no_grad():
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=96,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.eos_id,
            )
        theirs = out[0, prompt.shape[1] :].tolist()
        assert tokenizer.decode(theirs) == s["text"] and len(theirs) == s["tokens"]
