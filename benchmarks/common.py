"""What the benchmarks share: equal weights on both sides, runs in turn, medians of ratios, a table and JSON rows.

Two libraries that compete for two cores slow each other down in ways that look like results: torch's threads spin
while they wait. So OMP_WAIT_POLICY=passive is set before torch is imported, both sides are warmed up and run in
turn, and the median of the ratios is reported with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

SHAPE = dict(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)


def arguments(description: str, **more: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write one object per row")
    parser.add_argument("--runs", type=int, default=5)
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def random_model():
    """A random transformers model of SHAPE (41.6M parameters, float32), and the same weights as ours."""
    import torch
    import transformers

    from dail_jax import config as config_lib
    from dail_jax import mesh as mesh_lib
    from dail_jax.checkpoint import hf

    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE)).eval()  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        mesh = mesh_lib.make_mesh(config_lib.Mesh())
        params, cfg = hf.load(folder, mesh, "float32")
    return theirs, params, cfg, mesh


def in_turn(runs: int, ours: Callable[[], object], peer: Callable[[], object]) -> tuple[list[float], list[float]]:
    """The seconds that each of `runs` calls takes, both sides in turn after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(runs + 1):
        for side, call in enumerate((ours, peer)):
            started = time.perf_counter()
            call()
            if i:
                times[side].append(time.perf_counter() - started)
    return times


def row(name: str, ours: list[float], peer: list[float], unit: str, work: float) -> dict:
    """`work` per second on both sides; the ratio of our rate to the peer's, with median and quartiles over pairs."""
    ratios = sorted(p / o for o, p in zip(ours, peer, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {
        "name": name,
        "ours": work / statistics.median(ours),
        "peer": work / statistics.median(peer),
        "unit": unit,
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
    }


def show(title: str, rows: list[dict], out: Path | None) -> None:
    table = Table(title=title)
    for column in ("name", "ours", "peer", "unit", "ratio", "low", "high"):
        table.add_column(column, justify="left" if column in ("name", "unit") else "right")
    for r in rows:
        table.add_row(*(f"{r[c]:.4g}" if isinstance(r[c], float) else str(r[c]) for c in table_columns()))
    Console(width=130).print(table)
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")


def table_columns() -> tuple[str, ...]:
    return ("name", "ours", "peer", "unit", "ratio", "low", "high")
