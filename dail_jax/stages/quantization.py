"""quantization: what int8 weights change, on the expert solutions of some rows -> a table and quantization.json.

The exact model and its int8 form read the student's prompt and the expert solution of each row. What is compared is what
they say about every token of the solution: one forward pass each, and no sampling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.data import batches
from dail_jax.data.batches import Example
from dail_jax.data.records import Row
from dail_jax.errors import UserError
from dail_jax.metrics import console, log, progress
from dail_jax.model import transformer
from dail_jax.model.weights import Params
from dail_jax.rundir import write_atomic
from dail_jax.stages import recipes
from dail_jax.stages.session import Session, open_session
from dail_jax.train import step as step_lib


def run(config: config_lib.Config, rows: int = 32) -> None:
    session, chosen = open_session(config), recipes.rows_of(config)[:rows]
    with jax.set_mesh(session.mesh):
        figures = measure(session, chosen)
    if jax.process_index() == 0:
        console.print(table(figures))
        path = Path(config.run_dir) / "quantization.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(figures, indent=1) + "\n")
        log(f"quantization: wrote {path}")


def measure(session: Session, rows: list[Row]) -> dict[str, Any]:
    """The figures of quantization.json; raises UserError if no prompt with its solution is within `train.max_tokens`.

    Differences are of natural logarithms of probabilities. Both forms of the weights are held at once.
    """
    cfg, mesh, model = session.config.train, session.mesh, session.model
    examples = [
        Example(row.problem_id, {"student": tuple(built.student)}, tuple(built.expert))
        for row, built in zip(rows, session.prompts.build_all(rows), strict=True)
        if len(built.student) + len(built.expert) <= cfg.max_tokens
    ]
    if not examples:
        raise UserError(f"got {cfg.max_tokens}, and no prompt with its solution fits", field="train.max_tokens")
    forms = [session.in_form(None).params, session.in_form("int8").params]
    count = mesh_lib.axis_size(mesh, "b") * max(1, 8 // mesh_lib.axis_size(mesh, "b"))
    assemble = batches.Assemble(examples, cfg.bucket, 1, mesh_lib.local_rows(mesh, count), ("student",))
    order, states = np.argsort([len(e.response) for e in examples], kind="stable"), step_lib.make_states(mesh)
    sums: dict[str, float] = {}
    with progress("comparing", len(examples), "rows") as bar:
        for start in range(0, len(order), count):
            index = order[start : start + count]
            batch = assemble.map(np.pad(index, (0, count - len(index)), constant_values=-1))
            arrays = {name: x[0] for name, x in mesh_lib.to_devices(batch, mesh, count).items()}
            tokens, positions, mask = (arrays[name] for name in ("student_tokens", "student_positions", "mask"))
            length, width = mask.shape[-1], max(1, cfg.chunk // count)
            hidden = [states(model, cfg.remat, params, None, tokens, positions, length) for params in forms]
            for at in range(0, length, width):
                part = slice(at, at + width)
                found = _compare(forms, [x[:, part] for x in hidden], arrays["targets"][:, part], mask[:, part])
                for name, x in jax.device_get(found).items():
                    old = sums.get(name, 0.0)
                    sums[name] = max(old, float(x)) if name.startswith("max") else old + float(x)
            bar.advance(len(index))
    mean = {name: sums[name] / sums["tokens"] for name in ("exact", "int8", "difference", "kl", "argmax")}
    exact, quantized = (sum(x.nbytes for x in jax.tree.leaves(params)) for params in forms)
    return {
        "rows": len(examples),
        "tokens": int(sums["tokens"]),
        "log_probability": {"exact": mean["exact"], "int8": mean["int8"]},
        "difference": {"mean": mean["difference"], "max": sums["max_difference"]},
        "kl": {"mean": mean["kl"], "max": sums["max_kl"]},
        "argmax_agrees": mean["argmax"],
        "bytes": {"exact": exact, "int8": quantized, "ratio": quantized / exact},
    }


@jax.jit
def _compare(forms: list[Params], hidden: list[jax.Array], targets: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens [B,T] of `mask`, and largest values, from final states [B,T,D] of both forms."""
    exact, quantized = (
        jax.nn.log_softmax(transformer.unembed(params, x)) for params, x in zip(forms, hidden, strict=True)
    )
    of = lambda log: jnp.take_along_axis(log, targets[..., None], -1)[..., 0]  # noqa: E731
    by_token = {
        "tokens": jnp.ones_like(mask, jnp.float32),
        "exact": of(exact),
        "int8": of(quantized),
        "difference": jnp.abs(of(exact) - of(quantized)),
        "kl": (jnp.exp(exact) * (exact - quantized)).sum(-1),
        "argmax": exact.argmax(-1) == quantized.argmax(-1),
    }
    sums = {name: jnp.where(mask, x, 0).sum() for name, x in by_token.items()}
    largest = {f"max_{name}": jnp.where(mask, by_token[name], 0).max() for name in ("difference", "kl")}
    return {**sums, **largest}


def table(figures: dict[str, Any]) -> Table:
    shown = Table(show_header=False)
    log_probability, size = figures["log_probability"], figures["bytes"]
    for name, text in (
        ("tokens", f"{figures['tokens']:,} of {figures['rows']} solutions"),
        ("mean log-probability, exact; int8", f"{log_probability['exact']:.4f}; {log_probability['int8']:.4f}"),
        ("difference, mean; largest", "{mean:.4f}; {max:.3f}".format(**figures["difference"])),
        ("KL(exact || int8), mean; largest", "{mean:.5f}; {max:.3f}".format(**figures["kl"])),
        ("the likeliest token is the same", f"{figures['argmax_agrees']:.2%}"),
        ("GB, exact; int8", f"{size['exact'] / 1e9:.4g}; {size['int8'] / 1e9:.4g} ({size['ratio']:.4f})"),
    ):
        shown.add_row(name, text)
    return shown
