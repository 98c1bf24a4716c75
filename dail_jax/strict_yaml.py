"""YAML 1.2 as configurations need it: plain mappings, lists and values, read with line numbers for what is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dail_jax.errors import UserError

MAX_DEPTH = 50  # levels


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError with the line at fault."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", file=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as UTF-8 text: {error}", file=path) from None
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        kind = "an empty file" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"got {kind}, want a mapping of keys", file=path)
    return tree


def parse_yaml(text: str, source: str | Path) -> Any:
    """A YAML 1.2 document; aliases and tags are refused, since nothing here needs them."""
    yaml, depth = YAML(typ="safe", pure=True), 0
    try:
        for event in yaml.parse(io.StringIO(text)):
            line = event.start_mark.line + 1
            kind = type(event).__name__
            depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
            if depth > MAX_DEPTH:
                raise UserError(f"got more than {MAX_DEPTH} levels, want plain values", file=source, row=line)
            if kind == "AliasEvent":
                raise UserError("got a YAML alias, want plain values", file=source, row=line)
            if getattr(event, "tag", None):
                raise UserError(f"got the YAML tag {event.tag!s}, want plain values", file=source, row=line)
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = (error.problem or str(error)).split("\n")[0]
        raise UserError(f"not valid YAML: {problem}", file=source, row=mark.line + 1 if mark else None) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"not valid YAML: {str(error).splitlines()[0]}", file=source) from None


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in a nested dict, in place; list elements by index, as in `benchmarks.0.name`."""
    node: Any = tree
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise UserError(f"got override {key!r}, but {part!r} is not inside a section")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if isinstance(node, list) and parts[-1].isdigit() and int(parts[-1]) < len(node):
        node[int(parts[-1])] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
    else:
        raise UserError(f"got override {key!r}, but its parent is not a section")


def lay_over(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Puts the keys of `other` into `tree`, section by section, in place."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            lay_over(tree[key], value)
        else:
            tree[key] = value
