"""run and sweep: all stages in order, for a configuration or for each of its arms."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dail_jax import config as config_lib
from dail_jax.data import traces
from dail_jax.errors import UserError, UserErrors, Waiting
from dail_jax.metrics import log
from dail_jax.stages import drops, evaluate, export, generate, recipes, report, train
from dail_jax.train import methods


class Step(NamedTuple):
    """A stage with its configuration; `arm` is empty for the run itself."""

    arm: str
    stage: str
    config: config_lib.Config


STAGES = ("generate", "train", "export", "evaluate")  # evaluation's sampler may need the exported adapter


def steps(config: config_lib.Config) -> list[Step]:
    """What `run` goes through before its report: every stage of the run itself, or of each of its arms."""
    arms = {name: arm(config, name) for name in config.arms} or {"": config}
    shared = any(one.traces == _shared_traces(config) for one in arms.values())
    found = [Step("", "generate", config)] if config.arms and shared else []
    for name, one in arms.items():
        own = reads_traces(one) and not one.traces
        found += [Step(name, stage, one) for stage in STAGES if own or stage != "generate"]
    return found


def run(config: config_lib.Config) -> None:
    """generate, train, export, evaluate, report: for the run itself, or for each of its arms.

    An arm whose samples have to wait, such as for a server that does not have its adapter yet, holds up no other.
    """
    before, waiting = "", []
    todo = steps(config)
    for i, (name, stage, one) in enumerate(todo):
        if name != before:
            log(f"\n== {name} ==")
            before = name
        if stage == "generate":
            generate.run(one)
            _refuse_empty(one, [later.config for later in todo[i + 1 :] if later.stage == "train"])
        elif stage == "train":
            train.run(one)
        elif stage == "export":
            export.run(one, push=False)  # the card has no results yet
        else:
            try:
                evaluate.run(one, table=False)  # the report's has all arms
            except Waiting as error:
                log(str(error))
                waiting.append(error)
    if waiting:
        raise UserErrors(waiting)
    log("")
    report.run(config)
    for one in [arm(config, name) for name in config.arms] or [config]:
        export.upload(one)


def _refuse_empty(config: config_lib.Config, later: Sequence[config_lib.Config]) -> None:
    """Raises UserError if an arm would find nothing to train on in the traces that `config` has just made."""
    path = recipes.traces_path(config)
    readers = [one for one in later if reads_traces(one) and recipes.traces_path(one) == path]
    if path.is_file() and any(drops.filters_of(one) == drops.filters_of(config) for one in readers):
        found = traces.read(path)
        if all(trace.drop for trace in found):
            raise UserError(drops.nothing_left(found, 0, config), file=path)


def arm(config: config_lib.Config, name: str) -> config_lib.Config:
    """An arm's own configuration: in RUN_DIR/NAME, on the parent's traces unless the arm changes how they are made."""
    changes = config.arms[name] or {}
    source = f"arms.{name}"
    own = {"arms": {}, "run_dir": str(Path(config.run_dir) / name), "title": None, "about": ""}
    if config.export.push:
        own["export.push"] = f"{config.export.push}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
    own = config_lib.with_overrides(config, {**own, **changes}, source)
    rationalises = methods.of(own).rationalises
    made = ("seed", "model", "data", "prompts", "generate", *["filters"] * rationalises)
    same = all(getattr(own, section) == getattr(config, section) for section in made)
    same &= rationalises == methods.find(config.train).rationalises
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
    run(swept(config, over))


def swept(config: config_lib.Config, over: Sequence[str]) -> config_lib.Config:
    """The configuration with these arms."""
    return config_lib.with_overrides(config, {"arms": combinations(over)}, "--over")


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
