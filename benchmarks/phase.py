"""When does the contrast help? Objectives over gamma and laziness, measured at the tokens that decide, for docs/study.md.

    python benchmarks/phase.py               everything, cheap and telling parts first (hours on two CPU cores)
    python benchmarks/phase.py --part grid   one part; what is there is not measured again
    python benchmarks/phase.py --tables      from what was measured

Each base is the embedded model, trained further (configs/microworld_lazy.yaml) on a corpus whose student leaves out the
work of one step in ten that owe some, and whose privileged student leaves it out of a share of its own. Everything else is
the demo's, except that its solutions show all results. Each base has its own traces.

A decision is a token of a trace where a step that owes column work goes on with it, or is cut short. A prediction needs no
training: it follows from what the two frozen roles expect there. What is measured is the trained student's own
probability there, in traces that it was not trained on. One compiled program serves all objectives and every gamma.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from scipy.special import expit, logit
from study import ASSETS, COLOURS, ROOT, STYLE, interval, only, save

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
TRAIN = config_lib.load(ROOT / "configs/demo.yaml").train
SHARES = (0.1, 0.3, 0.6, 0.65, 0.7, 0.8, 0.9)  # of the privileged student's shortcuts in a base's corpus
STUDENT = 0.1  # the student's
ROWS = 4000  # of a corpus
# Weights of the reverse KL, of the forward KL to the target with this temperature, of the likelihood of the traces, and of
# that of the target's most likely token where the student gives it less than EPSILON.
OBJECTIVES = {
    "reverse": (1, 0, 1.0, 0, 0),
    "gated": (1, 0, 1.0, 0, 1),
    "forward": (0, 1, 1.0, 0, 0),
    "sharp": (0, 1, 0.2, 0, 0),
    "nll": (0, 0, 1.0, 1, 0),
}
EPSILON = 0.01
GAMMAS = {"reverse": (0, 0.2, 0.4, 0.6, 0.8, 0.9), "forward": (0, 0.4, 0.6), "sharp": (0, 0.4, 0.6), "nll": (0,)}
# Gammas at which the target's most likely tokens are compared with the privileged student's.
MOVED = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
# With this at its end, an arm's student is the embedded model, which takes no shortcuts of its own accord.
EMBEDDED = "-embedded"
STARTS = {0.7: ("reverse" + EMBEDDED, "nll" + EMBEDDED)}
SEEDS = (2, 3, 4, 5)  # beside 1, at the two gammas of `reverse` on either side of the boundary
# Students that learn from more traces for longer, and are sampled, with their seeds; temperatures and samples per problem.
SAMPLED = {
    0.7: {
        ("untrained", 0): (1,),
        ("nll", 0): (1, 2, 3, 4, 5),
        ("reverse", 0): (1, 2, 3, 4, 5),
        ("gated", 0): (1, 2, 3, 4, 5),
        ("forward", 0): (1,),
        ("sharp", 0): (1,),
        ("reverse", 0.7): (1, 2, 3, 4, 5),
        ("gated", 0.7): (1, 2, 3, 4, 5),
        ("forward", 0.7): (1, 2, 3),
        ("sharp", 0.7): (1, 2, 3),
        ("sharp", 0.9): (1,),
    }
}
TEMPERATURES = {1.0: 32, 0.6: 8, 0.0: 1}
SHOWN = (1, 8, 32)  # k of pass@k
ROLES = ("student", *CONTRAST)
HELD_OUT, BATCH = 64, 16
SHORT, LONG = (256, 64), (640, 192)  # traces and updates
WIDTH = {"student": 112, "privileged": 144, "negative": 144}  # tokens of prompt and response
LENGTH = 88  # tokens of a response; longer ones are left out
SHOWN_AT = (0, 16, 32)  # updates, beside the last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="(default: all)")
    parser.add_argument("--tables", action="store_true", help="nothing but the tables and the plot")
    parser.add_argument("--out", type=Path, default=Path("runs/phase"))
    parser.add_argument("--docs", type=Path, default=Path("docs/study"), help="where the tables and the plot go")
    options = parser.parse_args()
    for part in () if options.tables else [options.part] if options.part else PARTS:
        PARTS[part](options.out)
    tables(options.out, options.docs)


# ---------------------------------------------------------------------------------------------------
# Bases and traces
# ---------------------------------------------------------------------------------------------------


def prepare(out: Path) -> None:
    """The data, whose solutions show all results; and of each base the corpus, the model and the traces."""
    if not (out / "data/train.jsonl").exists():
        call(out, "dail_jax.microworld", "data", "--out", f"{out}/data", "--shown", "1")
    for share in SHARES:
        home = out / str(share)
        if not (home / "corpus.jsonl").exists():
            corpus = ["corpus", "--rows", f"{ROWS}", "--out", f"{home}/corpus.jsonl", "--laziness"]
            call(out, "dail_jax.microworld", *corpus, f"student={STUDENT}", f"privileged={share}")
        base = ["--config", "configs/microworld_pretrain.yaml", "--config", "configs/microworld_lazy.yaml"]
        base += [f"run_dir={home}/base", f"model.path={home}/model", f"pretrain.rows={home}/corpus.jsonl"]
        call(out, "dail_jax.launch", "pretrain", *base)
        traces = [f"model.path={home}/model", f"data.path={out}/data/train.jsonl", f"run_dir={home}/run"]
        call(out, "dail_jax.launch", "generate", "--config", "configs/demo.yaml", *traces)


def call(out: Path, module: str, *arguments: str) -> None:
    """Runs a command, with compiled programs that all bases share."""
    folder = f"{out.resolve()}/programs"
    cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **cache}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, env=env)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(out: Path, share: float, count: int) -> tuple[list[dict], list[dict]]:
    """`count` kept traces to train on, and HELD_OUT others, with their problem and solution; of those that fit."""
    problems = {row["problem_id"]: row for row in rows(out / "data/train.jsonl")}
    traces = rows(out / f"{share}/run/traces.jsonl")
    fit = [t for t in traces if t["drop"] is None and len(t["response_ids"]) <= LENGTH]
    fit = [{**problems[t["problem_id"]], "ids": t["response_ids"]} for t in fit]
    first = SHORT[0]
    return [*fit[:first], *fit[first + HELD_OUT :]][:count], fit[first : first + HELD_OUT]


def rows_of(role: str, traces: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions) [N,W] under a role's prompt; responses end at the right, padding is -1."""
    tokenizer, width = load_tokenizer(str(ASSETS / "tokenizer")), WIDTH[role]
    tokens, positions = np.zeros((len(traces), width), np.int32), np.full((len(traces), width), -1, np.int32)
    for i, t in enumerate(traces):
        shown = dict.fromkeys(re.findall(r"=(\d{3})", t["solution"]))
        waypoints = " ".join(value for value in shown if value != t["answer"])
        ids = [*tokenizer.encode(render(role, {**t, "waypoints": waypoints})), *t["ids"]]
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


def grid(out: Path) -> None:
    """Every base, objective and gamma, with seed 1."""
    for arm, gammas in GAMMAS.items():
        for share in SHARES:
            measure(out, share, arm, gammas, (1,))


def seeds(out: Path) -> None:
    """More seeds of `reverse` at the two gammas on either side of the boundary, where there is one."""
    for share in SHARES:
        roles = json.loads((out / f"{share}/roles.json").read_text())
        if 0 < boundary(roles) < GAMMAS["reverse"][-1]:
            above = np.searchsorted(GAMMAS["reverse"], boundary(roles))
            measure(out, share, "reverse", GAMMAS["reverse"][above - 1 : above + 1], SEEDS)


def starts(out: Path) -> None:
    """The same targets for a student that takes no shortcuts."""
    for share, arms in STARTS.items():
        for arm in arms:
            measure(out, share, arm, (0,), (1,))


def loss_of(lora, params, batch, weights, model):
    """The mean over response tokens of the objective that `weights` = (*OBJECTIVES[...], gamma) chooses."""
    reverse, forward, temperature, likelihood, gate, gamma = weights
    m = states(params, lora, batch["tokens"], batch["positions"], model)
    p, n = batch["privileged"], batch["negative"]
    target = jax.nn.log_softmax((p - gamma * n) / ((1 - gamma) * temperature))
    loss = reverse * (kl_divergence(m, p) - gamma * kl_divergence(m, n))
    loss += forward * kl_divergence(target, m) - likelihood * chosen(m, batch["targets"])
    missed = -chosen(m, target.argmax(-1))
    loss += gate * jnp.where(missed > -jnp.log(EPSILON), missed, 0)
    return (loss * batch["mask"]).sum() / batch["mask"].sum()


@functools.cache
def programs(model, updates: int):
    tx = optimizer.adamw(TRAIN.optimizer, updates)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(lora, state, params, batch, weights):
        loss, grads = jax.value_and_grad(loss_of)(lora, params, batch, weights, model)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    def fresh(seed: int):
        lora = lora_lib.init(jax.random.key(seed), model, TRAIN.lora)
        return lora, tx.init(lora)

    return update, fresh


look = jax.jit(states, static_argnames="model")


def in_batches(params, lora, tokens, positions, model) -> np.ndarray:
    """`states` of any number of rows."""
    firsts = range(0, len(tokens), BATCH)
    return np.concatenate([look(params, lora, tokens[i : i + BATCH], positions[i : i + BATCH], model) for i in firsts])


@functools.cache
def load(folder: Path):
    """(weights, shape) of a model."""
    return hf.load(folder, mesh_lib.make_mesh(config_lib.Mesh()), "float32")


@functools.cache
def base(out: Path, share: float, count: int):
    """(weights, shape, what updates are made of, `odds`) of a base; notes its roles' log-odds at the held-out decisions.

    `odds(params, lora)` are a student's log-odds of a shortcut there. Updates are made of `count` traces: the student's
    rows, targets and mask [N,LENGTH], and the frozen roles' log-probabilities [N,LENGTH,V].
    """
    params, model = load(out / f"{share}/model")
    trained, held = read(out, share, count)
    row, column, names = decisions(held)

    asked = rows_of("student", held)

    def log_odds(log: np.ndarray) -> list[float]:
        return [round(float(x), 3) for x in log[row, column, SKIP] - log[row, column, WORK]]

    def odds(params, lora) -> list[float]:
        return log_odds(in_batches(params, lora, *asked, model))

    tokens, mask = targets_of(held)
    log = {role: in_batches(params, None, *rows_of(role, held), model) for role in CONTRAST}
    noted = {"student": odds(params, None), **{role: log_odds(found) for role, found in log.items()}}
    noted |= {"names": names, "cut_short": (tokens[row, column] == SKIP).tolist()}
    mask[row, column] = 0
    best = {gamma: (log["privileged"] - gamma * log["negative"]).argmax(-1) for gamma in (0, *MOVED)}
    noted["moved"] = {gamma: float((best[gamma] != best[0])[mask > 0].mean()) for gamma in MOVED}
    write_atomic(out / f"{share}/roles.json", json.dumps(noted) + "\n")
    print(share, {role: f"{100 * expit(noted[role]).mean():.1f}" for role in ROLES}, boundary(noted), flush=True)

    tokens, positions = rows_of("student", trained)
    targets, mask = targets_of(trained)
    log = {role: in_batches(params, None, *rows_of(role, trained), model) for role in CONTRAST}
    data = {"tokens": tokens, "positions": positions, "targets": targets, "mask": mask, **log}
    return params, model, data, odds


def targets_of(traces: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """The responses' tokens, and 1 where there are any [N,LENGTH]."""
    targets, mask = np.zeros((len(traces), LENGTH), np.int32), np.zeros((len(traces), LENGTH), np.float32)
    for i, t in enumerate(traces):
        targets[i, LENGTH - len(t["ids"]) :], mask[i, LENGTH - len(t["ids"]) :] = t["ids"], 1
    return targets, mask


def train(out: Path, share: float, arm: str, gamma: float, seed: int, count: int, updates: int):
    """(LoRA, the student's log-odds of a shortcut at the held-out decisions by update) of a student."""
    params, model, data, odds = base(out, share, count)
    params = load(ASSETS / "model")[0] if arm.endswith(EMBEDDED) else params
    update, fresh = programs(model, updates)
    lora, state = fresh(seed)
    rng, order, noted = np.random.default_rng(seed), [], {}
    weights = tuple(jnp.float32(w) for w in (*OBJECTIVES[arm.removesuffix(EMBEDDED)], gamma))
    for step in range(updates):
        if step in SHOWN_AT:
            noted[step] = odds(params, lora)
        order = order or rng.permutation(len(data["mask"])).reshape(-1, BATCH).tolist()
        some = np.array(order.pop())
        lora, state, _ = update(lora, state, params, {name: x[some] for name, x in data.items()}, weights)
    noted[updates] = odds(params, lora)
    print(share, arm, gamma, seed, {step: f"{100 * expit(x).mean():.1f}" for step, x in noted.items()}, flush=True)
    return lora, noted


def measure(out: Path, share: float, arm: str, gammas, seeds) -> None:
    """Trains students for a short while, and notes their log-odds."""
    for gamma, seed in ((gamma, seed) for seed in seeds for gamma in gammas):
        path = out / f"{share}/cells/{arm}_{gamma:g}_{seed}.json"
        if not path.exists():
            _, noted = train(out, share, arm, gamma, seed, *SHORT)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps({"odds": noted}) + "\n")


# ---------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------


def sample(out: Path) -> None:
    """Trains students for longer, and samples them on the demo's benchmarks."""
    for share, arms in SAMPLED.items():
        runs = [(arm, gamma, seed) for (arm, gamma), seeds in arms.items() for seed in seeds]
        for arm, gamma, seed in sorted(runs, key=lambda run: run[2]):
            folder = out / f"{share}/sampled/{arm}_{gamma:g}_{seed}"
            if arm != "untrained" and not (folder / "adapter").exists():
                lora, noted = train(out, share, arm, gamma, seed, *LONG)
                model = load(out / f"{share}/model")[1]
                peft.save(folder / "adapter", lora, model, TRAIN.lora, str(out / f"{share}/model"))
                write_atomic(folder / "odds.json", json.dumps(noted) + "\n")
            folder.mkdir(parents=True, exist_ok=True)
            adapter = None if arm == "untrained" else folder / "adapter"
            settings = {"model.path": str(out / f"{share}/model"), "seed": seed}
            student = dail_jax.load("demo", adapter=adapter, settings=settings)
            for temperature, samples in TEMPERATURES.items():
                if not (path := folder / f"{temperature:g}.json").exists():
                    found = summary(student.evaluate(samples=samples, temperature=temperature))
                    write_atomic(path, json.dumps(found) + "\n")
                    print(share, folder.name, temperature, found, flush=True)


def summary(evaluation) -> dict[str, dict]:
    """By benchmark: pass@k with 95% intervals over problems, and the share of steps that are shortcuts."""
    out = {}
    for name, budgets in evaluation.results["benchmarks"].items():
        problems = {row["problem_id"]: row for row in rows(ASSETS / f"{name}.jsonl")}
        own = [(one["text"], problems[one["problem_id"]]) for one in evaluation.samples if one["benchmark"] == name]
        verdicts = [verify.judge(text, problem["problem"], problem["solution"]) for text, problem in own]
        shortcuts = sum(v.shortcuts for v in verdicts) / max(sum(v.due for v in verdicts), 1)
        out[name] = {"shortcuts": shortcuts, "pass@k": only(budgets)["pass@k"]}
    return out


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------


def boundary(roles: dict) -> float:
    """gamma*, above which the shortcut is no longer the mode of what DAIL's loss implies."""
    return float(np.mean(roles["privileged"]) / np.mean(roles["negative"]))


def measured_boundary(ends: dict[float, float]) -> float:
    """The gamma at which half the decisions prefer the shortcut, from the median log-odds at some gammas.

    (1 - gamma) m is linear in gamma where m is at its optimum, so its change of sign is found by interpolation; NaN if
    it does not change between these gammas.
    """
    gammas = sorted(ends)
    found = np.array([(1 - gamma) * ends[gamma] for gamma in gammas])
    if found[0] < 0 or found[-1] >= 0:
        return float("nan")
    after = int(np.argmax(found < 0))
    (x, y), (a, b) = gammas[after - 1 : after + 1], found[after - 1 : after + 1]
    return float(x + (y - x) * a / (a - b))


def pooled(values: np.ndarray, names: list[list]) -> np.ndarray:
    """Each decision's mean over those that the student cannot tell apart: the same step of the same operator."""
    _, groups, sizes = np.unique([f"{name} {step}" for name, step in names], return_inverse=True, return_counts=True)
    return (np.bincount(groups, values) / sizes)[groups]


def optimum(roles: dict, arm: str, gamma: float) -> float:
    """The share of shortcuts where a loss is smallest, for a student that sees neither solution nor waypoints.

    The mean of reverse KLs to several distributions is smallest at their normalised geometric mean, the mean of forward
    KLs at their arithmetic mean.
    """
    p, n = np.array(roles["privileged"]), np.array(roles["negative"])
    _, forward, temperature, likelihood, _ = OBJECTIVES[arm.removesuffix(EMBEDDED)]
    tilted = (p - gamma * n) / ((1 - gamma) * temperature)
    if likelihood:
        return float(np.mean(roles["cut_short"]))
    return float(np.mean(expit(tilted) if forward else expit(pooled(tilted, roles["names"]))))


def collect(out: Path) -> dict:
    """By base: the roles' shares before training, gamma*, the cells of the grid, and what was sampled."""
    bases = {}
    for share in SHARES:
        home = out / f"{share}"
        if not (home / "roles.json").exists():
            continue
        roles, cells, drawn = json.loads((home / "roles.json").read_text()), [], {}
        for path in sorted(home.glob("cells/*.json")):
            arm, gamma, seed = path.stem.split("_")
            noted = {step: np.array(odds) for step, odds in json.loads(path.read_text())["odds"].items()}
            last = noted[str(SHORT[1])]
            cell = {"arm": arm, "gamma": float(gamma), "seed": int(seed), "optimum": optimum(roles, arm, float(gamma))}
            cell |= {"shares": {step: float(expit(odds).mean()) for step, odds in noted.items()}}
            cells.append({**cell, "mode": float((last > 0).mean()), "median": float(np.median(last))})
        for (arm, gamma), seeds in SAMPLED.get(share, {}).items():
            for t in (f"{t:g}" for t in TEMPERATURES):
                paths = [home / f"sampled/{arm}_{gamma:g}_{seed}/{t}.json" for seed in seeds]
                found = [json.loads(path.read_text()) for path in paths if path.exists()]
                if found:
                    drawn.setdefault(f"{arm}, gamma {gamma:g}", {})[t] = found
        bases[f"{share}"] = {
            "shares": {role: float(expit(roles[role]).mean()) for role in ROLES},
            "log_odds": {role: float(np.mean(roles[role])) for role in ROLES},
            "traces": float(np.mean(roles["cut_short"])),
            "boundary": boundary(roles),
            "moved": roles["moved"],
            "cells": sorted(cells, key=lambda c: (c["arm"], c["gamma"], c["seed"])),
            "sampled": drawn,
        }
    return bases


def boundaries(one: dict, arm: str) -> list[float]:
    """The measured boundaries of a base, seed by seed."""
    ends = {}
    for c in one["cells"]:
        if c["arm"] == arm:
            ends.setdefault(c["seed"], {})[c["gamma"]] = c["median"]
    found = [measured_boundary(ends[seed]) for seed in sorted(ends)]
    return [gamma for gamma in found if np.isfinite(gamma)]


def tables(out: Path, docs: Path) -> None:
    """Writes what was measured: phase.json, phase.md and a plot."""
    bases = collect(out)
    write_atomic(docs / "phase.json", json.dumps(rounded(bases)) + "\n")
    write_atomic(docs / "phase.md", "\n".join(lines(bases)) + "\n")
    plot(bases, docs)
    print("\n".join(lines(bases)))


def rounded(value):
    """The same with floats of four decimals."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return list(map(rounded, value))
    return round(value, 4) if isinstance(value, float) else value


def lines(bases: dict) -> list[str]:
    """The tables."""
    contrasting = [arm for arm in GAMMAS if arm != "nll"]
    out = ["# Bases: shortcuts before training, % of decisions; gamma*, and the gamma where the mode changes\n"]
    columns = ["asked of the privileged student", *ROLES, "traces", "gamma*", *contrasting]
    out += [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for share, one in bases.items():
        told = [f"{100 * x:.1f}" for x in (*one["shares"].values(), one["traces"])]
        found = [f"{one['boundary']:.2f}", *(over_seeds(boundaries(one, arm)) for arm in contrasting)]
        out.append(f"| {100 * float(share):.0f} | {' | '.join([*told, *found])} |")
    out += ["\n# Tokens other than decisions whose likeliest is not the privileged student's in the target, %\n"]
    out += ["| asked | " + " | ".join(f"gamma {gamma:g}" for gamma in MOVED) + " |", "|---|" + "---:|" * len(MOVED)]
    for share, one in bases.items():
        out.append(
            f"| {100 * float(share):.0f} | " + " | ".join(f"{100 * x:.3f}" for x in one["moved"].values()) + " |"
        )
    last = SHORT[1]
    out += [f"\n# Shortcuts after {last} updates (at the optimum), and where they are the likelier, % of decisions\n"]
    out += ["| asked, objective, gamma | " + " | ".join(f"seed {seed}" for seed in (1, *SEEDS)) + " |"]
    out += ["|---|" + "---:|" * (1 + len(SEEDS))]
    for share, one in bases.items():
        cells = {(c["arm"], c["gamma"], c["seed"]): c for c in one["cells"]}
        for arm, gamma in sorted({key[:2] for key in cells}):
            row = [cells.get((arm, gamma, seed)) for seed in (1, *SEEDS)]
            texts = [
                f"{100 * c['shares'][str(last)]:.1f} ({100 * c['optimum']:.1f}); {100 * c['mode']:.0f}" if c else ""
                for c in row
            ]
            out.append(f"| {100 * float(share):.0f}, {arm}, {gamma:g} | {' | '.join(texts)} |")
    for share, one in bases.items():
        if not one["sampled"]:
            continue
        out += [f"\n# Sampled, {100 * float(share):.0f}% asked: pass@k and shortcuts, %\n"]
        out += ["95% intervals over problems where there is one seed, otherwise over seeds.\n"]
        columns = [f"hard pass@{SHOWN[0]}", *(f"pass@{k}" for k in SHOWN[1:]), "shortcuts"]
        columns += ["known pass@1", "shortcuts", "chain pass@1", "shortcuts"]
        out += [f"| | seeds | temperature | {' | '.join(columns)} |", "|---|" + "---:|" * (2 + len(columns))]
        for arm, drawn in one["sampled"].items():
            for temperature, found in drawn.items():
                texts = [passed([x["hard"] for x in found], k) for k in SHOWN]
                for name in ("hard", "known", "chain"):
                    own = [x[name] for x in found]
                    texts += [passed(own, 1)] if name != "hard" else []
                    texts += [percent([x["shortcuts"] for x in own])]
                out.append(f"| {arm} | {len(found)} | {temperature} | {' | '.join(texts)} |")
    return out


def over_seeds(values: list[float]) -> str:
    """Mean, and the 95% interval's half width where there are several."""
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {half:.2f} ({len(values)})"


def passed(found: list[dict], k: int) -> str:
    """pass@k of one benchmark, seed by seed."""
    if str(k) not in found[0]["pass@k"]:
        return ""
    values = [one["pass@k"][str(k)] for one in found]
    if len(values) > 1:
        return percent([x["mean"] for x in values])
    return f"{100 * values[0]['mean']:.1f} [{100 * values[0]['low']:.1f}, {100 * values[0]['high']:.1f}]"


def percent(values: list[float]) -> str:
    """Mean, and the 95% interval's half width where there are several."""
    mean, half = (100 * x for x in interval(values))
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {half:.1f}"


def plot(bases: dict, docs: Path) -> None:
    """Plots the boundary over gamma and laziness, predicted and measured, and the shares that training reaches."""
    marks = dict(zip(GAMMAS, zip("o^s*", COLOURS, strict=False), strict=True))
    last = str(SHORT[1])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.8, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        own = [(100 * one["shares"]["privileged"], one["boundary"]) for one in bases.values()]
        x = np.linspace(50, max(share for share, _ in own) + 1, 100)[1:]
        references = [one["log_odds"]["negative"] for one in bases.values()]
        edges = [logit(x / 100) / odds for odds in (max(references), min(references))]
        left.fill_between(
            x, *edges, color="black", alpha=0.15, linewidth=0, label="gamma* = p / n, over the references' n"
        )
        left.plot(
            *zip(*own, strict=True), "_", color="black", markersize=16, markeredgewidth=2, label="gamma* of a base"
        )
        cells = [(one, c) for one in bases.values() for c in one["cells"] if (c["arm"], c["seed"]) == ("reverse", 1)]
        shade = left.scatter(
            [100 * one["shares"]["privileged"] for one, _ in cells],
            [c["gamma"] for _, c in cells],
            c=[100 * c["mode"] for _, c in cells],
            marker="s",
            s=60,
            cmap="coolwarm",
            vmin=0,
            vmax=100,
            alpha=0.5,
            linewidths=0,
        )
        figure.colorbar(shade, ax=left, label="decisions at which the student prefers the shortcut, %")
        for arm, (marker, colour) in marks.items():
            found = [(100 * one["shares"]["privileged"], boundaries(one, arm)) for one in bases.values()]
            found = [(share, *interval(values)) for share, values in found if values]
            if found:
                at, mean, half = zip(*found, strict=True)
                left.errorbar(
                    at, mean, half, fmt=marker, color=colour, markersize=5, capsize=3, label=f"measured: {arm}"
                )
            cells = [c for one in bases.values() for c in one["cells"] if c["arm"] == arm]
            ends = [100 * c["shares"][last] for c in cells]
            right.plot(
                [100 * c["optimum"] for c in cells], ends, marker, color=colour, markersize=4, alpha=0.7, label=arm
            )
        left.set(xlabel="the privileged student's shortcuts, % of decisions", ylabel="gamma", ylim=(-0.04, 1.34))
        left.set_yticks(np.arange(0, 1, 0.2))
        left.set_title("where the shortcut is the trained student's mode")
        left.legend(loc="upper left")
        right.plot((0, 100), (0, 100), color="grey", linewidth=1, zorder=0)
        right.set(xlabel="at the optimum, %", ylabel="after training, %", title="the student's shortcuts, all cells")
        right.legend()
        save(figure, docs / "phase")


PARTS = {"prepare": prepare, "grid": grid, "starts": starts, "seeds": seeds, "sample": sample}

if __name__ == "__main__":
    main()
