"""Who draws the samples of the evaluation, by name: see "Another sampler" in docs/extending.md."""

from __future__ import annotations

from collections.abc import Callable

from dail_jax.checkpoint import peft
from dail_jax.errors import UserError
from dail_jax.rundir import RunDir
from dail_jax.sample.sampler import Sampler
from dail_jax.stages.session import Session
from dail_jax.stages.train import trained_lora

Open = Callable[[Session, RunDir], Callable[[int], Sampler]]


def ours(session: Session, run_dir: RunDir) -> Callable[[int], Sampler]:
    """`sample.engine` with the adapter that `evaluate.adapter` names or that this run has trained."""
    cfg = session.config.evaluate
    lora = peft.load(cfg.adapter, session.model, session.mesh)[0] if cfg.adapter else trained_lora(session, run_dir)
    return lambda max_tokens: session.sampler(cfg.sampling, slots=cfg.slots, max_tokens=max_tokens, lora=lora)


# A function of the session and the run directory, called once. It returns a function of the largest `limit` among the
# requests to come, which returns the sampler for them.
SAMPLERS: dict[str, Open] = {"engine": ours}


def find(name: str) -> Open:
    """Raises UserError for a name that is not in SAMPLERS."""
    if name not in SAMPLERS:
        raise UserError(f"got {name!r}, want one of {', '.join(SAMPLERS)}", field="evaluate.sampler")
    return SAMPLERS[name]
