"""Synthetic run directories, with every file that a report reads, and a parser of the page."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dail_jax import config as config_lib
from dail_jax.evaluate import protocol

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- \" ' & \u2028 \ud800 https://evil.example/x"
)
SKILL = {"base": 0.02, "nll": 0.5, "dail": 0.7}
PROBLEMS, SAMPLES, BUDGETS = 12, 8, (64, 256)


def dump(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path, arm: str) -> config_lib.Config:
    tree = {
        "run_dir": str(folder),
        "model": {"path": "models/tiny"},
        "data": {"path": "train.jsonl"},
        "train": {"objective": {"base": "none"}.get(arm, arm)},
        "evaluate": {
            "samples": SAMPLES,
            "budgets": list(BUDGETS),
            "sampling": {"max_tokens": 256},
            "bootstrap": 200,
            "benchmarks": [{"name": name, "rows": {"path": f"{name}.jsonl"}} for name in ("hard", "known")],
        },
    }
    return config_lib.build(tree, "test")


def make_run(folder: Path, arm: str, problems: int = PROBLEMS, steps: int = 60) -> Path:
    """All files of an arm; the arm nll gets worse on `known`, and longer budgets help."""
    folder.mkdir(parents=True)
    rng, cfg = np.random.default_rng([len(arm), ord(arm[0])]), config_of(folder, arm)
    (folder / "config.yaml").write_text(config_lib.dump(cfg))
    samples = []
    for benchmark in ("hard", "known"):
        for i in range(problems):
            skill = 0.95 - 0.5 * (arm == "nll") if benchmark == "known" else SKILL[arm] * (0.6 + 0.8 * i / problems)
            for j in range(SAMPLES):
                drawn, luck = int(rng.gamma(9, 12)) + 5, rng.random()
                for budget in BUDGETS:
                    cut = drawn > budget
                    right = bool(luck < skill * (0.4 if cut else 1.0))
                    samples.append(
                        {
                            "benchmark": benchmark,
                            "problem_id": f"{benchmark}-{i:03}",
                            "sample": j,
                            "budget": budget,
                            "tokens": min(drawn, budget),
                            "forced_tokens": 4 * cut,
                            "text": f"add 241 310 : 10=01 41=05 23=05 > 551 ; rev 551 > 155 ; \\boxed{{{j}}}"
                            if j
                            else HOSTILE,
                            "forced_text": "465}" if cut else "",
                            "answer": str(465 if right else j),
                            "gold": "465",
                            "correct": right,
                            "reason": "equal" if right else "other value",
                            "vote": 0 if right else j + 1,
                            "finish": "forced" if cut else "stop",
                        }
                    )
    dump(folder / "samples.jsonl", samples)
    results = {**protocol.summarise(samples, cfg.evaluate, 0), "arm": arm, "objective": cfg.train.objective}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "run.json").write_text(
        json.dumps(
            {
                "seed": 3407,
                "versions": {"jax": "0.10.0"},
                "devices": 8,
                "device_kind": "TPU v5e",
                "platform": "tpu",
                "stages": {"train": {"started": "2026-01-01T10:00:00Z", "finished": "2026-01-01T10:02:03Z"}},
            }
        )
    )
    if arm != "base":
        rows = []
        for step in range(1, steps + 1):
            excess = 2.5 * math.exp(-step / (steps / 4)) + 0.15 + 0.04 * rng.random()
            row = {
                "stage": "train",
                "step": step,
                "time": step,
                "loss": excess - 0.3,
                "grad_norm": 1 / step,
                "learning_rate": 1e-3,
            }
            rows.append(
                {
                    **row,
                    **(
                        {"excess": excess, "kl_privileged": excess / 2, "kl_negative": 3 - excess}
                        if arm == "dail"
                        else {}
                    ),
                }
            )
        dump(folder / "metrics.jsonl", rows)
    return folder


# The texts of token ids 0, 1, ...
PIECES = [
    "add ",
    "2",
    "4",
    "1",
    " ",
    "3",
    "1",
    "0",
    " : ",
    "1",
    "0",
    "=",
    "0",
    "1",
    " > ",
    "5",
    "5",
    "1",
    " ; ",
    "rev ",
    "5",
    "5",
    "1",
    " > ",
    "1",
    "5",
    "5",
    "\n",
    "</script>",
    "\\boxed{",
    "4",
    "6",
    "5",
    "}",
]


def decode(ids):
    return [PIECES[i % len(PIECES)] for i in ids]


def make_traces(path: Path, count: int = 40) -> Path:
    rng, rows = np.random.default_rng(7), []
    for i in range(count):
        text = decode(range(len(PIECES) + i % 20))
        by_student = rng.random(len(text)) < 0.75 + 0.2 * np.arange(len(text)) / len(text)
        student = np.where(by_student, -rng.exponential(0.1, len(text)), -rng.exponential(4, len(text)))
        rows.append(
            {
                "problem_id": f"p{i:03}",
                "row": i,
                "sample": 0,
                "response_ids": list(range(len(text))),
                "text": "".join(text) + " given solution" * (i == 3),
                "logq": [-0.01] * len(text),
                "log_student": student.round(5).tolist(),
                "log_privileged": [None, *(-rng.exponential(0.1, len(text) - 1)).round(5).tolist()],
                "writer": "".join("s" if s else "p" for s in by_student),
                "acceptance": round(float(by_student.mean()), 4),
                "finish": "length" if i % 10 == 9 else "stop",
                "drop": "artefact: the hint" if i % 8 == 0 else "repetition: 0.9" if i % 13 == 1 else None,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    dump(path, rows)
    scores = [
        {"problem_id": r["problem_id"], "sample": 0, "log_ratio": rng.normal(0.3, 1.2, len(r["response_ids"])).tolist()}
        for r in rows
    ]
    dump(path.parent / "token_scores.jsonl", scores)
    return path


class Page(HTMLParser):
    """The elements of a page with their attributes, and the texts of its scripts and styles."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.raw, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("script", "style") and self.cdata_elem:
            self.raw.append((*self.elements[-1], data))
        else:
            self.text.append(data)

    def find(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def data(self):
        return json.loads("".join(text for tag, attrs, text in self.raw if attrs.get("id") == "data"))
