"""The micro-world's command line.

    python -m dail_jax.microworld corpus --out FILE --rows 45000 --seed 0    pre-training rows: prompt, response
    python -m dail_jax.microworld corpus --out FILE --laziness privileged=0.6    the same, with more shortcuts
    python -m dail_jax.microworld corpus --out FILE --rambling student=0.5 --composed 0.1    with steps that are checked
                                                                             again, and operators with one more step
    python -m dail_jax.microworld data                                       the package's tokenizer and data sets
    python -m dail_jax.microworld check FILE                                 judges traces.jsonl or samples.jsonl

Role templates are the text files in assets/templates. A corpus prompt is such a template, filled in and put through the
tokenizer's chat template, generation prompt included, exactly as in the pipeline.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.table import Table

from dail_jax import config, shapes, strict_json
from dail_jax.data import prompts
from dail_jax.data.records import read_rows
from dail_jax.errors import UserError
from dail_jax.metrics import console
from dail_jax.microworld import tokenizer, verify, world
from dail_jax.rundir import json_line, write_atomic

ASSETS = Path(__file__).parent / "assets"
SEED = 3407  # of the shipped data sets


@functools.cache
def _frame() -> tuple[str, str]:
    """What the chat template puts before and after a user's message, generation prompt included."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    text = loaded.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True)
    before, _, after = str(text).partition("\0")
    return before, after


@functools.cache
def _template(role: str) -> prompts.Template:
    return prompts.load_template(str(ASSETS / "templates" / f"{role}.txt"), role)


def render(role: str, fields: dict[str, str]) -> str:
    """The prompt of `role` as text: its template with the fields filled in, inside the chat template."""
    values = {**fields, "waypoints": fields.get("waypoints", "").split()}
    before, after = _frame()
    return before + _template(role).messages(values)[0]["content"] + after


def write_corpus(
    out: Path,
    rows: int,
    seed: int,
    laziness: world.Laziness = world.LAZINESS,
    rambling: world.Rambling = world.RAMBLING,
    composed: float = 0.0,
) -> None:
    """Writes pre-training rows, without those whose problem is in a held-out set. The trainer adds the end token."""
    held_out = {row["problem"] for name, part in world.datasets(SEED).items() if name != "train" for row in part}
    lines = (
        json_line({"prompt": render(row.role, row.fields), "response": row.response})
        for row in world.corpus(seed, rows, held_out, laziness, rambling, composed)
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, "".join(lines))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", file=out) from None


def parse_shares(option: str, texts: Iterable[str]) -> dict[str, float]:
    """The shares by role of texts such as `privileged=0.6`, given to the command line's `option`."""
    shares = {}
    for text in texts:
        role, _, value = text.partition("=")
        if role not in world.LAZINESS or (share := share_of(value)) is None:
            wanted = f"want ROLE=SHARE between 0 and 1; roles: {', '.join(world.LAZINESS)}"
            raise UserError(f"got {text!r}, {wanted}", field=option)
        shares[role] = share
    return shares


def share_of(text: str) -> float | None:
    """A number from 0 to 1, or None for any other text."""
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


def laziness_of(shares: dict[str, float]) -> world.Laziness:
    """The default laziness with these shares, which hold for all steps that owe work."""
    asked: world.Laziness = {role: dict.fromkeys(world.WORK, share) for role, share in shares.items()}
    return world.LAZINESS | asked


def write_data(folder: Path, shown: float = world.SHOWN) -> None:
    """Writes every generated file of `assets`."""
    tokenizer.save(folder / "tokenizer")
    for name, rows in world.datasets(SEED, shown).items():
        write_atomic(folder / f"{name}.jsonl", "".join(map(json_line, rows)))


class Response(shapes.Shape):
    """What a row of traces.jsonl and one of samples.jsonl have in common: all that is judged."""

    problem_id: str
    text: shapes.Text


def check(path: Path, data: list[Path]) -> dict[str, verify.Tally]:
    """Judges the `text` of every row of a traces.jsonl or samples.jsonl; problems are found by their id in `data`."""
    problems = {row.problem_id: row for file in data for row in read_rows(config.Dataset(path=str(file)))}

    def verdicts() -> Iterator[tuple[str, verify.Judgement]]:
        for line in strict_json.read_lines(path, own=True):
            response = shapes.parse(line.value, Response, path, line.number)
            problem = problems.get(response.problem_id)
            if problem is None:
                raise UserError(
                    f"got {response.problem_id!r}, want a problem of the data sets (--data)",
                    file=path,
                    row=line.number,
                    field="problem_id",
                )
            try:
                yield problem.problem_id, verify.judge(response.text, problem.problem, problem.solution)
            except ValueError as error:
                raise UserError(f"{error}: {problem.problem!r}", field=problem.problem_id) from None

    return verify.tally(verdicts())


def table(tallies: dict[str, verify.Tally]) -> Table:
    """Percentages, with one line per kind and one per kind and operator."""
    out = Table(
        "kind-operator",
        title="Traces, judged from their text",
        caption="right: the boxed answer is correct; sound: so is every step; complete: sound, and all work is shown; "
        "shortcuts: steps without work, among those that owe it; re-checks: per step",
    )
    for name in ("traces", "right %", "sound %", "complete %", "shortcuts %", "re-checks %"):
        out.add_column(name, justify="right")
    for key, t in tallies.items():
        parts = (
            (t.right, t.traces),
            (t.sound, t.traces),
            (t.complete, t.traces),
            (t.shortcuts, t.due),
            (t.rechecks, t.steps),
        )
        out.add_row(key, str(t.traces), *(f"{100 * n / total:.1f}" if total else "-" for n, total in parts))
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m dail_jax.microworld", description="The micro-world's generator.")
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("corpus", help="write pre-training rows")
    new.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    new.add_argument(
        "--rows", type=int, default=45000, help="number of rows (default: 45000, about 4.5 million tokens)"
    )
    new.add_argument("--seed", type=int, default=0)
    new.add_argument(
        "--laziness",
        nargs="+",
        default=[],
        metavar="ROLE=SHARE",
        help="share of steps that owe work and are written without it, for the roles student (any step), privileged and "
        "negative (steps whose result is in context) (default: 0; add and sub 0.15, mul 0.3; 0.97)",
    )
    new.add_argument(
        "--rambling",
        nargs="+",
        default=[],
        metavar="ROLE=SHARE",
        help="share of steps that are written again to check them, by role as above (default: 0)",
    )
    new.add_argument(
        "--composed",
        default="0",
        metavar="SHARE",
        help="share of rows that ask for a known operator with one more step before or after it (default: 0)",
    )
    new = commands.add_parser("data", help="write the package's tokenizer and data sets")
    new.add_argument("--out", type=Path, default=ASSETS, help="the folder (default: the package's own)")
    new.add_argument(
        "--shown",
        type=float,
        default=world.SHOWN,
        metavar="SHARE",
        help=f"share of intermediate results that the solutions show (default: {world.SHOWN:g}; of the last result: all)",
    )
    new = commands.add_parser("check", help="judge the traces in a file, operator by operator")
    new.add_argument("file", type=Path, help="traces.jsonl or samples.jsonl")
    new.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[ASSETS / f"{name}.jsonl" for name in world.SIZES],
        help="the data sets that the problems come from (default: the package's own)",
    )
    options = parser.parse_args(arguments)
    match options.command:
        case "corpus":
            if options.rows < 1 or options.seed < 0:
                raise UserError("want at least one row, and a seed that is not negative")
            composed = share_of(options.composed)
            if composed is None:
                raise UserError(f"got {options.composed!r}, want a share between 0 and 1", field="--composed")
            laziness = laziness_of(parse_shares("--laziness", options.laziness))
            rambling = world.RAMBLING | parse_shares("--rambling", options.rambling)
            write_corpus(options.out, options.rows, options.seed, laziness, rambling, composed)
        case "data":
            write_data(options.out, options.shown)
        case "check":
            console.print(table(check(options.file, options.data)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
