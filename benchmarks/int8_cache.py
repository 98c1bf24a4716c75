"""What int8 keys and values (`kv_dtype`) change: log-probabilities of given texts, beside exact ones and beside bfloat16.

    python benchmarks/int8_cache.py --model FOLDER                     # any folder of a supported family
    python benchmarks/int8_cache.py --model FOLDER --texts FILE FILE   # texts of your own; by default documents of this repository

The sampler's own programs read texts, a token a step after a prompt, which is prefilled. Each line is a way to compute, and
is compared with float32 and exact keys: the log-probability of the text's next token, and which token is likeliest. `plain`
are int8 keys without what `model/kv_int8.py` does about channels that are far larger than others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import common  # noqa: F401  (the environment)
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import hf
from dail_jax.model import kv_int8, transformer
from dail_jax.model.families import ModelConfig
from dail_jax.model.weights import Params, unstack
from dail_jax.sample import decode, engine
from dail_jax.text import load_tokenizer

DOCS = [
    Path(__file__).parents[1] / "docs" / name for name in ("method.md", "data.md", "architecture.md", "clusters.md")
]
WAYS = (("float32", None), ("float32", "int8"), ("float32", "plain"), ("bfloat16", None), ("bfloat16", "int8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--texts", type=Path, nargs="+", default=DOCS, help="text files")
    parser.add_argument("--rows", type=int, default=8, help="texts that are read, in turn from all files")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each that are prefilled")
    parser.add_argument("--tokens", type=int, default=384, help="tokens of each that are read one by one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh, texts = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices()[:1]), texts_of(args)
    shown = Table(title=f"{args.model}, {args.rows} texts of {args.prompt} + {args.tokens} tokens")
    for column in ("type, keys", "mean", "difference: mean", "99%", "largest", "another is likeliest"):
        shown.add_column(column, justify="left" if column == "type, keys" else "right")
    rows, exact = [], None
    with jax.set_mesh(mesh):
        for dtype, keys in WAYS:
            params, cfg = hf.load(args.model, mesh, dtype)
            jax.clear_caches()  # of what was traced with other functions
            with contextlib.ExitStack() as patches:
                for name, function in PLAIN.items() if keys == "plain" else ():
                    patches.enter_context(mock.patch.object(kv_int8, name, function))
                found = read(unstack(params, cfg), cfg, texts, args.prompt, keys and "int8")
            exact = found if exact is None else exact
            gap = np.abs(found[0] - exact[0])
            figures = (found[0].mean(), gap.mean(), np.quantile(gap, 0.99), gap.max(), np.mean(found[1] != exact[1]))
            rows.append({"dtype": dtype, "keys": keys or dtype, **dict(zip(NAMES, map(float, figures), strict=True))})
            cells = (f"{figures[0]:.4f}", *(f"{x:.4f}" for x in figures[1:4]), f"{figures[4]:.2%}")
            shown.add_row(f"{dtype}, {keys or 'exact'}", *cells)
            print(rows[-1], flush=True)
    Console(width=120).print(shown)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


NAMES = ("mean", "difference", "difference_99", "difference_max", "argmax_changes")
PLAIN: dict[str, Callable] = {
    "turned": lambda x: x.astype(jnp.float32),
    "_size": lambda h: 1,
    "centre_of": lambda bias, rope: jnp.zeros(bias.shape),
}


def texts_of(args) -> np.ndarray:
    """Token ids [rows, prompt + tokens], from the files in turn."""
    tokenizer, length = load_tokenizer(args.model), args.prompt + args.tokens
    parts = [tokenizer.encode(path.read_text(encoding="utf-8")) for path in args.texts]
    whole = [[ids[i : i + length] for i in range(0, len(ids) - length + 1, length)] for ids in parts]
    found = [texts[i] for i in range(max(map(len, whole))) for texts in whole if i < len(texts)][: args.rows]
    assert len(found) == args.rows, f"there are {len(found)} texts of {length} tokens"
    return np.array(found, np.int32)


def read(params: Params, cfg: ModelConfig, texts: np.ndarray, prompt: int, kv_dtype: str | None):
    """Log-probabilities [rows, tokens] of the tokens after each prompt, and the likeliest tokens in their places."""
    rows, length = texts.shape
    limit = length - prompt
    grid = decode.Grid(1, rows, 1, 1, engine.bucket(prompt), limit, engine.CHUNK, kv_dtype=kv_dtype)
    state = decode.empty(grid, cfg, params["norm"].dtype)
    for row in range(rows):
        tokens = np.zeros((1, grid.prompt_slots), np.int32)
        tokens[0, :prompt] = texts[row, :prompt]
        state = decode.load_prompt(grid, cfg, params, None, state, tokens, np.array([prompt], np.int32), row, 0)
    every, none = np.ones(rows, bool), np.zeros(rows, np.int32)
    state = decode.admit(grid, state, np.zeros(2, np.uint32), every, none, np.zeros((rows, 3), np.uint32), none + limit)
    cache, hidden, out = state.cache, state.hidden, []
    chunk = jax.jit(functools.partial(read_chunk, cfg=cfg), donate_argnums=1)
    for start in range(prompt, length, grid.chunk):
        hidden, cache, found = chunk(params, cache, hidden, texts[:, start : start + grid.chunk], jnp.int32(start))
        out.append(jax.device_get(found))
    return [np.concatenate([x[i] for x in out]).T for i in range(2)]


def read_chunk(params, cache, hidden, tokens, start, cfg: ModelConfig):
    """A chunk of tokens [rows, chunk], which begins at position `start`: as in `decode.decode`, but none is drawn."""

    def step(carry, at):
        hidden, recent = carry
        logs = jax.nn.log_softmax(transformer.unembed(params, hidden))
        token = tokens[:, at]
        found = jnp.take_along_axis(logs, token[:, None], 1)[:, 0], logs.argmax(-1)
        position = jnp.full(len(token), start + at, jnp.int32)
        new, recent = transformer.decode_step(params, token, position, cfg, cache, recent, at)
        return (new.astype(hidden.dtype), recent), found

    recent = transformer.empty_recent(cache, tokens.shape[1])
    (hidden, recent), found = jax.lax.scan(step, (hidden, recent), jnp.arange(tokens.shape[1]))
    return hidden, transformer.commit(cache, recent), found


if __name__ == "__main__":
    main()
