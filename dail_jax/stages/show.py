"""waypoints and prompts: show what the roles will see of some rows, before any device is used."""

from __future__ import annotations

from collections.abc import Sequence

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax.data import waypoints as waypoints_lib
from dail_jax.data.records import Row, read_rows
from dail_jax.errors import UserError, visible
from dail_jax.metrics import console, log
from dail_jax.stages.session import prompt_builder, tokenizer_folder
from dail_jax.text import load_tokenizer

FIRST = 3  # rows that are shown if none are named


def waypoints(config: config_lib.Config, row: Sequence[str] = ()) -> None:
    """Prints the solution, waypoints and final answer of rows side by side, and logs counts over all rows."""
    rows = _rows(config)
    for one in _chosen(config, rows, row):
        table = Table(title=Text(visible(f"row {one.index + 1}: {one.problem_id}")), show_lines=True, expand=True)
        table.add_column("solution", ratio=5, overflow="fold")
        kind = config.waypoints.extractor if one.waypoints is None else "the row's own"
        table.add_column(f"waypoints ({kind})", ratio=3, overflow="fold")
        table.add_column("final answer", ratio=1, overflow="fold")
        for view in one.views:
            found = waypoints_lib.waypoints(view, config.waypoints)
            cells = view.solution, "\n".join(found), waypoints_lib.final_answer(view) or ""
            table.add_row(*(Text(visible(cell)) for cell in cells))
        console.print(table)
    views = [view for one in rows for view in one.views]
    counts = [len(waypoints_lib.waypoints(view, config.waypoints)) for view in views]
    no_answer = sum(waypoints_lib.final_answer(view) is None for view in views)
    more = f" with {len(views)} solutions" if len(views) > len(rows) else ""
    log(
        f"waypoints: {len(rows)} rows{more}, {sum(counts) / len(views):.1f} each (from {min(counts)} to {max(counts)}), "
        f"{counts.count(0)} without any, {no_answer} without a final answer"
    )


def prompts(config: config_lib.Config, row: Sequence[str] = ()) -> None:
    """Prints each role's prompt as the model sees it, with its control tokens, and the reply that SFT would imitate."""
    tokenizer = load_tokenizer(tokenizer_folder(config))
    builder = prompt_builder(config, tokenizer)
    for one in _chosen(config, _rows(config), row):
        for number, view in enumerate(one.views, 1):
            built = builder.build(view)
            of = f", solution {number} of {len(one.views)}" if one.further else ""
            cut = ", solution cut to fit" if built.cut else ""
            log(f"row {one.index + 1}: {one.problem_id}{of}{cut}")
            for role in ("student", "privileged", "negative", "expert"):
                ids = getattr(built, role)
                shown = visible(tokenizer.decode(ids, keep_special=True))
                console.print(Panel(Text(shown), title=f"{role}: {len(ids)} tokens", title_align="left"))
    builder.report("prompts")


def _rows(config: config_lib.Config) -> list[Row]:
    if config.data is None:
        raise UserError("missing: there are no rows to show", field="data")
    return read_rows(config.data)


def _chosen(config: config_lib.Config, rows: list[Row], names: Sequence[str]) -> list[Row]:
    """The rows with these problem ids or numbers; the first few if none are named."""
    known = {**{str(one.index + 1): one for one in rows}, **{one.problem_id: one for one in rows}}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"got {unknown!r}, want a problem_id or a number from 1 to {len(rows)}",
            file=config.data and config.data.shown_path,
            field="--row",
        )
    return [known[name] for name in names] or rows[:FIRST]
