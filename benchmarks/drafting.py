"""What lossless n-gram drafting brings: tokens a forward and speed-up on the micro-world, and, for real texts given
as rows, how often the drafter's guess is the next token (a property of the texts: no model is involved).

    python benchmarks/drafting.py [--json FILE] [--rows FILE.jsonl --tokenizer DIR]
"""

from __future__ import annotations

import functools

from common import arguments, in_turn, row, show


def main() -> None:
    args = arguments("n-gram drafting", rows="", tokenizer="", draft=3)
    rows = micro_world(args.runs, args.draft)
    if args.rows:
        rows += real_text(args.rows, args.tokenizer, args.draft)
    show("lossless drafting", rows, args.json)


def micro_world(runs: int, draft: int) -> list[dict]:
    """Mixed rollouts of 96 training problems, 4 samples each: plain, always drafting, and adaptive."""
    import jax

    from dail_jax import config as config_lib
    from dail_jax.data.records import read_rows
    from dail_jax.sample.engine import Request
    from dail_jax.stages.session import open_session

    config = config_lib.load("configs/demo.yaml", ["data.limit=96"])
    assert config.data is not None
    session = open_session(config)
    built = {r.problem_id: session.prompts.build(r) for r in read_rows(config.data)}
    ask = [Request(n, (tuple(p.student), tuple(p.privileged)), (0, 1, 2, 3), 136) for n, p in built.items()]
    made = functools.partial(session.sampler, config.generate.sampling, slots=32, max_tokens=136, tau=0.8, roles=2)
    out = []
    with jax.set_mesh(session.mesh):
        plain, always, adaptive = made(), made(draft=draft), made(draft=draft)
        always.adaptive = False
        texts = [{(s.name, s.sample): s.tokens.tolist() for s in x.run(ask)} for x in (plain, always, adaptive)]
        assert texts[0] == texts[1] == texts[2], "drafting changed a token"
        work = float(sum(map(len, texts[0].values())))
        for name, sampler in (("always", always), ("adaptive", adaptive)):
            times = in_turn(runs, lambda: list(sampler.run(ask)), lambda: list(plain.run(ask)))  # noqa: B023
            out.append(row(f"micro-world, drafting {draft} {name} / not", *times, "tokens/s", work))
        rates = [x.usage.live / (x.usage.steps * 32) for x in (always, plain)]
        out.append(
            {
                "name": "tokens a slot and forward, drafting / not",
                "ours": rates[0],
                "peer": rates[1],
                "unit": "tokens",
                "ratio": rates[0] / rates[1],
                "low": rates[0] / rates[1],
                "high": rates[0] / rates[1],
            }
        )
    return out


def real_text(path: str, tokenizer_folder: str, draft: int) -> list[dict]:
    """The drafter's hit rate on expert solutions after their problems: guesses, and guesses that are right."""
    import json
    from pathlib import Path

    from dail_jax.text import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    tokens = guesses = right = run_length = 0
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        ids, text = tokenizer.encode(found["problem"]), tokenizer.encode(found["solution"])
        latest: dict[tuple[int, ...], int] = {}  # where the text goes on after its last two or three tokens

        def grow(new: list[int], ids=ids, latest=latest) -> None:
            for token in new:  # the place after the newest token is not known yet, so an n-gram enters one step late
                for n in (2, 3):
                    latest[tuple(ids[-n:])] = len(ids)
                ids.append(token)

        start, ids[:] = list(ids), []
        grow(start)
        i = 0
        while i < len(text):
            place = latest.get(tuple(ids[-3:]), latest.get(tuple(ids[-2:])))
            guess = ids[place : place + draft] if place is not None else []
            kept = 0
            for g in guess:
                if i + kept >= len(text) or text[i + kept] != g:
                    break
                kept += 1
            guesses, right, run_length = guesses + bool(guess), right + (kept > 0), run_length + kept
            grow(text[i : i + kept + 1])  # what was drafted rightly, and the token that the model draws itself
            tokens += min(kept + 1, len(text) - i)
            i += kept + 1
    steps = tokens - run_length
    return [
        {
            "name": "real solutions: first guess right",
            "ours": right,
            "peer": guesses,
            "unit": "guesses",
            "ratio": right / max(guesses, 1),
            "low": right / max(guesses, 1),
            "high": right / max(guesses, 1),
        },
        {
            "name": "real solutions: tokens / forwards, if the text were drawn",
            "ours": tokens,
            "peer": steps,
            "unit": "tokens",
            "ratio": tokens / steps,
            "low": tokens / steps,
            "high": tokens / steps,
        },
    ]


if __name__ == "__main__":
    main()
