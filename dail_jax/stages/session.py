"""What several stages need: the mesh, the frozen model, its tokenizer and the prompts of the roles."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import jax

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.checkpoint import base
from dail_jax.data.prompts import PromptBuilder
from dail_jax.errors import UserError
from dail_jax.model import weights
from dail_jax.model.families import ModelConfig, read_config
from dail_jax.sample import engine, mixture, server
from dail_jax.text import Tokenizer, load_tokenizer, stop_ids


@dataclass(frozen=True)
class Session:
    """A model, its tokenizer and its prompts. Open one with `open_session`."""

    config: config_lib.Config
    mesh: jax.sharding.Mesh
    model: ModelConfig
    tokenizer: Tokenizer
    prompts: PromptBuilder
    stops: tuple[int, ...]

    @property
    def params(self) -> weights.Params:
        """The frozen weights; loaded at first use, once per process."""
        return _weights(*_form(self.config), self.mesh)

    def in_form(self, quantize: str | None) -> Session:
        """The same model with its weights in another form: `int8`, or None for exact ones."""
        config = config_lib.with_overrides(self.config, {"model.quantize": quantize}, "model.quantize")
        return dataclasses.replace(self, config=config)

    def sampler(
        self,
        sampling: config_lib.Sampling,
        *,
        slots: int,
        max_tokens: int,
        tau: float = 0.0,
        proposals: int = 1,
        roles: int = 1,
        lora=None,
    ) -> engine.Engine:
        """A sampler of this model; `sampling.suppress` names tokens that are never drawn."""
        return engine.Engine(
            decoding_weights(*_form(self.config), self.mesh),
            self.model,
            self.mesh,
            self.stops,
            self.config.seed,
            slots,
            max_tokens,
            mixture.sampling_params(sampling, tau, proposals),
            roles,
            lora,
            suppressed(self.tokenizer, sampling),
            min(self.tokenizer.size, self.model.V),
        )

    def served(self, cfg: config_lib.Server, sampling: config_lib.Sampling, scored: bool = False) -> server.Server:
        """A sampler of what a server serves; `scored` asks for log-probabilities. Raises UserError if it has no such
        model."""
        server.find_model(cfg)
        never = suppressed(self.tokenizer, sampling)
        return server.Server(cfg, sampling, self.tokenizer, self.stops, self.config.seed, never, scored)


def open_session(config: config_lib.Config) -> Session:
    """Reads everything about a model except its weights; raises UserError."""
    if config.model.dtype == "float32":  # otherwise GPUs and TPUs multiply in fewer bits
        jax.config.update("jax_default_matmul_precision", "highest")
    mesh = mesh_lib.make_mesh(config.mesh)
    model, tokenizer = read_config(config.model.path), load_tokenizer(tokenizer_folder(config))
    stops = stops_of(config, model, tokenizer)
    return Session(config, mesh, model, tokenizer, prompt_builder(config, tokenizer), stops)


def tokenizer_folder(config: config_lib.Config) -> str:
    return config.model.tokenizer or config.model.path


def stops_of(config: config_lib.Config, model: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token ids that end a reply; raises UserError if these, or any others, have no row in the embedding."""
    if tokenizer.size > model.V:
        raise UserError(
            f"got token ids up to {tokenizer.size - 1}, want below the model's {model.V} embedding rows",
            file=tokenizer_folder(config),
        )
    stops = stop_ids(config.model.path, tokenizer)
    if stops[-1] >= model.V:
        raise UserError(
            f"got the end token {stops[-1]}, want one below the model's {model.V} embedding rows",
            file=config.model.path,
            field="eos_token_id",
        )
    return stops


def suppressed(tokenizer: Tokenizer, sampling: config_lib.Sampling) -> tuple[int, ...]:
    """The ids of the tokens that are never drawn; raises UserError for a text that is not a single token."""
    never = []
    for text in sampling.suppress:
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise UserError(f"got {text!r}, which is {len(ids)} tokens, want a single token", field="sampling.suppress")
        never.append(ids[0])
    return tuple(never)


def prompt_builder(config: config_lib.Config, tokenizer: Tokenizer) -> PromptBuilder:
    """The prompts of a configuration's roles."""
    policy = config.data.special_tokens if config.data else "text"
    return PromptBuilder(tokenizer, config.prompts, config.waypoints, policy, config.generate.max_prompt_tokens)


def _form(config: config_lib.Config) -> tuple[str, str, str | None]:
    """Which weights a configuration names, and in which form."""
    return config.model.path, config.model.dtype, config.model.quantize


@functools.lru_cache(maxsize=1)
def _weights(folder: str, dtype: str, quantize: str | None, mesh: jax.sharding.Mesh) -> weights.Params:
    return base.load(Path(folder), mesh, dtype, quantize)[0]


@functools.lru_cache(maxsize=1)
def decoding_weights(folder: str, dtype: str, quantize: str | None, mesh: jax.sharding.Mesh) -> weights.Params:
    """The weights with one array per layer, for decoding."""
    return jax.jit(weights.unstack, static_argnums=1)(_weights(folder, dtype, quantize, mesh), read_config(folder))


def release_decoding() -> None:
    """Releases the copy of the weights that only sampling uses."""
    decoding_weights.cache_clear()
