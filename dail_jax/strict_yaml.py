"""Strict YAML 1.2 for configurations: plain mappings, lists and values, with line numbers in error messages."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from dail_jax import keys, resources
from dail_jax.errors import UserError
from dail_jax.strict_json import refuse_odd_text

MAX_DEPTH = 50  # levels


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError with the line at fault."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), resources.configurations(), 1)
        raise UserError("no such file" + (f"; did you mean {near[0]!r}?" if near else ""), file=path) from None
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
            if kind == "ScalarEvent":
                refuse_odd_text(event.value, source, line)
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
    part, rest = _first_part(node, key)
    while rest:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif not isinstance(node, dict):
            raise UserError(f"got override {key!r}, but {part!r} is not inside a section")
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        part, rest = _first_part(node, rest)
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        node[int(part)] = value
    elif isinstance(node, dict):
        node[part] = value
    else:
        raise UserError(f"got override {key!r}, but its parent is not a section")


def _first_part(node: Any, key: str) -> tuple[str, str]:
    """The first part of a dotted key, and the rest. What is there under a name with dots, such as an arm, is one part."""
    there = [name for name in node if f"{key}.".startswith(f"{name}.")] if isinstance(node, dict) else []
    part = max(map(str, there), key=len, default=key.partition(".")[0])
    return part, key[len(part) + 1 :]


def included(value: Any) -> Any:
    """A mapping with the key `from` becomes the mapping in that file, overridden by the other keys."""
    if not isinstance(value, dict) or "from" not in value:
        return value
    tree = read_yaml(resources.locate(str(value["from"])))
    lay_over(tree, {key: other for key, other in value.items() if key != "from"})
    return tree


def lay_over(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Merges the keys of `other` into `tree`, section by section, in place."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            lay_over(tree[key], value)
        else:
            tree[key] = value


# ---------------------------------------------------------------------------------------------------
# Errors found by a typed configuration
# ---------------------------------------------------------------------------------------------------


def as_user_error(error: ValidationError, source: str | Path, root: type[BaseModel]) -> UserError:
    """The first of pydantic's errors about a tree of sections under `root`, as a UserError of one line."""
    # An unknown key comes before a missing one: it may be the missing one, misspelt.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = [part for part in first["loc"] if not str(part).startswith("[")]  # "[key]", and the tags of unions
    field = ".".join(map(str, loc))
    if first["type"] == "extra_forbidden":
        return UserError(f"unknown key; did you mean {_nearest(loc, root)!r}?", file=source, field=field)
    if first["type"] == "missing":
        return UserError("missing, and it has no default", file=source, field=field)
    want = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "dict_type"):
        want = "want a mapping of keys"
    want = re.sub(r"^(Input|Keys|String|.*items) should (be|match) ", "want ", want)
    want = want.replace("a valid tuple", "a list").replace("an instance of str", "text")
    if not want.startswith("want ") and isinstance(first["input"], dict):  # keys that contradict each other
        return UserError(want, file=source, field=field or None)
    got = repr(first["input"])
    return UserError(f"got {got if len(got) <= 80 else got[:77] + '...'}, {want}", file=source, field=field or None)


def _nearest(loc: Sequence[str | int], root: type[BaseModel]) -> str:
    """The known key most like the unknown one at `loc`: by its name in the same section, otherwise by its path."""
    path = ".".join(map(str, loc))
    best = keys.nearest(path, [key.path for key in keys.all_keys(root)])[0]
    section, _, name = best.rpartition(".")
    return name if keys.without_indices(section) == keys.without_indices(path).rpartition(".")[0] else best
