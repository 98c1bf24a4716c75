"""What several stages need: the meshes, the frozen model, its tokenizer and the prompts of the roles."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax import storage
from dail_jax.checkpoint import base
from dail_jax.data.prompts import PromptBuilder
from dail_jax.errors import UserError
from dail_jax.model import lora as lora_lib
from dail_jax.model import weights
from dail_jax.model.families import ModelConfig, read_config
from dail_jax.model.lora import Lora
from dail_jax.sample import engine, mixture, server
from dail_jax.stages import auto
from dail_jax.text import Tokenizer, load_tokenizer, stop_ids


@dataclass(frozen=True)
class Session:
    """A model, its tokenizer and its prompts. Open one with `open_session`."""

    config: config_lib.Config
    mesh: jax.sharding.Mesh  # of training, which adapters live on
    sample_mesh: jax.sharding.Mesh
    model: ModelConfig
    tokenizer: Tokenizer
    prompts: PromptBuilder
    stops: tuple[int, ...]

    @property
    def params(self) -> weights.Params:
        """The frozen weights as training wants them; loaded at first use, once per process."""
        return frozen(*_form(self.config), self.mesh, stacked=True)

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
        pages: float | None = None,
        kv_dtype: str | None = None,
        tau: float = 0.0,
        proposals: int = 1,
        roles: int = 1,
        lora: Lora | None = None,
    ) -> engine.Engine:
        """A sampler of this model; `sampling.suppress` names tokens that are never drawn.

        While one exists, so do the weights in the layout of sampling: let it go before training goes on.
        """
        return engine.Engine(
            frozen(*_form(self.config), self.sample_mesh, stacked=False),
            self.model,
            self.sample_mesh,
            self.stops,
            self.config.seed,
            slots,
            max_tokens,
            mixture.sampling_params(sampling, tau, proposals),
            roles,
            lora and lora_lib.moved(lora, self.sample_mesh),
            suppressed(self.tokenizer, sampling),
            min(self.tokenizer.size, self.model.V),
            pages,
            kv_dtype,
        )

    def served(self, cfg: config_lib.Server, sampling: config_lib.Sampling, scored: bool = False) -> server.Server:
        """A sampler of what a server serves; `scored` asks for log-probabilities. Raises UserError if it has no such
        model."""
        server.find_model(cfg)
        never = suppressed(self.tokenizer, sampling)
        return server.Server(cfg, sampling, self.tokenizer, self.stops, self.config.seed, never, scored)


def open_session(config: config_lib.Config) -> Session:
    """Reads everything about a model except its weights; raises UserError.

    Meshes and slots that are still `auto` are chosen for this configuration alone.
    """
    config = auto.settled(config, auto.stages_of(config))
    if config.model.dtype == "float32":  # otherwise GPUs and TPUs multiply in fewer bits
        jax.config.update("jax_default_matmul_precision", "highest")
    mesh, sample_mesh = (mesh_lib.make_mesh(one) for one in (config.mesh.for_training, config.mesh.for_sampling))
    model, tokenizer = read_config(storage.model(config.model.path)), load_tokenizer(tokenizer_folder(config))
    stops = stops_of(config, model, tokenizer)
    return Session(config, mesh, sample_mesh, model, tokenizer, prompt_builder(config, tokenizer), stops)


def tokenizer_folder(config: config_lib.Config) -> Path:
    return storage.model(config.model.tokenizer or config.model.path)


def stops_of(config: config_lib.Config, model: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token ids that end a reply; raises UserError if these, or any others, have no row in the embedding."""
    if tokenizer.size > model.V:
        raise UserError(
            f"got token ids up to {tokenizer.size - 1}, want below the model's {model.V} embedding rows",
            file=tokenizer_folder(config),
        )
    stops = stop_ids(storage.model(config.model.path), tokenizer)
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


@dataclass
class _Held:
    """The frozen weights in one layout, of which they exist only once."""

    form: tuple[str, str, str | None]
    mesh: jax.sharding.Mesh
    stacked: bool
    params: weights.Params


_held: _Held | None = None


def frozen(folder: str, dtype: str, quantize: str | None, mesh: jax.sharding.Mesh, stacked: bool) -> weights.Params:
    """The weights of a model on a mesh, stacked over layers or with one array per layer.

    Loaded once per process; afterwards they only change their layout, on the devices. Callers hold them no longer than
    they need them, since the layout before is let go only when nobody holds it.
    """
    global _held
    form = folder, dtype, quantize
    if _held is None or (_held.form, set(_held.mesh.devices.flat)) != (form, set(mesh.devices.flat)):
        _held = None
        _held = _Held(form, mesh, True, base.load(storage.model(folder), mesh, dtype, quantize)[0])
    if (_held.mesh, _held.stacked) != (mesh, stacked):
        params, _held = _held.params, None
        with jax.ensure_compile_time_eval():  # a loss may be asked for while JAX traces
            params = weights.moved(params, read_config(storage.model(folder)), mesh, stacked, quantize)
        _held = _Held(form, mesh, stacked, params)
    return jax.tree.map(lambda x: x, _held.params)  # a tree of the caller's own, which no change of layout empties
