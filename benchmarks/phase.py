"""When does the contrast help? Objectives over gamma and laziness at the tokens that decide, for docs/study.md.

    python benchmarks/phase.py --prepare                                   the base, its data and its traces
    python benchmarks/phase.py --points s1p8n9,s0p8n9 --arms reverse       (minutes on two CPU cores; a second call resumes)
    python benchmarks/phase.py --tables                                    from what was measured

The base is the embedded model, trained further on prompts that say, in tenths, which share of the steps that owe work
their response leaves out. A point is what student, privileged student and negative reference are told: s1p8n9 says 0.1,
0.8 and 0.9. A role that is told nothing, as all are in s-p-n-, is the embedded model's own, so that the student never takes
a shortcut and the privileged student seldom does. All points have the same traces, under other prompts.

A decision is a token of a trace where a step that owes column work goes on with it, or is cut short. A point's prediction
needs no training: it follows from what the two frozen roles expect there. What is measured is the trained student's own
probability there, in traces that it was not trained on. One compiled program serves all objectives and every gamma.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from scipy.special import expit
from study import ASSETS, COLOURS, ROOT, STYLE, save

import dail_jax
from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import hf, peft
from dail_jax.microworld import verify
from dail_jax.microworld.__main__ import render
from dail_jax.microworld.tokenizer import VOCABULARY
from dail_jax.model import lora as lora_lib
from dail_jax.model import transformer
from dail_jax.rundir import write_atomic
from dail_jax.text import load_tokenizer
from dail_jax.train import optimizer
from dail_jax.train.methods import CONTRAST, chosen, kl_divergence

WORK, SKIP, NEXT = map(VOCABULARY.index, (" : ", " > ", " ; "))
OWING = {VOCABULARY.index(word) for word in ("add ", "sub ", "mul ")}
LAZINESS = {"student": "0,0.1,0.2", "privileged": "0.2,0.4,0.5,0.6,0.7,0.8,0.9", "negative": "0.8,0.9"}
TRAIN = config_lib.load(ROOT / "configs/demo.yaml").train
ROWS = 12000  # of the corpus
GAMMAS = (0.0, 0.1, 0.3, 0.5, 0.7)
# Weights of the reverse KL, of the forward KL to the target with this temperature, and of the likelihood of the traces.
OBJECTIVES = {"reverse": (1, 0, 1.0, 0), "forward": (0, 1, 1.0, 0), "sharp": (0, 1, 0.2, 0), "nll": (0, 0, 1.0, 1)}
ROLES = ("student", *CONTRAST)
TRAINED, HELD_OUT, BATCH = 256, 64, 16
WIDTH = {"student": 112, "privileged": 144, "negative": 144}  # tokens of prompt and response
LENGTH = 88  # tokens of a response; longer ones are left out
SHOWN_AT = (0, 8, 16, 32, 64)  # updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--points", default="", help="such as s1p8n9,s1p9n9")
    parser.add_argument("--arms", default="reverse,forward,sharp,nll", help="(default: all)")
    parser.add_argument("--gammas", default=",".join(map(str, GAMMAS)))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--sample", default="", help="what to sample, too: such as s1p8n9/reverse_0_1,s1p8n9/reverse_0.5_1"
    )
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/phase"))
    parser.add_argument("--docs", type=Path, default=Path("docs/study"), help="where the tables and the plot go")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.out)
    for point in filter(None, options.points.split(",")):
        measure(
            point,
            options.arms.split(",") if options.arms else [],
            list(map(float, options.gammas.split(","))),
            options.seed,
            options.out,
        )
    for name in filter(None, options.sample.split(",")):
        sample(name, options.out)
    if options.tables:
        tables(options.out, options.docs)


# ---------------------------------------------------------------------------------------------------
# What all points share
# ---------------------------------------------------------------------------------------------------


def prepare(out: Path) -> None:
    """The corpus, the base, data whose solutions show all results, and traces of the middle of the diagram, s1p8n9."""
    world = [sys.executable, "-m", "dail_jax.microworld"]
    laziness = [f"{role}={shares}" for role, shares in LAZINESS.items()]
    call([*world, "corpus", "--rows", str(ROWS), "--out", f"{out}/base.jsonl", "--laziness", *laziness])
    call([*world, "data", "--out", f"{out}/data", "--shown", "1"])
    (out / "templates").mkdir(exist_ok=True)
    for role, share in zip(ROLES, "189", strict=True):
        text = (ASSETS / f"templates/{role}.txt").read_text()
        write_atomic(out / f"templates/{role}.txt", text.replace("{{problem}}", f"{{{{problem}}}} {share}"))
    launch = [sys.executable, "-m", "dail_jax.launch"]
    base = ["--config", "configs/microworld_pretrain.yaml", "--config", "configs/microworld_lazy.yaml"]
    base += [f"run_dir={out}/base", f"model.path={out}/base/model", f"pretrain.rows={out}/base.jsonl"]
    call([*launch, "pretrain", *base])
    own = [f"model.path={out}/base/model", f"data.path={out}/data/train.jsonl", f"run_dir={out}/traces"]
    own += [f"prompts.{role}={out}/templates/{role}.txt" for role in ROLES]
    call([*launch, "generate", "--config", "configs/demo.yaml", *own])


def call(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@functools.cache
def load(folder: Path):
    """(weights, shape) of a model."""
    return hf.load(folder, mesh_lib.make_mesh(config_lib.Mesh()), "float32")


def read(out: Path) -> list[dict]:
    """The kept traces that fit, with their problem and solution: TRAINED to train on, then HELD_OUT."""
    problems = {row["problem_id"]: row for row in rows(out / "data/train.jsonl")}
    fit = [t for t in rows(out / "traces/traces.jsonl") if t["drop"] is None and len(t["response_ids"]) <= LENGTH]
    return [{**problems[t["problem_id"]], "ids": t["response_ids"]} for t in fit][: TRAINED + HELD_OUT]


def rows_of(role: str, share: str, traces: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions) [N,W] under a role's prompt that says `share`; responses end at the right, padding is -1."""
    tokenizer, width = load_tokenizer(str(ASSETS / "tokenizer")), WIDTH[role]
    tokens, positions = np.zeros((len(traces), width), np.int32), np.full((len(traces), width), -1, np.int32)
    for i, t in enumerate(traces):
        shown = re.findall(r"=(\d{3})", t["solution"])
        fields = {**t, "problem": f"{t['problem']} {share}".removesuffix(" -")}
        fields["waypoints"] = " ".join(v for v in dict.fromkeys(shown) if v != t["answer"])
        ids = [*tokenizer.encode(render(role, fields)), *t["ids"]]
        tokens[i, width - len(ids) :], positions[i, width - len(ids) :] = ids, range(len(ids))
    return tokens, positions


def states(params, lora, tokens, positions, model):
    """Log-probabilities [N,LENGTH,V] of the responses' tokens."""
    hidden = transformer.encode(params, tokens, positions, model, lora=lora)[:, -LENGTH - 1 : -1]
    return jax.nn.log_softmax(hidden @ transformer.unembedding(params).T)


def decisions(traces: list[dict]) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int]]]:
    """(trace, column, (operator, step)) of every decision; columns count from the left of LENGTH."""
    where, names = [], []
    for i, t in enumerate(traces):
        owes, step = False, 0
        for j, token in enumerate(t["ids"], LENGTH - len(t["ids"])):
            if owes and token in (WORK, SKIP):
                where.append((i, j))
                names.append((verify.group(t["problem_id"]), step))
            owes = token in OWING or (owes and token not in (WORK, SKIP))
            step += token == NEXT
    found = np.array(where)
    return found[:, 0], found[:, 1], names


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


def loss_of(lora, params, batch, weights, model):
    """The mean over response tokens of the objective that `weights` = (*OBJECTIVES[...], gamma) chooses."""
    reverse, forward, temperature, likelihood, gamma = weights
    m = states(params, lora, batch["tokens"], batch["positions"], model)
    p, n = batch["privileged"], batch["negative"]
    target = jax.nn.log_softmax((p - gamma * n) / ((1 - gamma) * temperature))
    loss = reverse * (kl_divergence(m, p) - gamma * kl_divergence(m, n))
    loss += forward * kl_divergence(target, m) - likelihood * chosen(m, batch["targets"])
    return (loss * batch["mask"]).sum() / batch["mask"].sum()


@functools.cache
def programs(model):
    tx = optimizer.adamw(TRAIN.optimizer, SHOWN_AT[-1])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(lora, state, params, batch, weights):
        loss, grads = jax.value_and_grad(loss_of)(lora, params, batch, weights, model)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    def fresh(seed: int):
        lora = lora_lib.init(jax.random.key(seed), model, TRAIN.lora)
        return lora, tx.init(lora)

    return update, fresh, jax.jit(functools.partial(states, model=model))


def in_batches(program, params, lora, tokens, positions) -> np.ndarray:
    parts = [
        program(params, lora, tokens[i : i + BATCH], positions[i : i + BATCH]) for i in range(0, len(tokens), BATCH)
    ]
    return np.concatenate(parts)


def measure(point: str, arms: list[str], gammas: list[float], seed: int, out: Path) -> None:
    """Notes the log-odds of a shortcut at the held-out decisions: of all roles, and of the student as each arm trains."""
    told = dict(zip(ROLES, re.findall(r"[\d-]", point), strict=True))
    folders = {role: ASSETS / "model" if said == "-" else out / "base/model" for role, said in told.items()}
    weights = {role: load(folder)[0] for role, folder in folders.items()}
    own, model = load(folders["student"])
    update, fresh, look = programs(model)
    traces = read(out)
    trained, held = traces[:TRAINED], traces[TRAINED:]
    row, column, names = decisions(held)

    def odds(found: np.ndarray) -> list[float]:
        return [round(float(x), 3) for x in found[row, column, SKIP] - found[row, column, WORK]]

    folder = out / "points" / point
    folder.mkdir(parents=True, exist_ok=True)
    asked = rows_of("student", told["student"], held)
    if not (folder / "roles.json").exists():
        roles = {role: odds(in_batches(look, weights[role], None, *rows_of(role, told[role], held))) for role in ROLES}
        taken = [held[i]["ids"][j - LENGTH] == SKIP for i, j in zip(row, column, strict=True)]
        write_atomic(folder / "roles.json", json.dumps({"names": names, "cut_short": taken, **roles}) + "\n")
    cells = [(arm, gamma) for arm in arms for gamma in (gammas if arm != "nll" else [0.0])]
    todo = {f"{arm}_{gamma:g}_{seed}": (arm, gamma) for arm, gamma in cells}
    todo = {name: cell for name, cell in todo.items() if not (folder / f"{name}.json").exists()}
    data = batch_arrays(trained, told, lambda role, *rows: in_batches(look, weights[role], None, *rows)) if todo else {}
    for name, (arm, gamma) in todo.items():
        lora, state = fresh(seed)
        rng, order, noted, losses = np.random.default_rng(seed), [], {}, []
        chosen_loss = tuple(jnp.float32(w) for w in (*OBJECTIVES[arm], gamma))
        for step in range(SHOWN_AT[-1] + 1):
            if step in SHOWN_AT:
                noted[step] = odds(in_batches(look, own, lora, *asked))
            if step < SHOWN_AT[-1]:
                order = order or rng.permutation(TRAINED).reshape(-1, BATCH).tolist()
                chosen_rows = np.array(order.pop())
                batch = {name: x[chosen_rows] for name, x in data.items()}
                lora, state, loss = update(lora, state, own, batch, chosen_loss)
                losses.append(round(float(loss), 5))
        shutil.rmtree(folder / name, ignore_errors=True)
        peft.save(folder / name, lora, model, TRAIN.lora, str(folders["student"]))
        write_atomic(folder / f"{name}.json", json.dumps({"odds": noted, "losses": losses}) + "\n")
        print(name, point, {step: f"{100 * expit(x).mean():.1f}" for step, x in noted.items()}, flush=True)


def sample(name: str, out: Path) -> None:
    """Evaluates a trained student, such as s1p8n9/reverse_0_1, at temperatures 1 and 0: pass@1, and shortcuts by text."""
    path = out / f"points/{name}.sampled.json"
    if path.exists():
        return
    template = path.with_suffix(".txt")
    write_atomic(template, (ASSETS / "templates/student.txt").read_text() + f" {name[1]}".removesuffix(" -"))
    weights = ASSETS / "model" if name[1] == "-" else out / "base/model"
    sets = [{"from": f"pkg:benchmarks/microworld_{one}.yaml"} for one in ("known", "chain")]
    settings = {"model.path": str(weights), "prompts.student": str(template), "evaluate.benchmarks": sets}
    model = dail_jax.load("demo", adapter=out / "points" / name, settings=settings)
    found = {}
    for temperature, samples in ((1.0, 4), (0.0, 1)):
        evaluation = model.evaluate(samples=samples, temperature=temperature)
        for benchmark in ("known", "chain"):
            problems = {r["problem_id"]: r for r in rows(ASSETS / f"{benchmark}.jsonl")}
            judged = [
                verify.judge(
                    one["text"], problems[one["problem_id"]]["problem"], problems[one["problem_id"]]["solution"]
                )
                for one in evaluation.samples
                if one["benchmark"] == benchmark
            ]
            found[f"{benchmark}, T {temperature:g}"] = {
                **evaluation.pass_at(1, benchmark)._asdict(),
                "shortcuts": sum(v.shortcuts for v in judged) / max(sum(v.due for v in judged), 1),
            }
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    print(name, {key: f"{100 * x['mean']:.1f}" for key, x in found.items()}, flush=True)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch_arrays(traces: list[dict], told: dict[str, str], look) -> dict[str, np.ndarray]:
    """What updates are made of: the student's rows, targets and mask [N,LENGTH], the frozen roles' log-probabilities."""
    tokens, positions = rows_of("student", told["student"], traces)
    targets, mask = np.zeros((len(traces), LENGTH), np.int32), np.zeros((len(traces), LENGTH), np.float32)
    for i, t in enumerate(traces):
        targets[i, LENGTH - len(t["ids"]) :], mask[i, LENGTH - len(t["ids"]) :] = t["ids"], 1
    log = {role: look(role, *rows_of(role, told[role], traces)) for role in CONTRAST}
    return {"tokens": tokens, "positions": positions, "targets": targets, "mask": mask, **log}


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------


def pooled(values: np.ndarray, names: list[list]) -> np.ndarray:
    """Each decision's mean over those that the student cannot tell apart: the same step of the same operator."""
    _, groups, sizes = np.unique([f"{name} {step}" for name, step in names], return_inverse=True, return_counts=True)
    return (np.bincount(groups, values) / sizes)[groups]


def predicted(roles: dict, arm: str, gamma: float) -> float:
    """The share of shortcuts where a loss is smallest, for a student that sees neither solution nor waypoints.

    The mean of reverse KLs to several distributions is smallest at their normalised geometric mean, the mean of forward
    KLs at their arithmetic mean.
    """
    p, n = np.array(roles["privileged"]), np.array(roles["negative"])
    _, forward, temperature, likelihood = OBJECTIVES[arm]
    tilted = (p - gamma * n) / ((1 - gamma) * temperature)
    if likelihood:
        return float(np.mean(roles["cut_short"]))
    return float(np.mean(expit(tilted) if forward else expit(pooled(tilted, roles["names"]))))


def tables(out: Path, docs: Path) -> None:
    """Writes what was measured: phase.json, phase.md and a plot."""
    points = {}
    for folder in sorted((out / "points").iterdir()):
        roles = json.loads((folder / "roles.json").read_text())
        cells = []
        for path in sorted(folder.glob("*_*_?.json")):
            arm, gamma, seed = path.stem.split("_")
            noted = {step: expit(odds) for step, odds in json.loads(path.read_text())["odds"].items()}
            sampled = path.with_name(f"{path.stem}.sampled.json")
            cells.append(
                {
                    "arm": arm,
                    "gamma": float(gamma),
                    "seed": int(seed),
                    "optimum": predicted(roles, arm, float(gamma)),
                    "shares": {step: float(share.mean()) for step, share in noted.items()},
                    "mode": float((noted[str(SHOWN_AT[-1])] > 0.5).mean()),
                    "sampled": json.loads(sampled.read_text()) if sampled.exists() else {},
                }
            )
        points[folder.name] = {
            "log_odds": {role: float(np.mean(roles[role])) for role in ROLES},
            "shares": {role: float(expit(roles[role]).mean()) for role in ROLES},
            "cells": sorted(cells, key=lambda c: (c["arm"], c["gamma"], c["seed"])),
        }
    write_atomic(docs / "phase.json", json.dumps(points, indent=1) + "\n")
    write_atomic(docs / "phase.md", "\n".join(lines(points)) + "\n")
    plot(points, out / "points", docs)
    print("\n".join(lines(points)))


def lines(points: dict) -> list[str]:
    """The tables."""
    out = ["# Shortcuts before training, % of decisions\n"]
    out += ["| | student | privileged student | negative reference | boundary |", "|---|---:|---:|---:|---:|"]
    for name, point in points.items():
        out.append(
            f"| {name} | {' | '.join(f'{100 * x:.3g}' for x in point['shares'].values())} | {boundary(point):.2f} |"
        )
    out += ["\n# Shortcuts of the student, % of held-out decisions\n"]
    out += ["| | seed | optimum | " + " | ".join(f"{s} updates" for s in SHOWN_AT) + " | likeliest at |"]
    out += ["|---|" + "---:|" * (len(SHOWN_AT) + 3)]
    found = [(f"{name}, {c['arm']}, gamma {c['gamma']:g}", c) for name, point in points.items() for c in point["cells"]]
    for label, c in found:
        shares = " | ".join(f"{100 * share:.1f}" for share in c["shares"].values())
        out.append(f"| {label} | {c['seed']} | {100 * c['optimum']:.1f} | {shares} | {100 * c['mode']:.0f} |")
    sampled = [(label, c["sampled"]) for label, c in found if c["sampled"]]
    if sampled:
        names = list(sampled[0][1])
        out += ["\n# Sampled: pass@1 [95% interval over problems] and shortcut steps, %\n"]
        out += [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for label, row in sampled:
        texts = [
            f"{100 * x['mean']:.1f} [{100 * x['low']:.1f}, {100 * x['high']:.1f}]; {100 * x['shortcuts']:.1f}"
            for x in row.values()
        ]
        out.append(f"| {label} | {' | '.join(texts)} |")
    return out


def boundary(point: dict) -> float:
    """The gamma above which the shortcut is no longer the mode of what DAIL's loss implies."""
    return point["log_odds"]["privileged"] / point["log_odds"]["negative"]


def plot(points: dict, folder: Path, docs: Path) -> None:
    """Plots DAIL's share of shortcuts against gamma, predicted and measured, and update by update."""
    pairs = {"s1p8n9": "60%, reference 75%", "s1p8n-": "60%, reference 89%", "s1p-n-": "26%, reference 89%"}
    starts = {"s1p8n9": "9.7% at first", "s0p8n9": "5.4% at first", "s-p8n9": "0.002% at first"}
    gammas = np.linspace(0, 0.75, 31)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.8, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, label), colour in zip(pairs.items(), COLOURS, strict=False):
            if name not in points:
                continue
            roles = json.loads((folder / name / "roles.json").read_text())
            left.plot(gammas, [100 * predicted(roles, "reverse", g) for g in gammas], color=colour, label=label)
            if 0 < (turn := boundary(points[name])) < gammas[-1]:
                left.axvline(turn, color=colour, linestyle=":", linewidth=1)
            found = [c for c in points[name]["cells"] if c["arm"] == "reverse"]
            ends = [100 * c["shares"][str(SHOWN_AT[-1])] for c in found]
            left.plot([c["gamma"] for c in found], ends, "o", color=colour, markersize=5)
        left.set(xlabel="gamma", ylabel="shortcuts, %", ylim=(-3, 103))
        left.set_title("at the optimum (lines), after training (points); dotted: gamma*")
        left.legend(title="the privileged student takes")
        for (name, label), colour in zip(starts.items(), COLOURS, strict=False):
            for c in points[name]["cells"] if name in points else ():
                if (c["arm"], c["gamma"], c["seed"]) == ("reverse", 0.0, 1):
                    shares = [100 * share for share in c["shares"].values()]
                    right.plot(SHOWN_AT, shares, "o-", color=colour, label=label)
                    right.axhline(100 * c["optimum"], color="grey", linestyle=":", linewidth=1)
        right.set(xlabel="updates, gamma 0", ylabel="shortcuts, %", ylim=(-3, 103))
        right.set_title("one target, three students")
        right.legend(title="the student takes")
        save(figure, docs / "phase")


if __name__ == "__main__":
    main()
