"""The train step beside torch + peft doing the reference implementation's work, with equal weights, in one run.

    python benchmarks/train.py [--json FILE]

The peer runs three forward passes (the student with the adapter, the two references with it disabled) and
full-vocabulary `kl_div` terms, then the backward pass and AdamW. Ours is one jitted update, timed both with references
computed in the step and with references read from the cache, as in every epoch after the first. Losses must agree to
1e-4 before anything is timed.
"""

from __future__ import annotations

import sys

from common import arguments, in_turn, random_model, row, show

BATCH, PROMPT, RESPONSE, GAMMA = 4, 128, 128, 0.1
LENGTHS = {"student": PROMPT, "privileged": 2 * PROMPT, "negative": PROMPT + 32}


def main() -> None:
    args = arguments("train step against torch + peft")
    import jax
    import numpy as np
    import torch

    from dail_jax import config as config_lib
    from dail_jax import mesh as mesh_lib
    from dail_jax.data import batches
    from dail_jax.train import optimizer, references, step

    theirs, params, model, mesh = random_model()
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(1, 32000, n).tolist())  # noqa: E731
    examples = [
        batches.Example(f"e{i}", {r: draw(n) for r, n in LENGTHS.items()}, draw(RESPONSE)) for i in range(BATCH)
    ]
    cfg = config_lib.Train(batch_size=BATCH, bucket=32, gamma=GAMMA, remat="none", chunk=256)
    local = mesh_lib.local_rows(mesh, BATCH)
    peer = Peer(theirs, examples, cfg)
    with jax.set_mesh(mesh):
        tx = optimizer.adamw(cfg.optimizer, 1000)
        layout = step.shardings(model, cfg, tx, mesh)
        spec = step.spec_of(model, cfg)
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            cache = references.compute(
                Path(folder), "bench", spec, params, mesh, examples, BATCH, cfg.bucket, cfg.shapes
            )
            plan = np.arange(BATCH)
            uncached = batches.Assemble(examples, cfg.bucket, 1, local, tuple(LENGTHS)).map(plan)
            cached = batches.Assemble(examples, cfg.bucket, 1, local, ("student",), spec.roles, cache).map(plan)
        update = step.make_update(spec, tx, layout)
        states = {}

        def ours(name: str, batch):
            if name not in states:
                states[name] = step.init(jax.random.key(0), model, cfg, tx, mesh)
            states[name], out = update(params, states[name], mesh_lib.to_devices(batch, mesh, BATCH))
            return float(out["loss"])

        losses = ours("uncached", uncached), ours("cached", cached), peer.loss_value()
        print(f"losses: ours {losses[0]:.6f}, cached {losses[1]:.6f}, torch {losses[2]:.6f}")
        if max(losses) - min(losses) > 1e-4 * max(abs(x) for x in losses):
            sys.exit("error: the losses differ, so there is nothing to compare")
        torch.set_num_threads(2)
        work = float(BATCH)
        rows = [
            row(
                "train step / torch + peft",
                *in_turn(args.runs, lambda: ours("uncached", uncached), peer.update),
                "rows/s",
                work,
            ),
            row(
                "the same, references cached / torch + peft",
                *in_turn(args.runs, lambda: ours("cached", cached), peer.update),
                "rows/s",
                work,
            ),
            row(
                "cached / uncached",
                *in_turn(args.runs, lambda: ours("cached", cached), lambda: ours("uncached", uncached)),
                "rows/s",
                work,
            ),
            loss_memory(spec, params),
        ]
    show("train step, 41.6M-parameter Qwen3 shape, LoRA r 32, float32", rows, args.json)


def loss_memory(spec, params) -> dict:
    """Temporary memory of the loss and its gradient, compiled for 4 responses of 1,024: in chunks, and with all logits at once."""
    import jax
    import jax.numpy as jnp

    from dail_jax.model import transformer
    from dail_jax.train import objectives

    table = transformer.unembedding(params)
    states = jax.ShapeDtypeStruct((BATCH, 1024, table.shape[1]), jnp.float32)
    mask = jax.ShapeDtypeStruct((BATCH, 1024), jnp.bool_)

    def chunked(student, privileged, negative, mask, table):
        frozen, weights = {"privileged": privileged, "negative": negative}, mask.astype(jnp.float32)
        return objectives.summed(spec.loss, spec.chunk, student, frozen, {}, weights, table)[0]

    def naive(student, privileged, negative, mask, table):
        m, p, n = (jax.nn.log_softmax(x @ table.T) for x in (student, privileged, negative))
        loss = (jnp.exp(m) * (m - p)).sum(-1) - GAMMA * (jnp.exp(m) * (m - n)).sum(-1)
        return (loss * mask).sum()

    def megabytes(loss):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(states, states, states, mask, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    ours, peer = megabytes(chunked), megabytes(naive)
    return dict(
        name="loss temporaries, 4 x 1,024 tokens",
        ours=ours,
        peer=peer,
        unit="MB",
        ratio=peer / ours,
        low=peer / ours,
        high=peer / ours,
    )


class Peer:
    """torch + peft: one pass with the adapter, two without, kl_div, AdamW."""

    def __init__(self, model, examples, cfg):
        import peft
        import torch

        config = peft.LoraConfig(
            r=cfg.lora.rank,
            lora_alpha=int(cfg.lora.alpha),
            lora_dropout=0.0,
            bias="none",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(model, config)
        where = next(model.parameters()).device
        self.starts = {role: len(prompt) for role, prompt in examples[0].prompts.items()}  # all are as long
        self.ids = {
            role: torch.tensor([[*e.prompts[role], *e.response] for e in examples], device=where)
            for role in self.starts
        }
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=cfg.optimizer.learning_rate, weight_decay=0.01)

    def loss(self):
        import torch
        from torch.nn.functional import kl_div, log_softmax

        def logs(role):
            logits = self.model(self.ids[role]).logits
            return log_softmax(logits[:, self.starts[role] - 1 : -1].float(), -1)

        with torch.no_grad(), self.model.disable_adapter():
            privileged, negative = logs("privileged"), logs("negative")
        student = logs("student")
        terms = (kl_div(p, student, log_target=True, reduction="none").sum(-1).mean() for p in (privileged, negative))
        first, second = terms
        return first - GAMMA * second

    def loss_value(self) -> float:
        return float(self.loss().detach())

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


if __name__ == "__main__":
    main()
