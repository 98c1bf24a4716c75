"""A safetensors file on an object store, of which only the header and the rows that are asked for are read.

It offers what `hf` uses of `safetensors.safe_open`, and like that trusts nothing in the header: every tensor must lie
inside of the file, and be as long as its shape and type say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from dail_jax import strict_json
from dail_jax.errors import UserError
from dail_jax.storage import Object

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
HEADER = 100 << 20  # bytes, as safetensors allows


@dataclass(frozen=True)
class Tensor:
    """Where the bytes of a tensor are; indexed like an array, by a slice of rows, or by an index and a slice of rows."""

    file: Object
    dtype: str
    shape: tuple[int, ...]
    start: int

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: slice | tuple[int, slice]) -> np.ndarray:
        """A copy of these rows, of which alone the bytes are read."""
        first, rows = index if isinstance(index, tuple) else (None, index)
        shape = self.shape if first is None else self.shape[1:]
        start, stop, _ = rows.indices(shape[0])
        dtype = np.dtype(DTYPES[self.dtype])
        row = math.prod(shape[1:]) * dtype.itemsize
        at = self.start + (first or 0) * shape[0] * row
        data = self.file.read(at + start * row, at + max(start, stop) * row)
        return np.frombuffer(data, dtype).reshape(-1, *shape[1:])


class Tensors:
    """The tensors of a file by name; raises UserError if its header is damaged."""

    def __init__(self, file: Object):
        self.file = file
        size = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else HEADER
        if size > min(HEADER, file.size - 8):
            raise self._damaged("the file is cut, or no such file")
        header = strict_json.as_object(strict_json.parse(bytes(file.read(8, 8 + size)), file.url), file.url)
        header.pop("__metadata__", None)
        self.tensors = {name: self._tensor(name, entry, 8 + size) for name, entry in header.items()}
        at = 8 + size
        for one, stop in sorted(self._span(entry, 8 + size) for entry in header.values()):
            if one != at:
                raise self._damaged("tensors overlap, or leave gaps")
            at = stop
        if at != file.size:
            raise self._damaged("the file is cut, or longer than its tensors")

    def get_slice(self, name: str) -> Tensor:
        return self.tensors[name]

    def _damaged(self, why: str) -> UserError:
        return UserError(f"not a complete safetensors file: {why}", file=self.file.url)

    def _span(self, entry: dict[str, Any], data: int) -> tuple[int, int]:
        start, stop = entry["data_offsets"]
        return data + start, data + stop

    def _tensor(self, name: str, entry: Any, data: int) -> Tensor:
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            good = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and start <= stop
        except (TypeError, KeyError, ValueError):
            good = False
            dtype, shape, start, stop = "", (), 0, 0
        if not good or not isinstance(dtype, str):
            raise self._damaged(f"its header describes no tensor {strict_json.printable(name)!r}")
        if dtype in DTYPES and stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise self._damaged(f"the size of {strict_json.printable(name)!r} is not what its shape and type say")
        return Tensor(self.file, dtype, shape, data + start)
