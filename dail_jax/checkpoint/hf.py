"""Hugging Face model folders <-> parameter trees, tensor by tensor, by the declarations in `model.weights`.

Several processes share the reading: of every tensor, each reads some rows, from a disk or by ranges from an object
store, and gets the others over the network between the devices. So the files are read once, however many hosts and
whatever the mesh.

Reading trusts nothing: names in the index must stay inside the folder; safetensors checks the headers; this module
checks that every tensor is present, finite, and of the right shape and dtype. A `MANIFEST.sha256` beside the weights is
verified first. Folders are written under a temporary name and renamed when they are complete.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dail_jax import mesh as mesh_lib
from dail_jax import storage, strict_json
from dail_jax.checkpoint import ranges
from dail_jax.checkpoint.ranges import DTYPES
from dail_jax.errors import UserError, want_folder, writing
from dail_jax.metrics import progress
from dail_jax.model import int8, weights
from dail_jax.model.families import LIMITS, ModelConfig, read_config, text_only
from dail_jax.model.int8 import Matrix
from dail_jax.provenance import Checksums, digest, published, sha256
from dail_jax.rundir import sync_folder

INDEX = "model.safetensors.index.json"
MANIFEST = "MANIFEST.sha256"
PROVENANCE = "provenance.json"
SHARD_BYTES = 4 << 30
AHEAD = 4  # tensors that are read while those before them go to the devices


def load(
    folder: str | Path, mesh: jax.sharding.Mesh, dtype: str, quantize: str | None = None
) -> tuple[weights.Params, ModelConfig]:
    """The model in a folder, sharded over the mesh. Takes host memory for a few weights of one layer.

    Raises UserError for weights that are missing, unexpected, of another shape, not finite, damaged or not supported.
    """
    folder, cfg = Path(folder), read_config(folder)
    mesh_lib.from_first(lambda: verify_manifest(folder))
    layout, shapes = weights.shardings(cfg, mesh, quantize), weights.abstract(cfg, dtype, quantize=quantize)
    places = weights.places(cfg)
    count = sum(len(weight.names(cfg)) for weight in weights.declare(cfg).values())
    with Tensors(folder) as source, progress("loading weights", count, "tensors") as bar:
        _check_names(source, cfg)
        wanted = [
            (tensor, *places[name]) for name, weight in weights.declare(cfg).items() for tensor in weight.names(cfg)
        ]
        tensors = source.shared(wanted)

        def leaf(name: str, weight: weights.Weight) -> Matrix:
            where, form = ((tree["layers"] if weight.layered else tree)[name] for tree in (layout, shapes))
            parts = weight.parts(cfg)

            def read(where: Any) -> Matrix:
                found = list(itertools.islice(tensors, parts))
                bar.advance(parts)
                x = weight.from_torch(np.stack(found) if weight.each else found[0], cfg)
                if not (quantize and weight.channels):
                    return put(x.astype(dtype), where)
                channels = [weight.axes.index(axis) for axis in weight.channels]
                return jax.tree.map(put, int8.quantize(x, channels, dtype), where)

            if not weight.layered:
                return read(where)
            one_layer = jax.tree.map(lambda w: NamedSharding(mesh, PartitionSpec(*w.spec[1:])), where)
            empty = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), form)  # noqa: E731
            stack = jax.jit(empty, out_shardings=where)()
            for row in range(len(weight.layers(cfg))):
                stack = _insert(stack, read(one_layer), row)
            return stack

        params = weights.tree(cfg, leaf)
        source.raise_problem()
        return params, cfg


def check(folder: Path, cfg: ModelConfig) -> None:
    """Raises UserError unless the files of a folder hold the model's weights, by their headers alone."""
    with Tensors(folder) as source:
        _check_names(source, cfg)
        places = weights.places(cfg)
        for name, weight in weights.declare(cfg).items():
            for tensor in weight.names(cfg):
                source.check(tensor, places[name][0])


def save(
    folder: str | Path,
    params: weights.Params,
    cfg: ModelConfig,
    config_json: dict[str, Any],
    tokenizer: str | Path | None = None,
    made_of: dict[str, Any] | None = None,
) -> None:
    """Writes a folder that transformers and vLLM can load, from the first process; raises UserError if it exists.

    Of a multimodal model, `config_json` describes more than is written: the text model alone.
    """
    with new_folder(folder, made_of) as temporary:
        first = mesh_lib.is_first()
        parts = list(_shards(params, cfg))
        index: dict[str, str] = {}
        for number, tensors in enumerate(parts, 1):
            file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            gathered = {name: read() for name, read in tensors.items()}
            if first:
                save_file(gathered, temporary / file, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, file)
        if not first:
            return
        (temporary / "config.json").write_text(json.dumps(text_only(config_json), indent=2) + "\n")
        if len(parts) > 1:
            total = weights.count(cfg) * np.dtype(params["norm"].dtype).itemsize
            (temporary / INDEX).write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
            )
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temporary)
        write_manifest(temporary)


# ---------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(folder: str | Path, made_of: dict[str, Any] | None = None) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` when the block succeeds, and deleted otherwise.

    Every process must enter the block; the first creates and renames the folder. `made_of` is written into it, without
    the paths of this machine.
    """
    folder = Path(folder)

    def make() -> str:
        if folder.exists():
            raise UserError("already exists: choose another folder or delete this one", file=folder)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        with writing(folder):
            temporary.mkdir(parents=True)
            if made_of is not None:
                (temporary / PROVENANCE).write_text(json.dumps(published(made_of), indent=1) + "\n")
        return str(temporary)

    temporary = Path(mesh_lib.from_first(make))
    try:
        with writing(folder, SafetensorError):
            yield temporary
            if mesh_lib.is_first():
                for file in (f for f in temporary.rglob("*") if f.is_file()):
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                sync_folder(temporary)
                temporary.rename(folder)
                sync_folder(folder.parent)
        mesh_lib.barrier(f"wrote {folder.name}")
    finally:
        if mesh_lib.is_first():
            shutil.rmtree(temporary, ignore_errors=True)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: str | Path, target: Path) -> None:
    """Copies the files that a tokenizer and its chat template consist of."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 of every file in a folder, in the format of `sha256sum`."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    (folder / MANIFEST).write_text("".join(f"{sha256(p)}  {p.name}\n" for p in files))


def verify_manifest(folder: Path, checksum: Callable[[Path], str] = sha256) -> None:
    """Raises UserError if a file differs from the folder's manifest; a folder without a manifest passes."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    for number, line in enumerate(manifest.read_text(errors="replace").splitlines(), 1):
        listed, _, name = line.partition("  ")
        if not name or Path(name).name != name:
            raise UserError("got a line that is not `HASH  NAME`", file=manifest, row=number)
        if name in storage.objects(folder):  # which vouches for the bytes that it holds
            continue
        if not (folder / name).is_file():
            raise UserError(f"missing, but listed in {MANIFEST}", file=folder / name)
        if checksum(folder / name) != listed:
            raise UserError(f"damaged: its SHA-256 differs from the one in {MANIFEST}", file=folder / name)


def listed_digest(folder: Path, name: str) -> str | None:
    """The SHA-256 that a folder's manifest lists for a file; None if it lists none."""
    manifest = folder / MANIFEST
    lines = manifest.read_text(errors="replace").splitlines() if manifest.is_file() else []
    return next((line[:64] for line in lines if line[64:] == f"  {name}"), None)


def tokenizer_digest(folder: Path, checksum: Checksums) -> str:
    """One digest of all files that determine a folder's tokenizer and chat template; raises UserError without any."""
    want_folder(folder, "a tokenizer")
    files = [folder / name for name in (*TOKENIZER_FILES, "chat_template.json") if (folder / name).is_file()]
    files += sorted(folder.glob("additional_chat_templates/*.jinja"))
    if not files:
        raise UserError("got no tokenizer, want a folder with one", file=folder)
    return digest({file.name: checksum(file) for file in files if file.name != "generation_config.json"})


# ---------------------------------------------------------------------------------------------------
# Reading tensors
# ---------------------------------------------------------------------------------------------------


def shards(folder: Path, single: str = "model.safetensors", index: str = INDEX) -> list[Path]:
    """The files of a folder that hold its tensors; raises UserError if there are none or the index is not usable."""
    remote = storage.objects(folder)
    if (folder / single).exists() or single in remote:
        return [folder / single]
    path = folder / index
    if not path.exists():
        if any(name.startswith("params/") for name in remote):
            raise UserError(
                "converted weights are read from a file system: on a store, want the Hugging Face folder itself",
                file=folder,
            )
        names = [*(p.name for p in folder.iterdir()), *remote]
        pickles = [name for name in names if name.endswith(".bin")] + [name for name in names if name.endswith(".pt")]
        if pickles:
            raise UserError(
                f"only pickle weights ({pickles[0]}): convert them with transformers' "
                "save_pretrained(safe_serialization=True)",
                file=folder,
            )
        raise UserError("no safetensors weights here", file=folder)
    listed = strict_json.read_object(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) and name for name in listed.values()):
        raise UserError("want names of files by tensor", file=path, field="weight_map")
    root, names = folder.resolve(), sorted(set(listed.values()))
    for name in names:
        target = folder / name
        if len(name) > 255 or Path(name).name != name or (target.is_symlink() and not _is_cache_link(target, root)):
            raise UserError(
                f"got file {name!r:.80}, want a plain name inside the folder", file=path, field="weight_map"
            )
    return [folder / name for name in names]


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: whole in a file, or an expert's rows, `part`, of a tensor that holds all of a layer's."""

    file: Path
    handle: Any
    name: str
    part: tuple[int, range] | None = None

    @property
    def view(self) -> Any:
        return self.handle.get_slice(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.view.get_shape())
        return shape if self.part is None else (len(self.part[1]), *shape[2:])

    def read(self, rows: slice) -> np.ndarray:
        if self.part is None:
            return self.view[rows]
        expert, own = self.part
        mine = own[rows]
        return self.view[expert, mine.start : mine.stop]

    def parts(self) -> dict[str, Stored]:
        """By names of the text model: the tensor, or each expert's where it is [J,2I,D] of gates and ups, or [J,D,I]."""
        name = TEXT + self.name.removeprefix(MULTIMODAL) if self.name.startswith(MULTIMODAL) else self.name
        module, _, kind = name.rpartition(".")
        shape = self.shape
        if kind not in FUSED or not module.endswith(".experts") or len(shape) != 3 or shape[0] > LIMITS["num_experts"]:
            return {name: self}
        size = shape[1] // len(FUSED[kind])
        return {
            f"{module}.{expert}.{one}.weight": replace(self, part=(expert, range(i * size, (i + 1) * size)))
            for expert in range(shape[0])
            for i, one in enumerate(FUSED[kind])
        }


TEXT, MULTIMODAL = "model.", "model.language_model."  # how names begin, alone and beside a model of images
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # as transformers 5 holds experts


class Tensors:
    """The tensors of a safetensors folder, single or sharded, read through a memory map or by ranges from a store.

    Names are those of a text model alone, and experts have a tensor each, however the folder has them.
    """

    def __init__(self, folder: Path, single: str = "model.safetensors", index: str = INDEX):
        self.folder, self.files = folder, contextlib.ExitStack()
        self.where: dict[str, Stored] = {}
        self.problem: UserError | None = None
        for file in shards(folder, single, index):
            for tensor in self._open(file):
                for name, part in tensor.parts().items():
                    if name in self.where:
                        raise UserError(f"tensor {name!r} is also in {self.where[name].file.name}", file=file)
                    self.where[name] = part

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def _open(self, file: Path) -> Iterable[Stored]:
        if file.name in (remote := storage.objects(self.folder)):
            handle = ranges.Tensors(remote[file.name])
            return [Stored(file, handle, name) for name in handle.tensors]
        if file.exists() and not file.is_file():  # opening a FIFO would block forever
            raise UserError("cannot be read: it is not a regular file", file=file)
        try:
            with open(file, "rb") as handle:
                start = handle.read(64)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", file=file) from None
        if start.startswith(b"version https://git-lfs") or start.lstrip()[:1] == b"<":
            raise UserError("not downloaded: this is a git-LFS pointer or a web page", file=file)
        try:
            handle = self.files.enter_context(safe_open(file, "np"))
            names = list(handle.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"not a complete safetensors file: {error}", file=file) from None
        return [Stored(file, handle, name) for name in names]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError unless a tensor is there, of this shape and a known dtype, by its file's header."""
        tensor = self.where[name]
        if tensor.shape != shape:
            raise UserError(f"got shape {tensor.shape}, want {shape}", file=tensor.file, field=name)
        dtype = tensor.view.get_dtype()
        if dtype not in DTYPES:
            raise UserError(f"got dtype {dtype}, want one of {', '.join(DTYPES)}", file=tensor.file, field=name)

    def read(self, name: str, shape: tuple[int, ...], rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some of its rows; raises UserError unless it is finite and of this shape and a known dtype."""
        self.check(name, shape)
        x = self.where[name].read(rows)
        if not np.isfinite(x).all():
            raise UserError("got NaN or infinity, want finite weights", file=self.where[name].file, field=name)
        return x

    def shared(self, wanted: Iterable[tuple[str, tuple[int, ...], slice]]) -> Iterator[np.ndarray]:
        """Some rows of each of the tensors, by name, shape and rows, in this order; all processes must ask for the same.

        Each process reads its share of the rows, a few tensors ahead, and gets the others' from them. What one cannot
        read is zero, and an error in all of them once `raise_problem` is called; a single process raises it at once.
        """
        with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
            reading: collections.deque = collections.deque()
            for name, shape, rows in wanted:
                mine = range(shape[0])[rows]
                reading.append((len(mine), pool.submit(self._mine, name, shape, mine[mesh_lib.share(len(mine))])))
                if len(reading) > AHEAD:
                    count, found = reading.popleft()
                    yield mesh_lib.joined(found.result(), count)
            for count, found in reading:
                yield mesh_lib.joined(found.result(), count)

    def _mine(self, name: str, shape: tuple[int, ...], rows: range) -> np.ndarray:
        try:
            if self.problem is None:
                return self.read(name, shape, slice(rows.start, rows.stop))
        except UserError as error:
            if jax.process_count() == 1:
                raise
            self.problem = error
        return np.zeros((len(rows), *shape[1:]), DTYPES.get(self.where[name].view.get_dtype(), np.float32))

    def raise_problem(self) -> None:
        """Raises UserError if any process could not read something."""
        first = next(filter(None, mesh_lib.from_all(self.problem and str(self.problem))), None)
        if first is not None:
            raise self.problem or UserError(first)


def _is_cache_link(path: Path, root: Path) -> bool:
    """Whether a link is one of the Hugging Face cache's own, from snapshots/REV/FILE to ../../blobs/HASH."""
    target = path.resolve()
    return (
        target.parent.name == "blobs" and root.parent.name == "snapshots" and target.parent.parent == root.parent.parent
    )


def _check_names(source: Tensors, cfg: ModelConfig) -> None:
    """Raises UserError unless all declared tensors are there and no others."""
    want = {tensor for weight in weights.declare(cfg).values() for tensor in weight.names(cfg)}
    missing = sorted(want - source.where.keys())
    extra = sorted(
        name
        for name in source.where.keys() - want
        if not name.endswith("rotary_emb.inv_freq")
        and not name.startswith(cfg.left_out)
        and not (cfg.tied and name == "lm_head.weight")
    )
    for problem, names in (("missing", missing), ("unexpected", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{problem} tensors: {', '.join(names[:3])}{more}", file=source.folder)


def put(x: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds in full, as a global array with this sharding."""
    x = np.ascontiguousarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: Matrix, x: Matrix, index: int) -> Matrix:
    """A stack of layers with one of them replaced."""
    return jax.tree.map(lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, index, 0), stack, x)


def _shards(params: weights.Params, cfg: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yields groups of {Hugging Face name: function that gathers the tensor}, each of at most SHARD_BYTES or one tensor."""
    group: dict[str, Any] = {}
    size, table = 0, weights.declare(cfg)
    for names in weights.tensors(cfg).values():
        held = [(table[name], (params["layers"] if table[name].layered else params)[name]) for name in names]
        one = sum(int(np.prod(weight.part.shape(cfg))) * stacked.dtype.itemsize for weight, stacked in held)
        first = table[names[0]]
        for number, tensor in enumerate(first.names(cfg)):
            index = divmod(number, first.parts(cfg))[: 1 + first.each] if first.layered else ()
            if group and size + one > SHARD_BYTES:
                yield group
                group, size = {}, 0
            group[tensor] = functools.partial(_gather, held, index, cfg)
            size += one
    yield group


def _gather(held: list[tuple[weights.Weight, jax.Array]], index: tuple[int, ...], cfg: ModelConfig) -> np.ndarray:
    """The tensor that weights make, of one of the layers, and parts of it, that they are stacked over."""
    found = []
    for weight, stacked in held:
        x = stacked[index] if index else stacked
        if jax.process_count() > 1:
            from jax.experimental.multihost_utils import process_allgather

            x = process_allgather(x, tiled=True)
        found.append(weight.part.to_torch(np.asarray(x), cfg))
    return np.ascontiguousarray(np.concatenate(found) if len(found) > 1 else found[0])
