"""Traces that get shorter, and problems that no training problem resembles: a base that rambles, for docs/study.md.

    python benchmarks/ramble.py                 seed 1 (an hour or so on two CPU cores); call it again to resume
    python benchmarks/ramble.py --seeds 1,2,3   more rollouts, LoRAs and samples of the same base
    python benchmarks/ramble.py --tables        from what was measured

The base is the embedded model, trained further (configs/microworld_lazy.yaml) on a corpus whose student checks every other
step again, and whose privileged student and negative reference one in ten. A part of the corpus asks for a known operator
with one more step, so that the base can read such problems. Everything else is the demo's, the training problems too: none
of them is composed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from phase import call, passed, rounded, rows
from study import ASSETS, METHODS, interval, only, write_trained

import dail_jax
from dail_jax.microworld import verify
from dail_jax.rundir import write_atomic

SHARES = ("student=0.5", "privileged=0.1", "negative=0.1")  # of steps that are checked again in the base's corpus
COMPOSED = 0.15  # of the corpus's rows
ROWS = 12000
# Traces that ramble are long, and take longer to learn than shortcuts.
BASE = (
    "pretrain.max_tokens=384",
    "pretrain.steps=400",
    "pretrain.tokens_per_step=4096",
    "pretrain.optimizer.learning_rate=3e-3",
    "pretrain.optimizer.matrix_learning_rate=0.02",
)
# An arm is a method, and the number of training problems if not all; with few of them it makes as many updates.
ARMS = ("base", "sft", "nll", "dail", "sharp", "nll_100", "dail_100")
LEARNING_RATE = {"sft": 1e-3}  # the demo's, as everything that is not named here
EPOCHS = {"100": 42}
# Samples per problem, by temperature: of the sets in COLUMNS, and of those in KEPT.
SAMPLES = {1.0: (32, 8), 0.0: (1, 1), 0.6: (8, 4)}
LONGEST = 320  # tokens of a sample
SETTINGS = {"generate.sampling.max_tokens": LONGEST, "evaluate.sampling.max_tokens": LONGEST}
# What there is to learn, with problems of the training set first; and what the base knows.
COLUMNS = {"trained": "training set", "hard": "hard", "hard_composed": "hard, composed"}
KEPT = {"known": "known", "chain": "chain", "known_composed": "known, composed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--arms", default=",".join(ARMS), help="so that several processes may share the work")
    parser.add_argument("--problems", type=int, default=64, help="of each set (default: all 64)")
    parser.add_argument("--tables", action="store_true", help="nothing but the tables")
    parser.add_argument("--out", type=Path, default=Path("runs/ramble"))
    parser.add_argument("--docs", type=Path, default=Path("docs/study"), help="where the tables go")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if not options.tables:
        prepare(options.out)
        for seed in seeds:
            for temperature in SAMPLES:
                for arm in options.arms.split(","):
                    measure(options.out, seed, arm, temperature, options.problems)
    tables(options.out, options.docs)


def prepare(out: Path) -> None:
    """The base, and the training problems that its students are evaluated on."""
    write_trained(out)
    if not (out / "model/model.safetensors").exists():
        corpus = ["corpus", "--rows", f"{ROWS}", "--out", f"{out}/corpus.jsonl", "--composed", f"{COMPOSED}"]
        call(out, "dail_jax.microworld", *corpus, "--rambling", *SHARES)
        configs = ["--config", "configs/microworld_pretrain.yaml", "--config", "configs/microworld_lazy.yaml"]
        paths = [f"run_dir={out}/base", f"model.path={out}/model", f"pretrain.rows={out}/corpus.jsonl"]
        call(out, "dail_jax.launch", "pretrain", *configs, *paths, *BASE)


def student(out: Path, seed: int, arm: str) -> dail_jax.Model:
    """The base with the arm's LoRA, which is trained if there is none."""
    settings = {"model.path": str(out / "model"), "seed": seed, **SETTINGS}
    base, adapter = dail_jax.load("demo", settings=settings), out / f"seed{seed}/{arm}"
    if arm == "base":
        return base
    if not adapter.exists():
        method, _, count = arm.partition("_")
        data = base.rows(limit=int(count) if count else None)
        if method != "sft":
            known = {row.problem_id for row in data}
            data = [trace for trace in base.traces(traces(out, seed)) if trace.problem_id in known]
        learned = base.train(data, method, learning_rate=LEARNING_RATE.get(method), epochs=EPOCHS.get(count))
        learned.save_adapter(adapter)
    return dail_jax.load("demo", adapter=adapter, settings=settings)


def traces(out: Path, seed: int) -> Path:
    """The base's mixed traces, which are drawn if there are none."""
    run = out / f"seed{seed}/traces"
    if not (run / "traces.jsonl").exists():
        changes = [f"model.path={out}/model", f"seed={seed}", *(f"{key}={value}" for key, value in SETTINGS.items())]
        call(out, "dail_jax.launch", "generate", "--config", "configs/demo.yaml", *changes, f"run_dir={run}")
    return run / "traces.jsonl"


def measure(out: Path, seed: int, arm: str, temperature: float, problems: int) -> None:
    """Samples a student on all sets, and notes what it found."""
    path = out / f"seed{seed}/{arm}_at_{temperature:g}.json"
    if path.exists():
        return
    model, found = student(out, seed, arm), {}
    for samples, names in zip(SAMPLES[temperature], (COLUMNS, KEPT), strict=True):
        sets = {name: model.rows(file_of(out, name), limit=problems) for name in names}
        found |= summary(model.evaluate(sets, samples=samples, temperature=temperature), out)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps(rounded(found)) + "\n")
    print(seed, arm, temperature, {name: passed(one, 1) for name, one in found.items()}, flush=True)


def file_of(out: Path, name: str) -> Path:
    return (out if name == "trained" else ASSETS) / f"{name}.jsonl"


def summary(evaluation: dail_jax.Evaluation, out: Path) -> dict[str, dict]:
    """By set: pass@k with 95% intervals over problems, and what `habits` tells of its samples."""
    return {
        name: {
            "pass@k": only(budgets)["pass@k"],
            **habits((one for one in evaluation.samples if one["benchmark"] == name), file_of(out, name)),
        }
        for name, budgets in evaluation.results["benchmarks"].items()
    }


def habits(responses: Iterable[dict], file: Path) -> dict:
    """Tokens, of all responses and of right ones (means and halves of 95% intervals over problems), and shares.

    `operators` is the share of sound responses by operator.
    """
    problems, tokens, right, judged = {row["problem_id"]: row for row in rows(file)}, {}, {}, []
    for one in responses:
        name, problem = one["problem_id"], problems[one["problem_id"]]
        verdict = verify.judge(one["text"], problem["problem"], problem["solution"])
        judged.append((name, verdict))
        tokens.setdefault(name, []).append(one["tokens"])
        if verdict.right:
            right.setdefault(name, []).append(one["tokens"])
    operators = verify.tally(judged)
    total = operators.pop(judged[0][0].partition("-")[0])
    return {
        "tokens": over_problems(tokens),
        "right_tokens": over_problems(right),
        "right": total.right / total.traces,
        "shortcuts": total.shortcuts / max(total.due, 1),
        "rechecks": total.rechecks / max(total.steps, 1),
        "operators": {name: t.sound / t.traces for name, t in operators.items()},
    }


def over_problems(counts: dict[str, list[int]]) -> list[float] | None:
    """Mean and half of the 95% interval of the problems' means; None for fewer than two problems."""
    means = [float(np.mean(found)) for found in counts.values()]
    return list(interval(means)) if len(means) > 1 else None


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------


def tables(out: Path, docs: Path) -> None:
    """Writes what was measured: ramble.json and ramble.md."""
    measured = {}
    for home in sorted(out.glob("seed*")):
        found = {path.stem: json.loads(path.read_text()) for path in home.glob("*_at_*.json")}
        drawn = rows(home / "traces/traces.jsonl") if (home / "traces/traces.jsonl").exists() else []
        for kind in ("hard", "known", "chain"):
            own = [{**t, "tokens": len(t["response_ids"])} for t in drawn if t["problem_id"].startswith(kind)]
            if own:
                found[f"traces of {kind} problems"] = habits(own, ASSETS / "train.jsonl")
        measured[home.name] = rounded(found)
    text = [line for seed, found in measured.items() for line in lines(seed, found)]
    write_atomic(docs / "ramble.json", json.dumps(measured) + "\n")
    write_atomic(docs / "ramble.md", "\n".join(text) + "\n")
    print("\n".join(text))


def lines(seed: str, found: dict) -> list[str]:
    """The tables of one seed."""
    out = [f"# {seed}: mixed traces\n", "| | right, % | tokens | re-checks, % of steps | shortcuts, % |"]
    out += ["|---|" + "---:|" * 4]
    for name, one in found.items():
        if name.startswith("traces"):
            out.append(f"| {name} | {100 * one['right']:.1f} | {habit(one)} |")
    ks = {"trained": (1, 8, 32), "hard": (1, 8, 32), "hard_composed": (1, 8, 32)}
    columns = [f"{title} pass@{k}" for name, title in COLUMNS.items() for k in ks[name]]
    columns += [f"{title} pass@1" for title in KEPT.values()]
    out += [f"\n# {seed}: pass@k [95% interval over problems], %\n"]
    out += [f"| | temperature | {' | '.join(columns)} |", "|---|" + "---:|" * (1 + len(columns))]
    for arm, temperature, one in cells(found):
        texts = [passed(one[name], k) for name in COLUMNS for k in ks[name]] + [passed(one[name], 1) for name in KEPT]
        out.append(f"| {titled(arm)} | {temperature:g} | {' | '.join(texts)} |")
    titles = COLUMNS | KEPT
    out += [f"\n# {seed}: tokens; re-checks and shortcuts, % of steps\n"]
    out += [f"| | temperature | {' | '.join(titles.values())} |", "|---|" + "---:|" * (1 + len(titles))]
    for arm, temperature, one in cells(found):
        texts = [habit(one[name]).replace(" | ", "; ") for name in titles]
        out.append(f"| {titled(arm)} | {temperature:g} | {' | '.join(texts)} |")
    return [*out, ""]


def cells(found: dict) -> list[tuple[str, float, dict]]:
    """(arm, temperature, what was measured), arm by arm."""
    names = {f"{arm}_at_{t:g}": (arm, t) for arm in ARMS for t in sorted(SAMPLES, reverse=True)}
    return [(*names[name], found[name]) for name in names if name in found]


def titled(arm: str) -> str:
    method, _, count = arm.partition("_")
    return METHODS[method] + (f", {count} problems" if count else "")


def habit(one: dict) -> str:
    """Tokens; re-checks; shortcuts."""
    mean, half = one["tokens"]
    return f"{mean:.1f} ± {half:.1f} | {100 * one['rechecks']:.1f} | {100 * one['shortcuts']:.1f}"


if __name__ == "__main__":
    main()
