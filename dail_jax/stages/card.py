"""Model cards: README.md in `adapter/` and `merged/`, from what the run directory has on record and from nothing else.

A card names the base model, the data, the method and its settings, and the results with their intervals. It is written by
`export` and again once there are results. A card without the line MARK is somebody's own and stays as it is.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dail_jax
from dail_jax import config as config_lib
from dail_jax import provenance, strict_json
from dail_jax.data.prompts import load_template
from dail_jax.data.records import dataset_hash, read_rows
from dail_jax.errors import UserError
from dail_jax.evaluate import files, protocol
from dail_jax.rundir import read_manifest, write_atomic
from dail_jax.stages.recipes import RESULTS

NAME = "README.md"
MARK = "<!-- Written by dail_jax, which writes it anew while this line is here. -->"
KINDS = {"adapter": ("peft", "adapter"), "merged": ("transformers", "finetune")}  # the hub's library and relation

# The settings of training that a card lists, of those on record.
SHOWN = ("objective", "gamma", "kl", "loss", "reduce", "epochs", "batch_size", "max_tokens", "lora", "optimizer")
SAMPLED = ("tau", "proposals", "samples", "sampling")  # of `generate`
EVALUATED = ("samples", "sampling", "budgets", "budget", "force")

# Ranks that vLLM makes room for, by --max-lora-rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write(config: config_lib.Config) -> None:
    """Writes the card of each folder that `export` has made, unless somebody has written one of their own."""
    for folder in (Path(config.run_dir) / kind for kind in KINDS):
        card = folder / NAME
        if folder.is_dir() and (not card.exists() or MARK in card.read_text("utf-8", "replace")):
            write_atomic(card, text(config, folder.name))


def text(config: config_lib.Config, kind: str) -> str:
    """The card of `adapter` or `merged`."""
    folder = Path(config.run_dir)
    stages = read_manifest(folder).get("stages", {})
    train, base = stages["train"], base_model(config)
    title, library = config.title or folder.name, KINDS[kind][0]
    facts = {
        "base_model": base,
        "base_model_relation": base and KINDS[kind][1],
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": config.export.license,
        "datasets": _hub_datasets(config),
        "tags": ["dail_jax", train["settings"]["train"]["objective"], *["lora"] * (kind == "adapter")],
    }
    front = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items() if value]
    what = "A LoRA for" if kind == "adapter" else "A merged LoRA and"
    parts = [
        "\n".join(["---", *front, "---"]),
        MARK,
        f"# {protocol.markdown_text(title)}",
        f"{what} {protocol.markdown_text(base or _model_name(config))}, trained by the method "
        f"`{train['settings']['train']['objective']}` of dail_jax {dail_jax.__version__}.",
        *([protocol.markdown_text(config.about)] if config.about else []),
        "## What it was made of",
        _table(_made_of(config, train)),
        "## Settings",
        _table(_settings(stages)),
        "## The prompt that it was trained with",
        _fenced("\n\n".join(f"[{role}]\n{body}" for role, body in _student(config))),
        "## Results",
        _results(config, stages),
        "## Use",
        _fenced("\n".join(commands(config, kind, repository(config, kind) or kind)), "sh"),
    ]
    return "\n\n".join(parts) + "\n"


def commands(config: config_lib.Config, kind: str, place: str) -> list[str]:
    """Commands that serve the `adapter` or the `merged` model at a place with vLLM, and evaluate it with lm_eval."""
    base = base_model(config) or config.model.path
    if kind == "merged":
        serve, arguments = ["vllm", "serve", place], f"pretrained={place}"
    else:
        file = Path(config.run_dir) / kind / "adapter_config.json"
        rank = vllm_rank(strict_json.read_object(file)["r"])
        if rank is None:
            return [f"# vLLM serves adapters up to rank {VLLM_RANKS[-1]}: set export.merged=true"]
        name = re.sub(r"[^\w.-]+", "-", Path(config.run_dir).name, flags=re.ASCII)
        serve = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"{name}={place}"]
        serve += ["--max-lora-rank", str(rank)]
        arguments = f"pretrained={base},lora_local_path={place},max_lora_rank={rank}"
    grade = ["lm_eval", "--model", "vllm", "--model_args", arguments, "--tasks", "gsm8k", "--apply_chat_template"]
    return [shlex.join(serve), shlex.join([*grade, "--batch_size", "auto"])]


def vllm_rank(rank: int) -> int | None:
    """What vLLM is to make room for so that an adapter of this rank fits; None if it cannot."""
    return next((r for r in VLLM_RANKS if r >= rank), None)


def repository(config: config_lib.Config, kind: str) -> str | None:
    """The repository that a folder is uploaded to, if any."""
    return config.export.push and config.export.push + ("-merged" if kind == "merged" else "")


def base_model(config: config_lib.Config) -> str | None:
    """The base model's name on a hub: the configured one, or that of its folder in the hub's cache."""
    return config.export.base_model or provenance.hub_name(config.model.path)


# ---------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------


def _model_name(config: config_lib.Config) -> str:
    return config.model.title or Path(config.model.path).name


def _hub_datasets(config: config_lib.Config) -> list[str]:
    path = config.data.path if config.data else ""
    every = [path] if isinstance(path, str) else [source.path for source in path]
    return [name.split(":")[1] for name in every if name.startswith("hub:")]


def _made_of(config: config_lib.Config, train: Mapping[str, Any]) -> dict[str, str]:
    inputs = {name: one["sha256"] for name, one in train["inputs"].items() if one["sha256"]}
    data = config.data
    found = {"base model": f"{base_model(config) or _model_name(config)}, SHA-256 `{inputs['model.path']}`"}
    if data is not None:
        found["data"] = f"{_rows(data, inputs['data.path'])}, SHA-256 `{inputs['data.path']}`"
    versions = ", ".join(f"{name} {version}" for name, version in train["versions"].items() if version)
    place = train["place"]
    return {**found, "trained on": f"{place['devices']} x {place['device_kind']}", "packages": versions}


def _rows(data: config_lib.Data, recorded: str) -> str:
    """The names of the data's files and, if they still are what was trained on, how many rows they gave."""
    every = [data.path] if isinstance(data.path, str) else [source.path for source in data.path]
    names = ", ".join(name if name.startswith("hub:") else Path(name).name for name in every)
    try:
        rows = read_rows(data)
    except (UserError, OSError):  # the data are no longer there
        return names
    return f"{len(rows)} problems of {names}" if dataset_hash(rows) == recorded else names


def _settings(stages: Mapping[str, Any]) -> dict[str, str]:
    """The settings on record that decide what was learned, by their keys."""
    train, drawn = stages["train"]["settings"], stages.get("generate", {}).get("settings", {})
    found = {f"train.{key}": train["train"][key] for key in SHOWN}
    found |= {f"generate.{key}": drawn["generate"][key] for key in SAMPLED} if drawn else {}
    found |= {"waypoints": train["waypoints"], "filters": train["filters"], "seed": train["seed"]}
    return {key: f"`{json.dumps(value, ensure_ascii=False)}`" for key, value in found.items()}


def _student(config: config_lib.Config) -> Sequence[tuple[str, str]]:
    sections = load_template(config.prompts.student, "student").sections
    return [*sections, ("assistant", config.prompts.opening)] if config.prompts.opening else sections


def _results(config: config_lib.Config, stages: Mapping[str, Any]) -> str:
    path, record = Path(config.run_dir) / RESULTS, stages.get("evaluate", {})
    if "finished" not in record or not path.exists():
        return "It has not been evaluated in this run."
    drawn = record["settings"]["evaluate"]
    how = ", ".join(f"`{key}: {json.dumps(drawn[key])}`" for key in EVALUATED if drawn[key] not in (None, []))
    found = files.read_results(path)
    return f"{protocol.markdown({found['arm']: found})}\nSampled with {how}.".rstrip()


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


def _fenced(body: str, language: str = "") -> str:
    """A block of code, whatever it contains."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", body)), 3)
    return f"{fence}{language}\n{body}\n{fence}"
