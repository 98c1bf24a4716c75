"""config: the resolved configuration, and what its keys are."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from dail_jax import config as config_lib
from dail_jax import keys
from dail_jax.metrics import console


def run(config: config_lib.Config | None, explain: str | None = None, markdown: bool = False) -> None:
    """Prints what a key or a section is, or the resolved configuration; without either, the sections that there are."""
    if markdown:
        print(keys.markdown(config_lib.Config), end="")
    elif explain is not None:
        key = keys.find(config_lib.Config, explain)
        print(keys.explanation(key))
        if key.section is not None:
            _section(key.section, key.path)
    elif config is None:
        _section(config_lib.Config, "")
    else:
        print(config_lib.dump(config), end="")


def _section(section: type, path: str) -> None:
    table = Table(show_lines=True)
    table.add_column("key", no_wrap=True)
    for name in ("type", "default", "meaning"):
        table.add_column(name, overflow="fold")
    for key in keys.children(config_lib.Config, path):
        kind = f"{key.type}: {key.allowed}" if key.allowed else key.type
        table.add_row(*map(Text, (key.path, kind, key.shown_default, key.description)))
    console.print(Text(keys.purpose(section)), table, sep="\n")
