"""What an accelerator does with the real programs, in one command of a few minutes: is it right, and how fast is it?

    python benchmarks/accelerator.py                 # any device; writes a .json and a .md of its name into docs/measured/
    python benchmarks/accelerator.py --model 8b      # with the shape of Qwen3-8B and random weights, where that fits

Parts, each of which can be left out by naming the others in `--parts`:

parity   a small model in float32 on the device and on this machine's CPU: logits, sampled tokens, loss and gradient
kernels  the device's attention in bfloat16 beside the einsum in float32: padding, grouped heads and their sizes, windows, odd
         and long rows; values and gradients, and how long both take
pages    the same of keys and values in pages: one token of many rows, whose texts have all lengths; what it reads a second
limits   what the device reaches: bytes a second of a copy, FLOPs a second of a large product
decode   plain and mixed sampling: tokens a second, and the share of the copy's bandwidth that weights and caches account
         for; beside `transformers.generate` where torch sees the device; and plain sampling from pages
train    the update with and without cached references: share of the product's FLOPs that is useful; beside torch + peft
memory   the peak that the device reports beside what the compiler foresaw
profile  a trace of one decode call and one update, to be opened with TensorBoard or Perfetto

A part that fails is reported as a row, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "")  # whatever there is; `common` would choose the CPU
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of a GPU's memory

import common  # noqa: F401  (the environment)
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.ahead import programs
from dail_jax.data import batches
from dail_jax.model import attention, families, pages, transformer, weights
from dail_jax.model.families import ModelConfig
from dail_jax.provenance import environment
from dail_jax.sample import decode, engine, mixture
from dail_jax.sample.sampler import Request
from dail_jax.train import optimizer, step

PARTS = ("parity", "kernels", "pages", "limits", "decode", "train", "memory", "profile")
SHAPES = {  # of Qwen3: width, layers, heads, kv heads, feed-forward width, vocabulary
    "tiny": (64, 2, 4, 2, 96, 512),
    "0.6b": (1024, 28, 16, 8, 3072, 151936),
    "8b": (4096, 36, 32, 8, 12288, 151936),
}
Row = dict[str, Any]  # part, name, value, unit; and `beside`, what it is compared with


def model_of(name: str) -> ModelConfig:
    d, layers, heads, kv, f, v = SHAPES[name]
    tree = dict(model_type="qwen3", hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, head_dim=128)
    tree |= dict(num_key_value_heads=kv, intermediate_size=f, vocab_size=v, rope_theta=1e6, rms_norm_eps=1e-6)
    return families.from_tree(tree | dict(tie_word_embeddings=name != "8b"), "config.json")


class Bench:
    """The device, the model with random weights on it, and what the options say."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.mesh = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices()[:1])
        self.cpu = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices("cpu")[:1])
        self.small = model_of("tiny")
        self.model = model_of(options.model)
        self.dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.found: dict[str, float] = {}  # limits, by name
        self._params: weights.Params | None = None

    @property
    def params(self) -> weights.Params:
        if self._params is None:
            self._params = self.random(self.model, self.dtype, self.mesh)
        return self._params

    def random(self, model: ModelConfig, dtype, mesh: jax.sharding.Mesh) -> weights.Params:
        layout = weights.shardings(model, mesh)
        return jax.jit(lambda: weights.init(jax.random.key(0), model, dtype), out_shardings=layout)()

    def seconds(self, call: Callable[[], object]) -> float:
        """The median time of a call, after one that warms up."""
        times = []
        for _ in range(self.options.runs + 1):
            started = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def sampler(self, roles: int, slots: int, max_tokens: int, share: float | None = None) -> engine.Engine:
        """With keys and values in pages where there is a share of them."""
        sampling = mixture.sampling_params(config_lib.Sampling(temperature=0.6, top_p=0.95), 0.3)
        return engine.Engine(self.params, self.model, self.mesh, (), 0, slots, max_tokens, sampling, roles, pages=share)

    def requests(self, count: int, roles: int, prompt: int, limit: int, samples: int = 1) -> list[Request]:
        rng = np.random.default_rng(0)
        draw = lambda: tuple(rng.integers(1, self.model.V, prompt).tolist())  # noqa: E731
        return [
            Request(f"p{i}", tuple(draw() for _ in range(roles)), tuple(range(samples)), limit) for i in range(count)
        ]


# ---------------------------------------------------------------------------------------------------
# Is it right?
# ---------------------------------------------------------------------------------------------------


def parity(bench: Bench) -> Iterator[Row]:
    """The same float32 numbers on both devices; tokens are equal unless a draw falls between two roundings."""
    model, rng = bench.small, np.random.default_rng(0)
    tokens = rng.integers(1, model.V, (3, 37)).astype(np.int32)
    positions = np.stack([np.maximum(np.arange(37) - skip, -1) for skip in (0, 9, 20)]).astype(np.int32)
    ask = [
        Request(f"p{i}", tuple(map(tuple, rng.integers(1, model.V, (2, 20 + i)).tolist())), (0, 1), 24)
        for i in range(4)
    ]
    sampling = mixture.sampling_params(config_lib.Sampling(), 0.3)
    whole = jax.device_get(bench.random(model, jnp.float32, bench.cpu))

    def on(mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            params = jax.device_put(whole, weights.shardings(model, mesh))
            forward = jax.jit(lambda p: transformer.unembed(p, transformer.encode(p, tokens, positions, model)))
            logits = np.where((positions >= 0)[..., None], forward(params), 0)
            sampler = engine.Engine(params, model, mesh, (), 0, 8, 24, sampling, 2)
            drawn = sorted((s for s in sampler.run(ask) if s is not None), key=lambda s: (s.name, s.sample))
            cfg = config_lib.Train(batch_size=4, bucket=32, remat="none", lora=config_lib.LoraConfig(rank=4))
            update, state, batch = training(model, params, mesh, cfg, prompt=24, response=16)
            out = {}
            for _ in range(3):
                state, out = update(params, state, batch)
            return {
                "logits": logits,
                "tokens": np.stack([s.tokens for s in drawn]),
                "log-probabilities": np.stack([s.logq for s in drawn]),
                "loss": np.asarray(out["loss"]),
                "gradient norm": np.asarray(out["grad_norm"]),
            }

    here, there = on(bench.cpu), on(bench.mesh)
    same = here["tokens"] == there["tokens"]
    yield dict(name="sampled tokens equal to the CPU's", value=float(same.mean()), unit="share", beside=1.0)
    agree = np.cumprod(same, axis=1).astype(bool)  # up to the first token that differs
    for name in ("logits", "log-probabilities", "loss", "gradient norm"):
        a, b = (x[name][agree] if name == "log-probabilities" else x[name] for x in (here, there))
        yield dict(
            name=f"{name}: largest difference / scale", value=float(np.abs(a - b).max() / np.abs(a).max()), unit=""
        )


def kernels(bench: Bench) -> Iterator[Row]:
    """`attention.attend` as the device runs it, beside the einsum in float32 from the same bfloat16 inputs."""
    longest = 96 if bench.options.model == "tiny" else 4096
    cases = {  # rows, tokens, heads, kv heads, their size, window, padding on the left of every other row
        "even": (2, longest, 8, 8, 128, None, 0),
        "grouped heads, padded on either side": (3, longest // 2, 16, 4, 128, None, 17),
        "odd length": (3, longest // 4 + 1, 8, 2, 128, None, 0),
        "window": (2, longest // 2, 8, 2, 128, longest // 8, 5),
        "heads of 80": (2, longest // 4, 4, 2, 80, None, 3),
        "heads of 256": (2, longest // 2, 4, 2, 256, longest // 8, 3),
    }
    half = jnp.bfloat16
    for name, (b, t, n, k, h, window, left) in cases.items():
        keys = jax.random.split(jax.random.key(1), 4)
        q, g = (jax.random.normal(key, (b, t, n, h), half) for key in (keys[0], keys[3]))
        keys_, values = (jax.random.normal(key, (b, t, k, h), half) for key in keys[1:3])
        row, at = jnp.arange(b)[:, None], jnp.arange(t)
        start = jnp.where(row % 2 == 0, left, 0)
        positions = jnp.where((at >= start) & (at < t - 7 * row), at - start, -1)
        real = (positions >= 0)[..., None, None]

        def run(attend, q, k, v, g=g, positions=positions, real=real, window=window):
            out, back = jax.vjp(lambda q, k, v: jnp.where(real, attend(q, k, v, positions, window), 0), q, k, v)
            return (out, *back(g.astype(out.dtype)))

        def einsum(q, k, v, positions, window):
            mask = attention.causal_mask(positions, positions, window)
            return attention.attend_cached(q, [(k.swapaxes(1, 2), v.swapaxes(1, 2), mask, 1)])

        with jax.set_mesh(bench.mesh):
            device = jax.jit(lambda *x, run=run: run(attention.attend, *x))
            plain = jax.jit(lambda *x, run=run: run(einsum, *x))
            got = device(q, keys_, values)
            with jax.default_matmul_precision("highest"):
                want = plain(*(x.astype(jnp.float32) for x in (q, keys_, values)))
            for what, a, b_ in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
                a, b_ = np.asarray(a, np.float32), np.asarray(b_)
                yield dict(
                    name=f"{name}: {what}, difference / scale",
                    value=float(np.abs(a - b_).max() / np.abs(b_).max()),
                    unit="",
                )
            fast = bench.seconds(lambda device=device, x=(q, keys_, values): device(*x))
            slow = bench.seconds(lambda plain=plain, x=(q, keys_, values): plain(*x))
            yield dict(name=f"{name}: forward and backward", value=fast * 1e3, unit="ms", beside=slow * 1e3)


def paged(bench: Bench) -> Iterator[Row]:
    """`pages.attend` as the device runs it, beside the einsum in float32 over the same texts."""
    cfg = dataclasses.replace(bench.model, layers=bench.model.layers[:1])
    if why := pages.refusal(cfg, jax.devices()[0], 1):
        raise ValueError(why)
    rows, width, times = (3, 4, 2) if bench.options.model == "tiny" else (64, 64, 100)
    tokens, half, rng = width * pages.PAGE, bench.dtype, np.random.default_rng(0)
    at = jnp.asarray(rng.integers(0, tokens, rows), jnp.int32)
    first = 1 + jnp.arange(rows) * width
    table = first[:, None] + jnp.arange(width)
    keys = jax.random.split(jax.random.key(2), 5)
    k, v = (jax.random.normal(key, (rows, cfg.K, tokens, cfg.H), half) for key in keys[:2])
    q, new_k, new_v = (
        jax.random.normal(key, (rows, 1, n, cfg.H), half)
        for key, n in zip(keys[2:], (cfg.N, cfg.K, cfg.K), strict=True)
    )

    @jax.jit
    def run(q, new_k, new_v, pool):
        """Token after token at the same place, so that calls do not count."""

        def body(_, carry):
            out, pool = carry
            return pages.attend(q + 0 * out, new_k, new_v, pool, table, at[:, None])

        return jax.lax.fori_loop(0, times, body, (q, pool))

    @jax.jit
    def einsum(q, new_k, new_v, k, v):
        k, v = (x.at[jnp.arange(rows), :, at].set(new[:, 0]) for x, new in ((k, new_k), (v, new_v)))
        return attention.attend_cached(q, [(k, v, jnp.arange(tokens) <= at[:, None, None], 1)])

    with jax.set_mesh(bench.mesh):
        empty = pages.empty(cfg, 1 + rows * width, pages.PAGE, half)
        (pool,) = jax.jit(pages.loaded)(empty, [k], [v], first, jnp.zeros((), jnp.int32))
        got = np.asarray(run(q, new_k, new_v, pool)[0], np.float32)
        with jax.default_matmul_precision("highest"):
            want = np.asarray(einsum(*(x.astype(jnp.float32) for x in (q, new_k, new_v, k, v))))
        yield dict(
            name="output, difference / scale", value=float(np.abs(got - want).max() / np.abs(want).max()), unit=""
        )
        took = bench.seconds(lambda: run(q, new_k, new_v, pool)) / times
        slow = bench.seconds(lambda: einsum(q, new_k, new_v, k, v))
    name = f"a token of {rows} rows, {int(jnp.mean(at))} tokens each"
    yield dict(name=f"{name}; beside the einsum over all {tokens}", value=took * 1e3, unit="ms", beside=slow * 1e3)
    read = 2 * float(jnp.sum(at + 1)) * cfg.K * cfg.H * k.dtype.itemsize
    yield dict(name=f"{name}: read", value=read / took / 1e9, unit="GB/s")


# ---------------------------------------------------------------------------------------------------
# How fast is it?
# ---------------------------------------------------------------------------------------------------


def limits(bench: Bench) -> Iterator[Row]:
    tiny = bench.options.model == "tiny"
    x = jnp.ones(2**20 if tiny else 2**30, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    bench.found["bandwidth"] = 2 * x.nbytes / bench.seconds(lambda: copy(x))
    yield dict(name="copy", value=bench.found["bandwidth"] / 1e9, unit="GB/s")
    size = 256 if tiny else 8192
    a = jnp.ones((size, size), bench.dtype)
    product = jax.jit(lambda a: a @ a)
    bench.found["flops"] = 2 * size**3 / bench.seconds(lambda: product(a))
    yield dict(name=f"product of two {size} x {size}, {a.dtype}", value=bench.found["flops"] / 1e12, unit="TFLOP/s")


def sampling(bench: Bench) -> Iterator[Row]:
    """Whole runs of the engine, prefills included, and what the decode program itself reads per second."""
    tiny = bench.options.model == "tiny"
    prompt, limit = (20, 16) if tiny else (512, 256)
    with jax.set_mesh(bench.mesh):
        for roles in (1, 2):
            for slots in (4,) if tiny else (32, 128):
                sampler = bench.sampler(roles, slots, limit)
                ask = bench.requests(slots // 4, roles, prompt, limit, samples=4)
                took = bench.seconds(lambda s=sampler, ask=ask: list(s.run(ask)))
                kind = "plain" if roles == 1 else "mixed"
                peer = generate(bench, slots, prompt, limit) if roles == 1 and not tiny else None
                yield dict(name=f"{kind}, {slots} slots: tokens", value=slots * limit / took, unit="1/s", beside=peer)
                if roles == 1 and not pages.refusal(bench.model, jax.devices()[0], 1):
                    paged = bench.sampler(roles, slots, limit, 1.0)
                    fast = bench.seconds(lambda s=paged, ask=ask: list(s.run(ask)))
                    yield dict(name=f"{kind}, {slots} slots, pages: tokens", value=slots * limit / fast, unit="1/s")
                step_seconds, held = one_call(bench, sampler, sampler.grid(4, engine.bucket(prompt)))
                yield dict(name=f"{kind}, {slots} slots: a step", value=step_seconds * 1e3, unit="ms")
                if "bandwidth" in bench.found:
                    share = held / step_seconds / bench.found["bandwidth"]
                    yield dict(name=f"{kind}, {slots} slots: weights and caches / copy", value=share, unit="share")


def one_call(bench: Bench, sampler: engine.Engine, grid: decode.Grid) -> tuple[float, float]:
    """Seconds a step of the decode program with every slot live, and the bytes of weights and caches as allocated."""
    model, n = bench.model, grid.slots
    state = decode.empty(grid, model, bench.dtype)
    state = decode.admit(
        grid,
        state,
        sampler.key,
        np.ones(n, bool),
        np.zeros(n, np.int32),
        np.zeros((n, 3), np.uint32),
        np.full(n, grid.max_tokens, np.int32),
    )
    times = []
    for _ in range(max(2, min(bench.options.runs + 1, grid.max_tokens // grid.chunk))):
        started = time.perf_counter()
        state = jax.block_until_ready(
            decode.decode(grid, model, sampler.params, sampler.lora, state, sampler.rules, sampler.sampling)
        )
        times.append(time.perf_counter() - started)
    held = sum(x.nbytes for x in jax.tree.leaves((sampler.params, state.cache)))
    return statistics.median(times[1:]) / grid.chunk, held


def generate(bench: Bench, rows: int, prompt: int, limit: int) -> float | None:
    """Tokens a second of `transformers.generate`, where torch sees the device."""
    if (theirs := torch_model(bench)) is None:
        return None
    import torch

    ids = torch.randint(1, bench.model.V, (rows, prompt), device="cuda")
    keys = dict(do_sample=True, temperature=0.6, top_p=0.95, top_k=0, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        times = []
        for _ in range(2):
            started = time.perf_counter()
            theirs.generate(ids, max_new_tokens=limit, min_new_tokens=limit, **keys)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return rows * limit / times[1]


def torch_model(bench: Bench) -> Any:
    """A model of the same shape on the GPU, with random weights; None where torch sees none."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    d, layers, heads, kv, f, v = SHAPES[bench.options.model]
    config = transformers.Qwen3Config(  # pyright: ignore[reportCallIssue]
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=f,
        vocab_size=v, head_dim=128, tie_word_embeddings=bench.options.model != "8b",
    )  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return transformers.Qwen3ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def training(model: ModelConfig, params, mesh, cfg: config_lib.Train, prompt: int, response: int, cached: bool = False):
    """(update, state, a batch of `cfg.batch_size` random rows), for `prompt` tokens in each role's context."""
    spec, tx = step.spec_of(model, cfg), optimizer.adamw(cfg.optimizer, 1000)
    rng = np.random.default_rng(0)
    roles = ("student", *spec.roles)
    draw = lambda n: tuple(rng.integers(1, model.V, n).tolist())  # noqa: E731
    examples = [
        batches.Example(f"e{i}", {r: draw(prompt) for r in roles}, draw(response)) for i in range(cfg.batch_size)
    ]
    frozen = rng.normal(size=(response, model.D)).astype(jnp.dtype(params["norm"].dtype))
    more = (("student",), spec.roles, lambda role, index: frozen) if cached else (roles,)
    local = mesh_lib.local_rows(mesh, cfg.batch_size)
    batch = batches.Assemble(examples, cfg.bucket, 1, local, *more).map(np.arange(cfg.batch_size))
    update = step.make_update(spec, tx, step.shardings(model, cfg, tx, mesh))
    return update, step.init(jax.random.key(0), model, cfg, tx, mesh), mesh_lib.to_devices(batch, mesh, cfg.batch_size)


def updates(bench: Bench) -> Iterator[Row]:
    """Milliseconds an update; beside it those of torch + peft with the same work, where torch sees the device."""
    tiny = bench.options.model == "tiny"
    prompt, response = (24, 16) if tiny else (512, 512)
    cfg = config_lib.Train(batch_size=2 if tiny else 8, bucket=8, remat="full", max_tokens=prompt + response)
    with jax.set_mesh(bench.mesh):
        for cached in (False, True):
            update, state, batch = training(bench.model, bench.params, bench.mesh, cfg, prompt, response, cached)

            def once(update=update, batch=batch):
                nonlocal state
                state, out = update(bench.params, state, batch)
                return out["loss"]

            took = bench.seconds(once)
            name = f"update, {cfg.batch_size} rows of {prompt} + {response}, {'cached' if cached else 'uncached'}"
            yield dict(
                name=name,
                value=took * 1e3,
                unit="ms",
                beside=None if tiny or cached else torch_update(bench, cfg, prompt, response),
            )
            useful = cfg.batch_size * programs.useful_flops(bench.model, cfg, prompt, response, cached)[1]
            if "flops" in bench.found:
                yield dict(name=f"{name}: useful / product", value=useful / took / bench.found["flops"], unit="share")


def torch_update(bench: Bench, cfg: config_lib.Train, prompt: int, response: int) -> float | None:
    """Milliseconds of the same update by torch + peft, with the logits of all tokens at once."""
    if (theirs := torch_model(bench)) is None:
        return None
    import torch
    from train import Peer

    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(1, bench.model.V, n).tolist())  # noqa: E731
    roles = ("student", "privileged", "negative")
    examples = [
        batches.Example(f"e{i}", {r: draw(prompt) for r in roles}, draw(response)) for i in range(cfg.batch_size)
    ]
    theirs.gradient_checkpointing_enable()
    theirs.enable_input_require_grads()
    peer, times = Peer(theirs.train(), examples, cfg), []
    for _ in range(3):
        started = time.perf_counter()
        peer.update()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:]) * 1e3


def memory(bench: Bench) -> Iterator[Row]:
    """The peak since the start; the largest program's own, as the compiler foresaw it, stands beside it."""
    prompt, response = (24, 16) if bench.options.model == "tiny" else (512, 512)
    cfg = config_lib.Train(batch_size=2 if bench.options.model == "tiny" else 8, bucket=8, max_tokens=prompt + response)
    with jax.set_mesh(bench.mesh):
        update, state, batch = training(bench.model, bench.params, bench.mesh, cfg, prompt, response)
        analysis: Any = update.lower(bench.params, state, batch).compile().memory_analysis()
        foreseen = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        yield dict(name="update, uncached: foreseen", value=foreseen / 1e9, unit="GB")
        jax.block_until_ready(update(bench.params, state, batch))
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        yield dict(
            name="peak since the start", value=stats["peak_bytes_in_use"] / 1e9, unit="GB", beside=foreseen / 1e9
        )


def profile(bench: Bench) -> Iterator[Row]:
    folder = bench.options.out / f"{device_name()}.profile"
    tiny = bench.options.model == "tiny"
    cfg = config_lib.Train(batch_size=2, bucket=8, max_tokens=64 if tiny else 1024)
    with jax.set_mesh(bench.mesh):
        sampler = bench.sampler(2, 4 if tiny else 32, 16)
        ask = bench.requests(1, 2, 20, 8, samples=4)
        update, state, batch = training(bench.model, bench.params, bench.mesh, cfg, 24, 16)
        for traced in (False, True):  # first compiled, then traced
            if traced:
                jax.profiler.start_trace(str(folder))
            list(sampler.run(ask))
            state, out = update(bench.params, state, batch)
            jax.block_until_ready(out)
        jax.profiler.stop_trace()
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    yield dict(name=f"trace in {folder}", value=size / 1e6, unit="MB")


# ---------------------------------------------------------------------------------------------------


RUN = dict(zip(PARTS, (parity, kernels, paged, limits, sampling, updates, memory, profile), strict=True))


def device_name() -> str:
    return re.sub(r"[^a-z0-9]+", "_", jax.devices()[0].device_kind.lower()).strip("_")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="0.6b")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "measured")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    bench, rows, failed = Bench(options), [], False
    report = {"model": options.model, "command": " ".join(sys.argv), **environment()}
    for part in options.parts.split(","):
        started = time.monotonic()
        try:
            for row in RUN[part](bench):
                rows.append({"part": part, **row})
                print(f"{part}: {row['name']} {row['value']:.4g} {row['unit']}", flush=True)
        except Exception as error:  # the other parts may still tell something
            traceback.print_exc()
            failed = True
            rows.append(
                {"part": part, "name": f"FAILED: {type(error).__name__}: {str(error)[:300]}", "value": 0, "unit": ""}
            )
        print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
        (options.out / f"{device_name()}.json").write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
    (options.out / f"{device_name()}.md").write_text(markdown(report, rows))
    table = Table(title=f"{report['device_kind']}, {options.model}")
    for column in ("part", "name", "value", "beside", "unit"):
        table.add_column(column, justify="right" if column in ("value", "beside") else "left")
    for row in rows:
        table.add_row(*(shown(row.get(c)) for c in ("part", "name", "value", "beside", "unit")))
    Console(width=140).print(table)
    return int(failed)


def shown(x: Any) -> str:
    return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


def markdown(report: dict[str, Any], rows: list[Row]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if k in ("jax", "jaxlib", "torch"))
    head = f"# {report['device_kind']}\n\n`{report['command']}`: {versions}, revision {report['source']}.\n\n"
    lines = ["| part | what | figure | beside | unit |", "|---|---|---:|---:|---|"]
    lines += [f"| {' | '.join(shown(r.get(c)) for c in ('part', 'name', 'value', 'beside', 'unit'))} |" for r in rows]
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
