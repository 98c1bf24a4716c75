"""The samplers that evaluation can use, by name: see "Another sampler" in docs/extending.md."""

from __future__ import annotations

from collections.abc import Callable

from dail_jax import config as config_lib
from dail_jax import storage
from dail_jax.checkpoint import peft
from dail_jax.errors import registered
from dail_jax.model.lora import Lora
from dail_jax.rundir import RunDir
from dail_jax.sample.sampler import Sampler
from dail_jax.stages import offline
from dail_jax.stages.session import Session
from dail_jax.stages.train import trained_lora

Open = Callable[[Session, RunDir], Callable[[int], Sampler]]


def ours(session: Session, run_dir: RunDir) -> Callable[[int], Sampler]:
    """`sample.engine` with the adapter that `evaluate.adapter` names or that this run has trained."""
    cfg = session.config.evaluate
    if cfg.adapter:
        lora = peft.load(storage.folder(cfg.adapter), session.model, session.mesh)[0]
    else:
        lora = trained_lora(session, run_dir)
    return engine_of(session, lora)


def engine_of(session: Session, lora: Lora | None) -> Callable[[int], Sampler]:
    """Opens `sample.engine` with an adapter, or without one, under the settings of the section `evaluate`."""
    cfg = session.config.evaluate
    return lambda max_tokens: session.sampler(
        cfg.sampling, slots=cfg.slot_count, max_tokens=max_tokens, pages=cfg.pages, kv_dtype=cfg.kv_dtype, lora=lora
    )


# Each is called once, with the session and the run directory. It returns a function that is given how many tokens may
# stand behind a prompt of the coming requests, with what follows from their samples, and returns the sampler for them.
SAMPLERS: dict[str, Open] = {"engine": ours, offline.NAME: offline.opened}


def find(which: str | config_lib.Server) -> Open:
    """The sampler of that name, or a server; raises UserError for a name that is not registered."""
    if isinstance(which, config_lib.Server):
        return lambda session, run_dir: lambda _: session.served(which, session.config.evaluate.sampling)
    return registered(SAMPLERS, which, "evaluate.sampler")
