"""Typed JSON: what a row or a file of a run must hold, and a one-line error where it does not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from dail_jax import strict_json
from dail_jax.errors import UserError
from dail_jax.strict_yaml import as_user_error

Natural = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Text = InstanceOf[str]  # written by a model, so it may contain anything, such as half of a surrogate pair


class Shape(BaseModel):
    """A JSON object. Values must have their exact types; keys that a shape does not name are ignored."""

    model_config = ConfigDict(strict=True)


S = TypeVar("S", bound=Shape)


def parse(value: Any, shape: type[S], file: Path, row: int | None = None) -> S:
    """The value as an instance of a shape; raises UserError that names the field at fault."""
    tree = strict_json.as_object(value, file, row)
    try:
        return shape.model_validate(tree)
    except ValidationError as error:
        fault = as_user_error(error, file, shape)
        raise UserError(fault.message, file=file, row=row, field=fault.field) from None


def parse_all(rows: Iterable[Any], shape: type[S], file: Path) -> list[S]:
    """`parse` for the rows of a file, in order."""
    return [parse(row, shape, file, number) for number, row in enumerate(rows, 1)]


def check(value: Any, shape: type[Shape], file: Path, row: int | None = None) -> dict[str, Any]:
    """The value itself, with all its keys, once `parse` has accepted it."""
    parse(value, shape, file, row)
    return value


def check_all(rows: Iterable[Any], shape: type[Shape], file: Path) -> list[dict[str, Any]]:
    """`check` for the rows of a file, in order."""
    return [check(row, shape, file, number) for number, row in enumerate(rows, 1)]
