"""The micro-world study: methods and ablations over seeds. Makes the tables and plots of docs/study.md.

    python benchmarks/study.py --seeds 1,2,3,4,5      (hours on two CPU cores; a second call resumes)
    python benchmarks/study.py --seeds 1,2,3,4,5 --tables-only      (from the existing runs)

Each seed has its own rollouts, LoRA, order of examples and evaluation samples; the base model and the problems are the
same. Intervals are over seeds: mean +- t(0.975, seeds - 1) * standard error. Seeds are independent: to use two cores well,
start one process per core on seeds of its own, then make the tables from all of them. Arms whose runs are not in --out
keep the values that study.json has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from scipy import stats
from scipy.special import entr, expit, log_softmax

from dail_jax.microworld import verify
from dail_jax.report.plots import COLOURS, STYLE
from dail_jax.rundir import json_line, write_atomic
from dail_jax.text import load_tokenizer
from dail_jax.train.methods import CONTRAST

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "dail_jax/microworld/assets"
TRAINED = 64  # hard training problems that the arms are evaluated on
CONFIGS = {"methods": "microworld_methods", "ablations": "microworld_study", "sharp": "microworld_sharp"}
# Arms also evaluated at lower temperatures, and arms also evaluated with MANY samples per problem.
COLD = {"nll": "methods", "dail": "methods", "sharp": "sharp", "gated": "sharp", "nll_100": "ablations"}
TEMPERATURES = ("0.5", "0.2", "0")
DIVERSE = ("nll", "dail", "sharp")
MANY = 128
# The grid of `sharp`, for the first seed alone.
GRID = {"loss.temperature": (0.2, 0.3, 0.1, 0.5, 0.7, 1.0), "gamma": (0.1, 0.3, 0.0, 0.5)}
CELLS = sorted(itertools.product(*GRID.values()))
PARTS = (*CONFIGS, "grid", "temperature", "diversity")
METHODS = {
    "base": "untrained",
    "sft": "SFT on experts",
    "nll": "NLL on traces",
    "star": "STaR",
    "grpo": "GRPO",
    "nurl": "NuRL hints",
    "onpolicy": "on-policy self-distillation",
    "dail": "DAIL",
    "sharp": "sharp",
}
ABLATIONS = {
    "gamma": {"dail, gamma 0": "gamma_0", "0.1": "dail", "0.3": "gamma_0.3", "0.6": "gamma_0.6"},
    "KL": {"reverse, gamma 0": "gamma_0", "forward, gamma 0": "forward"},
    "length": {"6 epochs": "dail", "12 epochs": "long"},
    "rollouts": {
        "mixed, tau 0.5": "tau_0.5",
        "mixed, tau 0.8": "dail",
        "direct, tau 1": "tau_1",
        "mixed, gamma 0": "gamma_0",
        "direct, gamma 0": "tau_1_gamma_0",
        "mixed, NLL": "nll",
        "direct, NLL": "tau_1_nll",
    },
    "solutions, DAIL": {
        "25": "dail_25",
        "50": "dail_50",
        "100": "dail_100",
        "200": "dail_200",
        "400": "dail_400",
        "800": "dail",
    },
    "solutions, NLL": {"25": "nll_25", "100": "nll_100", "400": "nll_400", "800": "nll"},
    "temperature": {
        f"{label}, {t}": arm if t == "1" else f"{arm}_t{t}"
        for arm, label in {
            "dail": "DAIL",
            "gated": "DAIL with a gate",
            "sharp": "sharp",
            "nll": "NLL",
            "nll_100": "NLL, 100 solutions",
        }.items()
        for t in ("1", *TEMPERATURES)
    },
    "sharp": {
        "sharp, gamma 0.1, T 0.2": "sharp",
        "gamma 0.3, T 0.3": "sharp_0.3",
        "gamma 0, T 0.21": "sharp_alone",
        "NLL": "nll",
        "NLL, traces drawn at temperature 0.2": "nll_drawn_at_0.2",
        "NLL, traces drawn greedily": "nll_drawn_greedily",
        "DAIL": "dail",
        "DAIL with a gate": "gated",
        "from forward to reverse": "scheduled",
    },
    "sharp, T and gamma": {f"T {t}, gamma {g}": f"temperature={t},gamma={g}" for t, g in CELLS},
}
COLUMNS = {
    "hard@1": "hard pass@1",
    "hard@8": "pass@8",
    "hard@32": "pass@32",
    "unlearned": "operators unlearned, of 8",
    "shortcuts": "shortcut steps",
    "tokens": "tokens",
    "known@1": "known pass@1",
    "chain@1": "chain pass@1",
    "trained@1": "training set pass@1",
    "trained@32": "pass@32",
}
DIVERSITY = {
    **{f"hard@{k}": f"hard pass@{k}" for k in (1, 8, 32, MANY)},
    "traces": f"different traces among {MANY}",
    "answers": "different answers",
    "entropy": "entropy on traces, nats per 100 tokens",
}
TARGETS = {
    "shortcuts": "shortcut steps",
    "mode": "steps where the shortcut is the likeliest",
    "entropy": "entropy, nats per 100 tokens",
    "moved": "tokens whose likeliest is not the privileged student's",
}
PLAIN = ("unlearned", "tokens", "traces", "answers")  # the other columns are shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=Path("docs/study"), help="where the tables and plots go")
    parser.add_argument("--part", choices=PARTS, help="(default: all)")
    parser.add_argument("--tables-only", action="store_true")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    parts = [options.part] if options.part else PARTS
    if not options.tables_only:
        trained = write_trained(options.out)
        for part in parts:
            for seed in seeds[:1] if part == "grid" else seeds:
                run(part, seed, options.out, trained)
        if options.part or len(seeds) < 2:
            return
    tables(options.out, seeds, options.docs)


def write_trained(out: Path) -> Path:
    """The first TRAINED hard problems of the training set, as an evaluation set."""
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()]
    hard = [row for row in rows if row["problem_id"].startswith("hard-")][:TRAINED]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "trained.jsonl", "".join(map(json_line, hard)))
    return out / "trained.jsonl"


def run(part: str, seed: int, out: Path, trained: Path) -> None:
    demo = ["--config", "configs/demo.yaml", f"seed={seed}"]
    home, sets = f"{out}/{part}/seed{seed}", benchmarks("hard", "chain", "known")
    if part in CONFIGS:
        if part == "methods":
            sets = benchmarks("hard", "chain", "known", trained=trained)
        own = [sets] if part != "ablations" else []
        launch(["run", *demo, "--config", f"configs/{CONFIGS[part]}.yaml", *own, f"run_dir={home}"])
    elif part == "grid":
        over = [
            word for key, values in GRID.items() for word in ("--over", f"train.{key}={','.join(map(str, values))}")
        ]
        traces = f"traces={out}/methods/seed{seed}/traces.jsonl"
        launch(["sweep", *demo, sets, traces, "train.objective=sharp", *over, f"run_dir={home}"])
    else:  # the adapters of other parts, evaluated again
        changes = {arm: {f"{arm}_t{t}": f"evaluate.sampling.temperature={t}" for t in TEMPERATURES} for arm in COLD}
        if part == "diversity":
            sets = benchmarks("hard")
            changes = {arm: {f"{arm}_n{MANY}": f"evaluate.samples={MANY}"} for arm in DIVERSE}
        for arm, folders in changes.items():
            adapter = f"evaluate.adapter={out}/{COLD[arm]}/seed{seed}/{arm}/adapter"
            for folder, change in folders.items():
                launch(["evaluate", *demo, sets, "train.objective=none", adapter, change, f"run_dir={home}/{folder}"])


def benchmarks(*names: str, **files: Path) -> str:
    sets = {**{name: f"dail_jax/microworld/assets/{name}.jsonl" for name in names}, **files}
    return f"evaluate.benchmarks=[{', '.join(f'{{name: {n}, rows: {{path: {path}}}}}' for n, path in sets.items())}]"


def launch(command: list[str]) -> None:
    command = [sys.executable, "benchmarks/study_methods.py", *command]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------


def measure(folder: Path, problems: dict[str, dict]) -> dict[str, float]:
    """The columns of one finished arm."""
    results = json.loads((folder / "results.json").read_text())["benchmarks"]
    out = {"tokens": only(results["hard"])["mean_tokens"]}
    for name, ks in {"hard": (1, 8, 32, MANY), "known": (1,), "chain": (1,), "trained": (1, 32)}.items():
        if name in results:
            found = only(results[name])["pass@k"]
            out |= {f"{name}@{k}": found[str(k)]["mean"] for k in ks if str(k) in found}
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["benchmark"] == "hard"]
    judged = (
        (row["problem_id"], verify.judge(row["text"], problem["problem"], problem["solution"]))
        for row in rows
        for problem in [problems[row["problem_id"]]]
    )
    out["traces"] = len({(row["problem_id"], row["text"]) for row in rows}) / len(problems)
    out["answers"] = len({(row["problem_id"], row["answer"]) for row in rows}) / len(problems)
    if (folder / "checkpoints").exists():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["stage"] == "train"]
        out["entropy"] = statistics.mean(row["entropy"] for row in rows if row["epoch"] == rows[-1]["epoch"])
    tallies = verify.tally(judged)
    total = tallies.pop("hard")
    out["unlearned"] = sum(t.sound < 0.01 * t.traces for t in tallies.values())
    out["shortcuts"] = total.shortcuts / total.due if total.due else math.nan
    return out


def targets(run: Path, traces: Path) -> dict[str, dict[str, float]]:
    """What the targets of `sharp` in the grid hold at the tokens of the traces: what a student would do that fits them.

    From the references that a run of the grid has cached. A step that owes column work goes on with " : ", or with " > "
    where it is a shortcut.
    """
    tokenizer = load_tokenizer(str(ASSETS / "model"))
    (work,), (skip,) = tokenizer.encode(" : "), tokenizer.encode(" > ")
    owing = {tokenizer.encode(word)[0] for word in ("add ", "sub ", "mul ")}
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    responses = [row["response_ids"] for row in rows if row["drop"] is None]
    embedding = load_file(ASSETS / "model/model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
    log = {}
    for role in CONTRAST:
        states = np.fromfile(run / "references" / f"{role}.bin", np.float32).reshape(-1, embedding.shape[1])
        log[role] = log_softmax(states @ embedding.T, axis=-1)
    assert sum(map(len, responses)) == len(log["negative"]), f"{run} was trained on other traces"
    due, at = [], 0
    for ids in responses:
        owes = False
        for i, token in enumerate(ids):
            if owes and token in (work, skip):
                due.append(at + i)
            owes = token in owing or (owes and token not in (work, skip))
        at += len(ids)
    out = {}
    for t, gamma in CELLS:
        target = log_softmax((log["privileged"] - gamma * log["negative"]) / ((1 - gamma) * t), axis=-1)
        odds = target[due, skip] - target[due, work]
        moved = target.argmax(-1) != log["privileged"].argmax(-1)
        out[f"target of temperature={t},gamma={gamma}"] = {
            "shortcuts": float(expit(odds).mean()),
            "entropy": float(entr(np.exp(target)).sum(-1).mean()),
            "moved": float(moved.mean()),
        }
    for role in CONTRAST:
        odds = log[role][due, skip] - log[role][due, work]
        out[f"shortcuts of the {role} role"] = {
            "shortcuts": float(expit(odds).mean()),
            "mode": float((odds > 0).mean()),
        }
    return out


def only(budgets: dict) -> dict:
    (result,) = budgets.values()
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the values that are not NaN."""
    values = [v for v in values if not math.isnan(v)]
    if len(values) < 2:
        return values[0] if values else math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def tables(out: Path, seeds: list[int], docs: Path) -> None:
    problems = {r["problem_id"]: r for r in map(json.loads, (ASSETS / "hard.jsonl").read_text().splitlines())}
    stored = docs / "study.json"
    kept = json.loads(stored.read_text()) if stored.exists() else {}
    measured: dict[str, dict[str, list[float]]] = {}
    for part in PARTS:
        for seed in seeds:
            for folder in sorted((out / part / f"seed{seed}").glob("*/results.json")):
                arm = measured.setdefault(folder.parent.name, {})
                for column, value in measure(folder.parent, problems).items():
                    arm.setdefault(column, []).append(value)
    for seed in seeds:
        for manifest in sorted((out / f"grid/seed{seed}").glob("*/references/manifest.json"))[:1]:
            for name, columns in targets(manifest.parent.parent, out / f"methods/seed{seed}/traces.jsonl").items():
                for column, value in columns.items():
                    measured.setdefault(name, {}).setdefault(column, []).append(value)
    for arm in DIVERSE:  # the entropy of the same seeds, noted while they were trained
        if f"{arm}_n{MANY}" in measured and "entropy" in measured.get(arm, {}):
            measured[f"{arm}_n{MANY}"]["entropy"] = measured[arm]["entropy"]
    newer = {arm: row for arm, row in measured.items() if seeds_of(row) >= seeds_of(kept.get(arm, {}))}
    measured = {**kept, **newer}
    docs.mkdir(parents=True, exist_ok=True)
    write_atomic(stored, json.dumps(measured, indent=1) + "\n")
    text = ["# Methods\n", *table({label: measured[arm] for arm, label in METHODS.items() if arm in measured})]
    for title, arms in ABLATIONS.items():
        found = {label: measured[arm] for label, arm in arms.items() if arm in measured}
        text += [f"\n# Ablation: {title}\n", *table(found)] if found else []
    found = {METHODS[a]: measured[f"{a}_n{MANY}"] for a in DIVERSE if f"{a}_n{MANY}" in measured}
    text += ["\n# Diversity\n", *table(found, DIVERSITY)] if found else []
    cells = {f"T {t}, gamma {g}": f"target of temperature={t},gamma={g}" for t, g in CELLS}
    cells |= {f"{role} role": f"shortcuts of the {role} role" for role in CONTRAST}
    found = {label: measured[name] for label, name in cells.items() if name in measured}
    text += ["\n# What the target of `sharp` holds\n", *table(found, TARGETS, 2)] if found else []
    write_atomic(docs / "tables.md", "\n".join(text) + "\n")
    plot(measured, docs)
    plot_sharp(measured, docs)
    print("\n".join(text), f"\nwrote {docs}/tables.md, study.json and plots")


def table(rows: dict[str, dict[str, list[float]]], titles: dict[str, str] = COLUMNS, digits: int = 1) -> list[str]:
    columns = [c for c in titles if any(c in row for row in rows.values())]
    lines = [
        "| | seeds | " + " | ".join(titles[c] for c in columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for label, row in rows.items():
        cells = [cell(c, row[c], digits) if c in row else "" for c in columns]
        lines.append(f"| {label} | {seeds_of(row)} | " + " | ".join(cells) + " |")
    return lines


def seeds_of(row: dict[str, list[float]]) -> int:
    return max(map(len, row.values()), default=0)


def cell(column: str, values: list[float], digits: int) -> str:
    mean, half = (f"{x:.{digits}f}" for x in interval([v if column in PLAIN else 100 * v for v in values]))
    return "-" if mean == "nan" else mean if half == "nan" else f"{mean} ± {half}"


def plot(measured: dict[str, dict[str, list[float]]], docs: Path) -> None:
    """Plots hard pass@1 and what it costs against gamma, the number of solutions, and tau."""
    panels = {
        "gamma": {"DAIL": {0: "gamma_0", 0.1: "dail", 0.3: "gamma_0.3", 0.6: "gamma_0.6"}},
        "expert solutions": {
            "DAIL": {25: "dail_25", 50: "dail_50", 100: "dail_100", 200: "dail_200", 400: "dail_400", 800: "dail"},
            "NLL": {25: "nll_25", 100: "nll_100", 400: "nll_400", 800: "nll"},
        },
        "tau (1: direct sampling)": {"DAIL": {0.5: "tau_0.5", 0.8: "dail", 1: "tau_1"}},
    }
    shown = {"hard@1": "hard pass@1", "known@1": "known pass@1", "shortcuts": "shortcut steps"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.8, 3.6), layout="constrained")
        for ax, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for dash, (method, arms) in zip(("-", "--"), curves.items(), strict=False):
                for colour, (column, label) in zip(COLOURS, shown.items(), strict=False):
                    points = [(x, *interval(measured[arm][column])) for x, arm in arms.items() if arm in measured]
                    if points:
                        x, y, half = zip(*points, strict=True)
                        ax.errorbar(
                            x,
                            y,
                            half,
                            label=f"{method}, {label}",
                            color=colour,
                            linestyle=dash,
                            marker="o",
                            markersize=3.5,
                            capsize=2,
                            linewidth=1.3,
                        )
            if title == "expert solutions":
                ax.set_xscale("log", base=2)
                ax.set_xticks((25, 50, 100, 200, 400, 800), ("25", "50", "100", "200", "400", "800"))
            ax.set(xlabel=title, ylim=(-0.02, 1.02))
        ax = figure.axes[1]
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        save(figure, docs / "study")


def plot_sharp(measured: dict[str, dict[str, list[float]]], docs: Path) -> None:
    """Plots what the targets of `sharp` hold against their exponent, and what training on them reached."""
    panels = {
        "shortcuts": "shortcut steps: in the target (lines), after training (points)",
        "entropy": "entropy of the target, nats per token",
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.8, 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels))
        for ax, (column, title) in zip(axes, panels.items(), strict=True):
            for colour, gamma in zip(COLOURS, sorted(GRID["gamma"]), strict=False):
                arms = {1 / ((1 - g) * t): f"temperature={t},gamma={g}" for t, g in CELLS if g == gamma}
                for prefix, line in (("target of ", "-"), ("", "o")):
                    rows = {x: measured.get(prefix + arm, {}) for x, arm in sorted(arms.items())}
                    points = [(x, interval(row[column])[0]) for x, row in rows.items() if column in row]
                    if points and (line == "-" or column == "shortcuts"):
                        ax.plot(*zip(*points, strict=True), line, color=colour, label=f"gamma {gamma}", markersize=4)
            ax.set(title=title, xlabel="exponent 1 / ((1 - gamma) T)", xscale="log")
            ax.set_xticks((1, 2, 5, 10, 20), ("1", "2", "5", "10", "20"))
            ax.minorticks_off()
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=len(GRID["gamma"]))
        save(figure, docs / "sharp")


def save(figure: Figure, path: Path) -> None:
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata=metadata)


if __name__ == "__main__":
    main()
