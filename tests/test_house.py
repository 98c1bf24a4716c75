"""The house: five floors, and no import that runs up."""

import ast
import re
from pathlib import Path

import pytest

from dail_jax import mesh

LIBRARY = Path(__file__).parent.parent / "dail_jax"
FILES = sorted(LIBRARY.rglob("*.py"))

# Who may import whom, besides the ground floor, which is for all. A room may always import itself.
GROUND = {
    "errors",
    "storage",
    "resources",
    "strict_json",
    "worker",
    "tokenizer_worker",
    "keys",
    "strict_yaml",
    "shapes",
    "config",
    "mesh",
    "metrics",
    "provenance",
    "mirror",
    "rundir",
    "text",
    "latex",
}
MAY = {
    **{name: set() for name in GROUND},
    "data": set(),
    "model": set(),
    "evaluate": set(),
    "checkpoint": {"model"},
    "sample": {"model"},
    "train": {"model", "data", "checkpoint"},
    "report": {"data", "evaluate"},
    "microworld": {"data"},
    "stages": {"data", "model", "evaluate", "checkpoint", "sample", "train", "report"},
}
MAY["ahead"] = {"data", "model", "sample", "train"}
MAY["stages"] |= {"ahead"}
MAY["api"] = MAY["stages"] | {"stages"}
MAY["launch"] = {"stages"}
MAY["__main__"] = {"launch"}

# The ground floor's own order: a file imports only what stands before it.
ORDER = (
    "errors",
    "storage",
    "resources",
    "strict_json",
    "worker",
    "tokenizer_worker",
    "keys",
    "strict_yaml",
    "shapes",
    "config",
    "mesh",
    "metrics",
    "provenance",
    "mirror",
    "rundir",
    "text",
    "latex",
)


def room(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, int]]:
    """(room, line) of everything of the library that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            whole = node.module == "dail_jax"
            names = [f"dail_jax.{alias.name}" for alias in node.names] if whole else [node.module or ""]
        else:
            continue
        found |= {(name.split(".")[1], node.lineno) for name in names if name.startswith("dail_jax.")}
    return found


def test_every_room_is_on_a_floor():
    assert {room(f) for f in FILES} == MAY.keys() | {"__init__"}
    assert set(ORDER) == GROUND


def test_the_plan_has_no_circle():
    seen: set[str] = set()
    while rest := [name for name in MAY if name not in seen]:
        ready = [name for name in rest if MAY[name] <= seen]
        assert ready, f"a circle among {rest}"
        seen |= set(ready)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(LIBRARY)))
def test_imports_point_downward(path):
    own = room(path)
    if own == "__init__":  # at first use only: test_api
        assert {name for name, _ in imports(path)} <= {"api"}
        return
    allowed = {own} | (set(ORDER[: ORDER.index(own)]) if own in GROUND else GROUND | MAY[own])
    wrong = sorted((line, name) for name, line in imports(path) if name not in allowed)
    assert not wrong, f"{path.relative_to(LIBRARY)} may not import {wrong}"


def test_train_and_sample_do_not_know_each_other():
    for one, other in (("train", "sample"), ("sample", "train")):
        assert not any(name == other for f in FILES if room(f) == one for name, _ in imports(f))


def test_nobody_imports_the_microworld():
    assert not [f for f in FILES if room(f) != "microworld" and any(name == "microworld" for name, _ in imports(f))]
    assert not [f for f in FILES if room(f) != "microworld" and "microworld" in f.read_text()]


def test_einsums_use_declared_letters():
    declared = {letter.lower() for letter in mesh.LETTERS}
    assert set(mesh.RULES) <= declared
    found = [(path, e) for path in FILES for e in re.findall(r'"([a-z.]+(?:,[a-z.]+)*->[a-z.]+)"', path.read_text())]
    assert len(found) > 5
    assert not [(path, e) for path, e in found if set(e) - set(".,->") - declared]
    with pytest.raises(AssertionError, match="'1' is not declared"):
        mesh.spec("b1")


def test_shapes_use_declared_letters():
    """The shapes in docstrings and comments, such as [B,T,D]; words and numbers in them are free."""
    axis = r"(?:[A-Za-z_]+|\d+|\.\.\.|\*[a-z]+|[A-Z]/[A-Z])"
    found = [
        (path, shape)
        for path in FILES
        if room(path) in ("model", "sample", "train", "mesh") or path.stem == "batches"
        for shape in re.findall(rf"\[({axis}(?:, ?{axis})*)\]", path.read_text())
        if re.search(r"\b[A-Z]\b", shape)
    ]
    assert len(found) > 100
    assert not [(path, s) for path, s in found if set(re.findall(r"\b[A-Z]\b", s)) - mesh.LETTERS.keys()]


def test_names():
    for path in FILES:
        assert path.stem not in {"utils", "util", "helpers", "misc", "common", "jax", "grain", "orbax", "optax"}
