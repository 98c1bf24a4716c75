"""run and sweep: all stages in order, for a configuration or for each of its arms."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from dail_jax import config as config_lib
from dail_jax.errors import UserError
from dail_jax.metrics import log
from dail_jax.stages import evaluate, export, generate, names, recipes, report, samplers, train
from dail_jax.train import methods


def run(config: config_lib.Config) -> None:
    """generate, train, export, evaluate, report: for the run itself, or for each of its arms."""
    arms = {name: arm(config, name) for name in config.arms} or {"": config}
    for one in arms.values():
        names.check(one)
        samplers.find(one.evaluate.sampler)
        recipes.check(one, has_traces=bool(one.traces) and one.traces != _shared_traces(config))
    if any(a.traces for a in arms.values()) or (not config.arms and reads_traces(config)):
        generate.run(config)
    for name, one in arms.items():
        if name:
            log(f"\n== {name} ==")
            if reads_traces(one) and not one.traces:
                generate.run(one)
        train.run(one)
        export.run(one)  # before evaluation, whose sampler may need the adapter
        evaluate.run(one, table=False)  # the report's has all arms
    log("")
    report.run(config)


def arm(config: config_lib.Config, name: str) -> config_lib.Config:
    """An arm's own configuration: in RUN_DIR/NAME, on the parent's traces unless the arm changes how they are made."""
    changes = config.arms[name] or {}
    source = f"arms.{name}"
    own = config_lib.with_overrides(
        config,
        {"arms": {}, "run_dir": str(Path(config.run_dir) / name), "title": None, "about": "", **changes},
        source,
    )
    made = ("seed", "model", "data", "prompts", "generate", "filters")
    same = all(getattr(own, section) == getattr(config, section) for section in made)
    same &= methods.of(own).rationalises == methods.find(config.train).rationalises
    if same and reads_traces(own) and not own.traces:
        own = config_lib.with_overrides(own, {"traces": _shared_traces(config)}, source)
    return own


def _shared_traces(config: config_lib.Config) -> str:
    return str(Path(config.run_dir) / recipes.TRACES)


def reads_traces(config: config_lib.Config) -> bool:
    """Whether the stage `generate` comes before training."""
    return methods.of(config).reads_traces(config.train)


def sweep(config: config_lib.Config, over: Sequence[str]) -> None:
    """`run` with an arm for each combination of values, instead of the configuration's own arms."""
    run(config_lib.with_overrides(config, {"arms": combinations(over)}, "--over"))


def combinations(over: Sequence[str]) -> dict[str, dict]:
    """Arms from texts `key=a,b,c`, named by the keys' last parts, such as `gamma=0.1,tau=0.8`."""
    axes = {}
    for text in over:
        key, equals, values = text.partition("=")
        axes[key] = config_lib.parse_yaml(f"[{values}]", f"--over {key}") if equals and key else []
        if not axes[key]:
            raise UserError(f"got --over {text!r}, want key=a,b,c")
    last = [key.rpartition(".")[2] for key in axes]
    labels = last if len(set(last)) == len(last) else list(axes)
    arms = {}
    for values in itertools.product(*axes.values()):
        name = ",".join(f"{label}={value}" for label, value in zip(labels, values, strict=True))
        name = re.sub(r"[^\w.,=-]+", "-", name, flags=re.ASCII)
        if name in arms:
            raise UserError(f"got the values of arm {name!r} twice", field="--over")
        arms[name] = dict(zip(axes, values, strict=True))
    return arms
