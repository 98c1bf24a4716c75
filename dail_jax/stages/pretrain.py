"""pretrain: trains all weights of a small model, from scratch or further, on rows with `prompt` and `response` texts.

The embedded micro-world model was made from scratch. The model is written to `model.path` as a Hugging Face folder. The loss
is over responses only; batches hold a fixed number of tokens, and examples are grouped by length.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import storage, strict_json
from dail_jax.checkpoint import base, hf
from dail_jax.checkpoint.store import Store
from dail_jax.errors import Interrupted, UserError
from dail_jax.metrics import Metrics, log, progress
from dail_jax.model import families, transformer, weights
from dail_jax.rundir import Interrupt, RunDir
from dail_jax.stages import recipes
from dail_jax.text import load_tokenizer
from dail_jax.train import objectives, optimizer


def run(config: config_lib.Config) -> None:
    cfg = config.pretrain
    if cfg is None:
        raise UserError("missing: `pretrain` wants rows and an architecture", field="pretrain")
    if config.model.quantize is not None:
        raise UserError(f"got {config.model.quantize}, want null: all weights are trained", field="model.quantize")
    if config.model.tokenizer is None:
        raise UserError("missing: pretraining wants a tokenizer folder", field="model.tokenizer")
    model = families.from_tree(cfg.architecture, "pretrain.architecture")
    if model.experts:
        raise UserError(
            "a mixture of experts is not supported: nothing here balances its experts", field="pretrain.architecture"
        )
    if cfg.init is not None and families.read_config(storage.model(cfg.init)) != model:
        raise UserError("got another architecture, want pretrain.architecture", file=cfg.init, field="pretrain.init")
    mesh = mesh_lib.make_mesh(config.mesh.for_training)
    if storage.is_remote(config.model.path):
        raise UserError(f"got {config.model.path!r}, which is written: {storage.LOCAL}", field="model.path")
    target = Path(config.model.path)
    with RunDir(config) as run_dir, run_dir.stage(recipes.pretrain(config)) as stage, jax.set_mesh(mesh):
        if stage.done or mesh_lib.from_first(lambda: base.is_made_of(target, stage.made_of)):
            log(f"pretrain: already done, see {target}")
            return
        examples = read(cfg, config.model.tokenizer, model)
        metrics = Metrics(run_dir.path, config.log, "pretrain")
        params = initial(cfg, model, config.seed, mesh)
        log(f"pretrain: {weights.count(model):,} weights, {len(examples):,} rows, {cfg.steps} steps")
        kept = Store(run_dir.path / recipes.PRETRAIN, 1, stage.identity)
        params = train(params, model, cfg, examples, config.seed, metrics, kept)
        kept.close()
        cast = jax.tree.map(lambda w: w.astype(config.model.dtype), params)
        tree = {**cfg.architecture, "dtype": config.model.dtype}
        hf.save(target, cast, model, tree, storage.model(config.model.tokenizer), stage.made_of)
        metrics.close()
        log(f"pretrain: wrote {target}")


def initial(cfg: config_lib.Pretrain, model: families.ModelConfig, seed: int, mesh: jax.sharding.Mesh):
    """The weights that training starts from, in float32: random ones, or those of `init`."""
    if cfg.init is None:
        init = jax.jit(weights.init, static_argnums=1, out_shardings=weights.shardings(model, mesh))
        return init(jax.random.key(seed), model)
    return base.load(storage.model(cfg.init), mesh, "float32")[0]


def read(cfg: config_lib.Pretrain, tokenizer_path: str, model: families.ModelConfig) -> list[tuple[np.ndarray, int]]:
    """(token ids of prompt + response + end, prompt length) of every row that fits; raises UserError by row."""
    tokenizer = load_tokenizer(storage.model(tokenizer_path))
    numbers, texts = [], []
    for line in strict_json.read_lines(storage.file(cfg.rows)):
        row = strict_json.as_object(line.value, cfg.rows, line.number)
        for field in ("prompt", "response"):
            if not isinstance(row.get(field), str):
                raise UserError(
                    f"got {strict_json.kind_of(row.get(field))}, want text", file=cfg.rows, row=line.number, field=field
                )
        numbers.append(line.number)
        texts += [row["prompt"], row["response"]]
    encoded = tokenizer.encode_all(texts)
    examples = []
    for number, prompt, response in zip(numbers, encoded[::2], encoded[1::2], strict=True):
        ids = np.array([*prompt, *response, tokenizer.eos_id], np.int32)
        if ids.max() >= model.V:
            raise UserError(f"got token id {ids.max()}, want below vocab_size {model.V}", file=cfg.rows, row=number)
        if len(ids) <= cfg.max_tokens:
            examples.append((ids, len(prompt)))
    if not examples:
        raise UserError(f"no row of at most {cfg.max_tokens} tokens", file=cfg.rows)
    return examples


def plan(cfg: config_lib.Pretrain, examples: list[tuple[np.ndarray, int]], seed: int):
    """Yields (rows, width, indices of examples) without end, with rows * width ~ tokens_per_step, epoch after epoch."""
    rng = np.random.default_rng(seed)
    buckets: dict[int, list[int]] = {}
    for index, (ids, _) in enumerate(examples):
        buckets.setdefault(-(-len(ids) // cfg.bucket) * cfg.bucket, []).append(index)
    while True:
        epoch = []
        for size, members in sorted(buckets.items()):
            rows = max(cfg.tokens_per_step // size, 1)
            order = rng.permutation(members)
            epoch += [(size, rows, order[i : i + rows]) for i in range(0, len(order), rows)]
        for i in rng.permutation(len(epoch)):
            size, rows, chosen = epoch[i]
            yield rows, size, chosen


def padded(examples: list[tuple[np.ndarray, int]], rows: int, size: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays {tokens, positions, targets, mask}, each [rows, size] int32."""
    out = {k: np.zeros((rows, size), np.int32) for k in ("tokens", "targets", "mask")}
    out["positions"] = np.full((rows, size), -1, np.int32)
    for r, index in enumerate(chosen):
        ids, prompt = examples[index]
        n = len(ids) - 1
        out["tokens"][r, :n], out["targets"][r, :n] = ids[:-1], ids[1:]
        out["positions"][r, :n] = np.arange(n)
        out["mask"][r, prompt - 1 : n] = 1
    return out


def train(params, model, cfg: config_lib.Pretrain, examples, seed: int, metrics: Metrics, kept: Store):
    """Trains from the newest checkpoint to the last step and returns the weights.

    Checkpoints also hold the loss since the last row of metrics.jsonl, so that a resumed run logs the same figures.
    """
    tx = optimizer.for_all_weights(cfg.optimizer, cfg.steps, model)
    state, total, start = jax.jit(tx.init)(params), jnp.zeros(()), 0
    saved = {"params": params, "optimizer": state, "total": total}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
    if (restored := kept.restore(abstract)) is not None:
        start, saved, _ = restored
        params, state, total = saved["params"], saved["optimizer"], saved["total"]
        log(f"pretrain: resuming at step {start}")
    metrics.rewind(start)
    step = functools.partial(_update, model, tx)
    feed = itertools.islice(plan(cfg, examples, seed), start, cfg.steps)
    with progress("pretraining", cfg.steps, "steps", start) as bar, Interrupt() as interrupt:
        for i, rows in enumerate(feed, start + 1):
            params, state, loss = step(params, state, padded(examples, *rows))
            total = total + loss
            bar.advance(note=f"loss {float(loss):.3f}" if i % cfg.log_every == 0 else "")
            if i % cfg.log_every == 0:
                mean = float(total) / cfg.log_every
                total = jnp.zeros(())
                if not np.isfinite(mean):
                    raise UserError(f"loss is {mean} at step {i}: lower the learning rate", field="pretrain.optimizer")
                metrics.write(i, loss=mean)
            stop = interrupt.wanted
            if stop or i == cfg.steps or i % cfg.save_every == 0:
                kept.save(i, {"params": params, "optimizer": state, "total": total}, {})
            if stop and i < cfg.steps:
                raise Interrupted(f"pretrain: stopped and saved at step {i} of {cfg.steps}; call again to resume")
    return params


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _update(model, tx, params, state, batch):
    def loss(params):
        hidden = transformer.encode(params, batch["tokens"], batch["positions"], model)
        total = objectives.cross_entropy(hidden, batch["targets"], batch["mask"] > 0, transformer.unembedding(params))
        return total / jnp.maximum(batch["mask"].sum(), 1)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value
