"""The sampler beside transformers, with equal weights, in one run.

    python benchmarks/sampler.py [--json FILE]

(a) mixed policy: ours against a per-token loop over two transformers models with their KV caches (one draw from each,
    a test p >= tau), which is what the reference implementation's rule amounts to;
(b) plain sampling: ours against `transformers.generate`;
(c) mixed policy against our own plain decode at the same number of rows;
(d) occupancy: the share of decoded slots that are live tokens when lengths have a long tail, and the wall time
    against tokens x time per token at full slots;
(e) memory of the shared prompt cache against the repeated one, from the compiled program;
(f) forced answers at three budgets: drawn where their samples lie, against after prompts that repeat all they follow.
"""

from __future__ import annotations

from common import arguments, in_turn, random_model, row, show

PROMPT, NEW = 64, 64


def main() -> None:
    args = arguments("sampler against transformers", batches="8,32", parts="speed,occupancy,memory,forced")
    import jax
    import numpy as np
    import torch

    from dail_jax import config as config_lib
    from dail_jax.sample import engine, mixture
    from dail_jax.sample.sampler import Request

    theirs, params, cfg, mesh = random_model()
    rng = np.random.default_rng(0)
    rows = []

    def sampler(roles: int, slots: int, tau: float = 0.3, max_tokens: int = NEW, stops=()) -> engine.Engine:
        sampling = mixture.sampling_params(config_lib.Sampling(), tau)
        return engine.Engine(params, cfg, mesh, stops, 0, slots, max_tokens, sampling, roles)

    def requests(count: int, roles: int) -> list[Request]:
        draw = lambda: tuple(rng.integers(1, 32000, PROMPT).tolist())  # noqa: E731
        return [Request(f"p{i}", tuple(draw() for _ in range(roles)), (0,), NEW) for i in range(count)]

    with jax.set_mesh(mesh), torch.no_grad():
        for batch in map(int, args.batches.split(",") if "speed" in args.parts else ()):
            two, one, wide = sampler(2, batch), sampler(1, batch), sampler(1, 2 * batch)
            ask2, ask1, ask_wide = requests(batch, 2), requests(batch, 1), requests(2 * batch, 1)
            prompts = [torch.tensor([r.prompts[role] for r in ask2]) for role in range(2)]
            plain = torch.tensor([r.prompts[0] for r in ask1])
            work = batch * NEW
            mixed = lambda: list(two.run(ask2))  # noqa: B023, E731
            times = in_turn(args.runs, mixed, lambda: two_model_loop(theirs, prompts, 0.3))  # noqa: B023
            rows.append(row(f"mixed policy / two-model loop, batch {batch}", *times, "tokens/s", work))
            times = in_turn(args.runs, lambda: list(one.run(ask1)), lambda: generate(theirs, plain))  # noqa: B023
            rows.append(row(f"plain / transformers.generate, batch {batch}", *times, "tokens/s", work))
            times = in_turn(args.runs, mixed, lambda: list(wide.run(ask_wide)))  # noqa: B023
            both = row(f"mixed / own plain decode of the same rows, batch {batch}", *times, "rows/s", 2 * work)
            rows.append(both)
            for r in rows[-3:]:
                print(f"{r['name']}: {r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]", flush=True)
        if "occupancy" in args.parts:
            rows += occupancy(sampler, min(args.runs, 2))
        if "memory" in args.parts:
            rows.append(cache_memory(params, cfg, mesh))
        if "forced" in args.parts:
            rows.append(forced(sampler, min(args.runs, 3)))
    show("sampler, 41.6M-parameter Qwen3 shape, float32", rows, args.json)


def two_model_loop(model, prompts, tau: float):
    """The literal rule, token by token: two forward passes, two caches."""
    import torch

    past, last, out = [None, None], list(prompts), []
    for _ in range(NEW):
        logits = []
        for role in range(2):
            got = model(last[role], past_key_values=past[role], use_cache=True, logits_to_keep=1)
            past[role] = got.past_key_values
            logits.append(torch.softmax(got.logits[:, -1].float(), -1))
        student, privileged = logits
        proposal = torch.multinomial(student, 1)
        token = torch.where(privileged.gather(1, proposal) >= tau, proposal, torch.multinomial(privileged, 1))
        out.append(token)
        last = [token, token]
    return torch.cat(out, 1)


def generate(model, prompts):
    return model.generate(
        prompts,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
        eos_token_id=None,
    )


def occupancy(sampler, runs: int) -> list[dict]:
    """64 problems x 8 samples on 16 slots, with lengths that have a long tail: about 2% of the vocabulary are stop
    tokens, so that lengths are geometric with a mean of about 48 tokens, cut at 256.

    In the ideal case, every token takes as long as with 16 full slots that run to 256 tokens.
    """
    import statistics
    import time

    import numpy as np

    from dail_jax.sample import engine
    from dail_jax.sample.sampler import Request

    rng = np.random.default_rng(1)
    prompt = lambda: (tuple(rng.integers(1, 32000, PROMPT).tolist()),)  # noqa: E731
    ask = [Request(f"p{i}", prompt(), tuple(range(8)), 256) for i in range(64)]
    ask_full = [Request(f"f{i}", prompt(), tuple(range(8)), 256) for i in range(2)]
    s, full = sampler(1, 16, max_tokens=256, stops=tuple(range(0, 32000, 48))), sampler(1, 16, max_tokens=256)
    walls, ideals, share, lengths = [], [], 0.0, []
    for i in range(runs + 1):
        s.usage = engine.Usage()
        started = time.perf_counter()
        lengths = [len(x.tokens) for x in s.run(ask) if x is not None]
        wall, share = time.perf_counter() - started, s.usage.occupancy
        started = time.perf_counter()
        list(full.run(ask_full))
        a_token = (time.perf_counter() - started) / (16 * 256)
        if i:
            walls.append(wall)
            ideals.append(a_token * sum(lengths))
    quantiles = ", ".join(f"{np.quantile(lengths, q):.0f}" for q in (0.1, 0.5, 0.9, 1))
    print(f"lengths: mean {np.mean(lengths):.0f}; 10%, 50%, 90%, 100%: {quantiles}", flush=True)
    ratios = sorted(w / i for w, i in zip(walls, ideals, strict=True))
    return [
        {
            "name": "live share of decoded slots, long tail",
            "ours": share,
            "peer": 1.0,
            "unit": "share",
            "ratio": share,
            "low": share,
            "high": share,
        },
        {
            "name": "wall time / (tokens x time per token), long tail",
            "ours": statistics.median(walls),
            "peer": statistics.median(ideals),
            "unit": "s",
            "ratio": statistics.median(ratios),
            "low": ratios[0],
            "high": ratios[-1],
        },
    ]


def forced(sampler, runs: int) -> dict:
    """8 problems x 8 samples on 16 slots, of up to 256 tokens, cut at 64, 128 and 256; 12 tokens ask, and up to 16 answer.
    About 0.5% of the vocabulary are stop tokens."""
    import dataclasses

    import numpy as np

    from dail_jax.sample.sampler import Continuation, Request

    rng = np.random.default_rng(2)
    asking, answer, budgets = tuple(rng.integers(1, 32000, 12).tolist()), 16, (64, 128, 256)
    stops = tuple(range(0, 32000, 192))
    ask = [Request(f"p{i}", (tuple(rng.integers(1, 32000, PROMPT).tolist()),), tuple(range(8)), 256) for i in range(8)]
    prompts = {r.name: r.prompts[0] for r in ask}
    plain, after, before = (
        sampler(1, 16, max_tokens=n, stops=stops) for n in (256, answer, 256 + len(asking) + answer)
    )

    def then(s):
        cuts = [b for b in budgets if (b <= len(s.tokens) and s.finish == "length") or b < len(s.tokens)]
        return [Continuation(f"force/{b}/{s.name}/{s.sample}", b, asking, answer) for b in cuts]

    def whole():
        drawn = [s for s in plain.run(ask) if s is not None]
        later = [
            Request(one.name, ((*prompts[s.name], *s.tokens[: one.kept].tolist(), *one.tokens),), (0,), answer)
            for s in drawn
            for one in then(s)
        ]
        return drawn + [s for s in after.run(later) if s is not None]

    def follow():
        return [s for s in before.run([dataclasses.replace(r, then=then) for r in ask]) if s is not None]

    texts = [{(s.name, s.sample): s.tokens.tolist() for s in run()} for run in (follow, whole)]
    same = sum(texts[1].get(key) == tokens for key, tokens in texts[0].items())  # among 32,000 tokens, rounding shows
    prefills = [sum(s.usage.prefills for s in some) for some in ((before,), (plain, after))]
    counts = f"{len(texts[0]) - 64} answers to 64 samples, {same} of {len(texts[0])} the same"
    print(f"forced: {counts}; prefills {prefills[0]}, {prefills[1]}", flush=True)
    return row("forced answers after samples / after whole prompts", *in_turn(runs, follow, whole), "samples/s", 64)


def cache_memory(params, cfg, mesh) -> dict:
    """Cache bytes of 32 samples, prompt 1,024 and response 256: shared against repeated, by the compiler's count."""
    import jax
    import jax.numpy as jnp

    from dail_jax import config as config_lib
    from dail_jax.sample import decode, engine, mixture

    def argument_bytes(grid: decode.Grid) -> int:
        state = jax.eval_shape(lambda: decode.empty(grid, cfg, jnp.float32))
        held = jax.jit(lambda cache: cache).lower(
            (state.cache.k, state.cache.v, state.cache.prompt_k, state.cache.prompt_v)
        )
        return held.compile().memory_analysis().argument_size_in_bytes

    grid = engine.Engine(params, cfg, mesh, (), 0, 64, 256, mixture.sampling_params(config_lib.Sampling())).grid(
        32, 1024
    )
    shared = argument_bytes(grid) * 32 / grid.slots
    repeated = argument_bytes(decode.Grid(1, 32, 1, 1, 1024, 256, grid.chunk))
    share = shared / repeated
    return {
        "name": "shared / repeated prompt cache, n=32, 1024+256",
        "ours": shared / 2**20,
        "peer": repeated / 2**20,
        "unit": "MiB",
        "ratio": share,
        "low": share,
        "high": share,
    }


if __name__ == "__main__":
    main()
