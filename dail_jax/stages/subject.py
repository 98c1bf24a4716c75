"""What the checks of a step look at before it starts: its rows, prompts, tokenizer, meshes and traces, read once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import provenance, storage
from dail_jax.data import traces as traces_lib
from dail_jax.data.prompts import PromptBuilder, RolePrompts
from dail_jax.data.records import Row
from dail_jax.data.traces import Trace
from dail_jax.errors import UserError, want_folder
from dail_jax.model import weights
from dail_jax.model.families import ModelConfig, read_config
from dail_jax.provenance import Recipe
from dail_jax.sample import server as server_lib
from dail_jax.stages import evaluate, recipes, session
from dail_jax.stages.experiment import Step
from dail_jax.stages.recipes import traces_path
from dail_jax.text import Tokenizer, load_tokenizer
from dail_jax.train import methods

_T = TypeVar("_T")

Finding = tuple[str, str] | UserError  # a row of the table, or a problem

PROMPTS = ("model", "prompts", "waypoints", "data", "generate.max_prompt_tokens")  # what prompts follow from


class Subject:
    """A step that is about to start. What several checks or steps read alike is read once, and so is what is wrong."""

    def __init__(self, step: Step, known: dict[tuple[str, str], Any], made: set[Path]):
        self.arm, self.stage, self.config = step
        self.known = known
        self.made = made  # the files that steps before this one make

    def _once(self, what: str, keys: Sequence[str], read: Callable[[], _T]) -> _T:
        """`read()`, which follows from these keys of the configuration alone."""
        key = what, json.dumps(provenance.select(self.config, *keys))
        if key not in self.known:
            try:
                self.known[key] = read()
            except UserError as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, UserError):
            raise found
        return found

    @property
    def method(self) -> methods.Method:
        return methods.find(self.config.train)

    @property
    def works(self) -> bool:
        """Whether the stage has anything to do with this configuration."""
        if self.stage == "evaluate":
            return bool(self.config.evaluate.benchmarks)
        return not self.config.traces if self.stage == "generate" else self.method.trains or self.stage == "convert"

    @property
    def server(self) -> config_lib.Server | None:
        """The server that is to draw this stage's samples, if it is one that does."""
        sampler = {"generate": self.config.generate, "evaluate": self.config.evaluate}.get(self.stage)
        return sampler.sampler if sampler and isinstance(sampler.sampler, config_lib.Server) else None

    @property
    def context(self) -> int | None:
        """The most tokens of prompt and response together that the server has room for, if it says so."""
        cfg = self.server
        assert cfg is not None
        return self._once("server", [f"{self.stage}.sampler"], lambda: server_lib.find_model(cfg)).max_model_len

    @property
    def recipe(self) -> Recipe:
        if self.stage == "evaluate":
            return recipes.evaluate(self.config, {b.name: self.table(b) for b in self.config.evaluate.benchmarks})
        if self.stage in ("generate", "train"):
            return getattr(recipes, self.stage)(self.config, self.rows)
        return getattr(recipes, self.stage)(self.config)

    @property
    def form(self) -> str | None:
        """The form in which a step holds the weights: a merged model is made of exact ones."""
        return None if self.stage == "export" and self.config.export.merged else self.config.model.quantize

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        shapes = weights.abstract(self.model, jnp.dtype(self.config.model.dtype), quantize=self.form)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of training."""
        return self._once("mesh", ["mesh"], lambda: mesh_lib.make_mesh(self.config.mesh.for_training))

    @property
    def sample_mesh(self) -> jax.sharding.Mesh:
        return self._once("sample_mesh", ["mesh"], lambda: mesh_lib.make_mesh(self.config.mesh.for_sampling))

    @property
    def model(self) -> ModelConfig:
        def read() -> ModelConfig:
            folder = storage.model(self.config.model.path)
            want_folder(folder, "a model")
            return read_config(folder)

        return self._once("model", ["model.path"], read)

    @property
    def tokenizer(self) -> Tokenizer:
        if self.config.model.tokenizer is None:
            _ = self.model  # without the folder, it is the model that is missing
        return self._once("tokenizer", ["model"], lambda: load_tokenizer(session.tokenizer_folder(self.config)))

    @property
    def builder(self) -> PromptBuilder:
        return self._once("builder", PROMPTS, lambda: session.prompt_builder(self.config, self.tokenizer))

    @property
    def rows(self) -> list[Row]:
        return self._once("rows", ["data"], lambda: recipes.rows_of(self.config))

    @property
    def prompts(self) -> list[tuple[RolePrompts, ...]]:
        """Of every row, in order, with each of its solutions."""
        return self._once("prompts", PROMPTS, lambda: self.builder.build_views(self.rows))

    @property
    def each(self) -> list[RolePrompts]:
        """The same, without regard to rows."""
        return [prompts for views in self.prompts for prompts in views]

    def longest(self, roles: Sequence[str]) -> np.ndarray:
        """For every row, the tokens of the longest of these roles' prompts."""
        return np.array([max(len(getattr(one, role)) for one in views for role in roles) for views in self.prompts])

    @property
    def traces(self) -> list[Trace] | None:
        """The traces that are trained on; None if they are not there, and a step before this one makes them."""
        path = traces_path(self.config)
        if path in self.made and not path.is_file():
            return None
        return self._once(f"traces of {path}", [], lambda: traces_lib.read(path))

    def table(self, benchmark: config_lib.Benchmark) -> list[Row]:
        """The rows of a benchmark."""
        return self._once(f"table of {benchmark.model_dump_json()}", [], lambda: recipes.read_benchmark(benchmark))

    def questions(self, benchmark: config_lib.Benchmark) -> list[list[int]]:
        """The prompts of a benchmark, of every row in order."""

        def build() -> list[list[int]]:
            return evaluate.prompts_of(self.builder, benchmark, self.table(benchmark))

        return self._once(f"questions of {benchmark.model_dump_json()}", PROMPTS, build)

    def trained_tokens(self) -> int:
        """Tokens of the responses that training learns from, at most."""
        cfg, made = self.config.train, self.config.generate
        if self.method.source == "solutions":
            return sum(len(prompts.expert) for prompts in self.each)
        found = self.traces
        if found is not None:
            return sum(len(trace.response_ids) for trace in found if trace.drop is None)
        kept = made.samples if self.config.filters.keep == "all" else min(made.samples, self.config.filters.keep)
        return len(self.rows) * kept * min(made.sampling.max_tokens, cfg.max_tokens)
