"""The keys of a typed configuration, from its sections' types and docstrings: what each is, and which one is meant.

A key's path is dotted, as in `train.optimizer.learning_rate`; N stands for the index of a list's element, as in
`evaluate.benchmarks.N.name`.
"""

from __future__ import annotations

import difflib
import functools
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from dail_jax.errors import UserError

CLOSE = 0.6  # similarity from which a key counts as misspelt
# Of JSON Schema; pydantic leaves a bound that it adds behind a validator under its own name.
BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "ge": ">=",
    "gt": ">",
    "le": "<=",
    "lt": "<",
}
TYPES = {"boolean": "true or false", "integer": "integer", "number": "number", "null": "null", "object": "mapping"}
GENERATED = "python -m dail_jax.launch config --markdown > docs/configuration.md"


@dataclass(frozen=True)
class Key:
    """What is known of a key.

    Attributes:
      type: in words, such as `integer` or `list of texts`.
      default: as JSON, which is also YAML; None for a key that must be set. It is the default at this place: one type
        of section may have others elsewhere.
      allowed: values or bounds beyond the type; empty if there are none.
      section: the type of the section that the key holds, if any.
    """

    path: str
    type: str
    default: str | None
    allowed: str
    description: str
    section: type[BaseModel] | None

    @property
    def shown_default(self) -> str:
        """The default in words; empty for a section, whose keys have their own."""
        if self.default is None:
            return "none: must be set"
        return "" if self.section is not None and self.default.startswith("{") else self.default


@functools.cache
def all_keys(root: type[BaseModel]) -> tuple[Key, ...]:
    """Every key, sections before what they hold."""
    schema = root.model_json_schema()
    definitions = {**schema.get("$defs", {}), root.__name__: schema}

    def walk(model: type[BaseModel], prefix: str, defaults: BaseModel | None) -> Iterator[Key]:
        properties = definitions[model.__name__]["properties"]
        for name, field in model.model_fields.items():
            required = field.is_required() and defaults is None
            value = getattr(defaults, name) if defaults is not None else None if required else field.get_default()
            kind, allowed = _kind(properties[name])
            section = section_in(field.annotation)
            path = prefix + name
            yield Key(
                path,
                kind,
                None if required else json.dumps(_plain(value), ensure_ascii=False),
                allowed,
                " ".join((field.description or "").split()),
                section,
            )
            if section is not None:
                inner = f"{path}.N." if "list of sections" in kind else f"{path}."
                yield from walk(section, inner, value if isinstance(value, section) else None)

    return tuple(walk(root, "", None))


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `tuple[Benchmark, ...]` or `Dataset | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in get_args(annotation) if (s := section_in(a))), None)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _kind(schema: dict[str, Any]) -> tuple[str, str]:
    """(type in words, allowed values) of a JSON schema."""
    if several := schema.get("anyOf") or schema.get("oneOf"):
        kinds = [_kind(one) for one in several]
        return " or ".join(kind for kind, _ in kinds), ", or ".join(allowed for _, allowed in kinds if allowed)
    if "$ref" in schema:
        return "section", ""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum") or [schema["const"]]
        return "text", f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if schema.get("type") == "array":
        kind, allowed = _kind(schema["items"])
        return f"list of {kind}s", allowed
    bounds = " and ".join(f"{sign} {schema[key]}" for key, sign in BOUNDS.items() if key in schema)
    return schema.get("format") or TYPES.get(schema.get("type", "any"), "text"), bounds or schema.get("pattern", "")


# ---------------------------------------------------------------------------------------------------
# Looking up
# ---------------------------------------------------------------------------------------------------


def find(root: type[BaseModel], path: str) -> Key:
    """The key at a path; raises UserError with the nearest ones for a key that is not known."""
    known = {without_indices(key.path): key for key in all_keys(root)}
    found = known.get(without_indices(path))
    if found is None:
        near = " or ".join(map(repr, nearest(path, [key.path for key in known.values()])))
        raise UserError(f"unknown key; did you mean {near}?", field=path)
    return found


def children(root: type[BaseModel], section: str) -> list[Key]:
    """The keys directly inside a section; an empty path means the whole configuration."""
    inside = without_indices(section)
    return [key for key in all_keys(root) if without_indices(key.path).rpartition(".")[0] == inside]


def nearest(path: str, known: Sequence[str], limit: int = 3) -> list[str]:
    """The known paths that an unknown one may have meant, best first; always at least one.

    The last name decides, wherever the key is, and its place decides between equals: `train.lr` means
    `train.optimizer.learning_rate` before it means `pretrain.optimizer.learning_rate`.
    """
    section, _, leaf = without_indices(path).rpartition(".")

    def score(other: str) -> tuple[float, float]:
        place, _, name = without_indices(other).rpartition(".")
        # A full similarity counts more than a place, but among misspellings one in the same section is likelier.
        alike = similarity(leaf, name)
        return alike + (0.2 if place == section and alike >= CLOSE else 0), _shared(section, place) - len(place) / 1000

    ranked = sorted(known, key=score, reverse=True)
    best = score(ranked[0])[0]
    if best < CLOSE:
        inside = [p for p in known if without_indices(p).rpartition(".")[0] == section] or known
        return [max(inside, key=lambda p: difflib.SequenceMatcher(None, p.rpartition(".")[2], leaf).ratio())]
    return [p for p in ranked[:limit] if score(p)[0] >= max(best - 0.1, CLOSE)]


def similarity(name: str, known: str) -> float:
    """From 0 to 1, how likely somebody who writes `name` means `known`: initials (`lr`) and beginnings (`temp`) count."""
    if name == known:
        return 1.0
    words = known.split("_")
    if len(words) > 1 and name.replace("_", "") == "".join(word[0] for word in words):
        return 0.95
    if name in words or (len(name) > 2 and known.startswith(name)):
        return 0.9
    return 0.9 * difflib.SequenceMatcher(None, known, name).ratio()


def _shared(one: str, other: str) -> int:
    """How many sections two paths have in common, from the first on."""
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def without_indices(path: str) -> str:
    """The path without the indices of list elements."""
    return ".".join(part for part in path.split(".") if part != "N" and not part.isdigit())


# ---------------------------------------------------------------------------------------------------
# Writing down
# ---------------------------------------------------------------------------------------------------


def explanation(key: Key) -> str:
    """Lines of text about one key."""
    facts = {"type": key.type, "default": key.shown_default, "allowed": key.allowed}
    lines = [key.path, *(f"  {name + ':':<9}{value}" for name, value in facts.items() if value)]
    return "\n".join([*lines, "", *textwrap.wrap(key.description, 100, initial_indent="  ", subsequent_indent="  ")])


def purpose(section: type[BaseModel]) -> str:
    """What a section is, from its docstring: one paragraph per paragraph there."""
    return "\n\n".join(" ".join(part.split()) for part in (section.__doc__ or "").split("\n\n"))


def markdown(root: type[BaseModel]) -> str:
    """The reference page: a table for each section. A type of section that comes again is shown by its defaults alone."""
    every = all_keys(root)
    lines = [
        "# Configuration",
        "",
        f"<!-- Written by `{GENERATED}` from dail_jax/config.py; change that. -->",
        "",
        purpose(root),
        "",
        "A key is set in a YAML file or, by its dotted path, on the command line: `train.optimizer.learning_rate=1e-4`.",
        "N stands for an index from 0. `python -m dail_jax.launch config --explain KEY` prints what is said here, and",
        "`config --config FILE` the configuration that results from a file. A path is relative to the working directory, or a",
        "URL such as `gs://bucket/name` (clusters.md). Numbers must be finite.",
        "",
        *_table(children(root, "")),
    ]
    shown: dict[type[BaseModel], str] = {}
    for key in every:
        if key.section is None:
            continue
        path = f"{key.path}.N" if "list of sections" in key.type else key.path
        lines += ["", f"{'#' * (2 + without_indices(path).count('.'))} {path}", ""]
        inside = children(root, key.path)
        first = shown.setdefault(key.section, path)
        if first == path:
            lines += [purpose(key.section), "", *_table(inside)]
            continue
        there = {one.path: one.default for one in every}
        other = [one for one in inside if there[f"{first}.{one.path.removeprefix(f'{path}.')}"] != one.default]
        lines += [f"The same keys as `{first}`{', with these defaults:' if other else '.'}"]
        lines += ["", *_table(other)] if other else []
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Key]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in rows:
        allowed = f"; {key.allowed}" if key.allowed else ""
        default = key.shown_default if key.default is None else f"`{key.shown_default}`" if key.shown_default else ""
        cells = (f"`{key.path}`", key.type + allowed, default, key.description)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines
