"""Samples that are drawn offline: what to draw is written into a run's folder `vllm/`, with a script that draws it.

The sampler `offline` takes the script's rows once they are there. Forced answers follow from samples, so the script is
called a second time for them. docs/servers.md shows the steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from dail_jax import mesh as mesh_lib
from dail_jax import provenance, shapes, storage, strict_json
from dail_jax.checkpoint import base, peft
from dail_jax.data.traces import prompt_hash
from dail_jax.errors import UserError, Waiting
from dail_jax.rundir import RunDir, json_line, write_atomic
from dail_jax.sample.sampler import Request, Sample
from dail_jax.sample.server import seed_of
from dail_jax.shapes import Natural, Shape
from dail_jax.stages import card
from dail_jax.stages.session import Session, suppressed
from dail_jax.train import methods

NAME = "offline"  # the sampler's
FOLDER, DRAWN, SCRIPT = "vllm", "drawn.jsonl", "draw.py"
ANEW = "export again, delete what was drawn, and draw anew"
REQUESTS, FORCED = "requests.jsonl", "forced.jsonl"


class Row(Shape):
    """A row of drawn.jsonl: one sample."""

    name: str
    sample: Natural
    prompt_hash: str
    settings: str
    ids: Annotated[list[Natural], Field(min_length=1)]
    finish: Literal["stop", "length"]


class Offline:
    """The samples in a file. Those that are not there are written down as requests, beside the script."""

    def __init__(self, session: Session, run_dir: RunDir, drawn: Path):
        self.session, self.folder, self.drawn = session, run_dir.path / FOLDER, drawn
        self.settings = settings_of(session, run_dir)
        self.taken = 0

    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yields the samples, once all are known to be there and to be what was asked for; raises UserError."""
        requests = list(requests)
        found = self._rows(requests)
        asked = [(request, i) for request in requests for i in request.samples]
        missing = sum((request.name, i) not in found for request, i in asked)
        if missing:
            forced = all(request.name.startswith("force/") for request in requests)
            write(self.folder, self.settings, requests, FORCED if forced else REQUESTS)
            raise Waiting(
                f"{missing} of {len(asked)} {'forced answers' if forced else 'samples'} are still to be drawn: "
                f"python {self.folder / SCRIPT}, then call again",
                file=self.drawn,
            )
        for request, i in asked:
            self.taken += 1
            row = found[request.name, i]
            yield Sample(request.name, i, np.array(row.ids), row.finish)

    def figures(self) -> dict[str, float]:
        return {"imported": self.taken} if self.taken else {}

    def _rows(self, requests: Sequence[Request]) -> dict[tuple[str, int], Row]:
        """The rows of these requests, by name and sample."""
        known = {request.name: request for request in requests}
        found: dict[tuple[str, int], Row] = {}
        if not self.drawn.is_file():
            return found
        for line in strict_json.read_lines(self.drawn, torn="drop", advice=f"run {SCRIPT} again"):
            row = shapes.parse(line.value, Row, self.drawn, line.number)
            request = known.get(row.name)
            if row.settings != self.settings["hash"]:
                what = "settings", f"drawn with another model, adapter, seed or sampling: {ANEW}"
            elif request is None:
                continue  # of the samples while answers are forced, and the other way round
            elif row.prompt_hash != prompt_hash(request.prompts[0]):
                what = "prompt_hash", f"drawn from another prompt: {ANEW}"
            elif row.sample not in request.samples or (row.name, row.sample) in found:
                what = "sample", f"number {row.sample}, want each of {len(request.samples)} once"
            elif problem := self._ending(row, request.limit):
                what = "ids", problem
            else:
                found[row.name, row.sample] = row
                continue
            raise UserError(f"got a sample {what[1]}", file=self.drawn, row=line.number, field=what[0])
        return found

    def _ending(self, row: Row, limit: int) -> str | None:
        """What is wrong with the length and the end of a response."""
        stops = self.session.stops
        if len(row.ids) > limit or (row.finish == "length" and len(row.ids) < limit):
            return f"of {len(row.ids)} tokens that ended with {row.finish!r}, want at most {limit}, and all of them unless it stops"
        if any(token in stops for token in row.ids[:-1]) or (row.ids[-1] in stops) != (row.finish == "stop"):
            return f"that ended with {row.finish!r}, want an end token ({', '.join(map(str, stops))}) last if it stops, and nowhere else"
        if max(row.ids) >= self.session.model.V:
            return f"with the token id {max(row.ids)}, want ids below the model's vocabulary of {self.session.model.V}"
        return None


def opened(session: Session, run_dir: RunDir, drawn: Path | None = None) -> Callable[[int], Offline]:
    """The samples in `drawn`, or in the file that the run's script writes."""
    sampler = Offline(session, run_dir, drawn or run_dir.path / FOLDER / DRAWN)
    return lambda _: sampler


def settings_of(session: Session, run_dir: RunDir) -> dict:
    """What settings.json holds: everything that decides samples besides their prompts, and its hash."""
    config = session.config
    cfg, sampling = config.evaluate, config.evaluate.sampling
    adapter = storage.folder(cfg.adapter).absolute() if cfg.adapter else None
    shown = str(adapter) if adapter else None
    if adapter is None and methods.of(config).trains:
        adapter, shown = run_dir.path / "adapter", "../adapter"
    drawn = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "presence_penalty": sampling.presence_penalty,
        "never": list(suppressed(session.tokenizer, sampling)),
        "stop_token_ids": list(session.stops),
        "dtype": config.model.dtype,
    }
    contents = {
        "seed": config.seed,
        "model": base.model_digest(storage.model(config.model.path), run_dir.checksum),
        "adapter": adapter and peft.adapter_digest(adapter, run_dir.checksum),
    }
    rank = adapter and card.vllm_rank(peft.inspect(adapter, session.model).rank)
    if adapter and rank is None:
        most = card.VLLM_RANKS[-1]
        raise UserError(
            f"vLLM takes adapters up to rank {most}: evaluate the merged model (export.merged)", file=adapter
        )
    return {
        "model": path if storage.is_remote(path := config.model.path) else str(Path(path).absolute()),
        "adapter": shown,
        "max_lora_rank": rank,
        **drawn,
        "seed": config.seed,
        "hash": provenance.digest([drawn, contents])[:16],
    }


def write(folder: Path, settings: dict, requests: Sequence[Request], name: str) -> None:
    """Writes what is to be drawn into the file `name`, and the script unless there is one, which may have been edited.

    Only the first process does. Forced answers follow from samples, and are forgotten where these are to be drawn.
    """
    if not mesh_lib.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "name": request.name,
            "prompt_hash": prompt_hash(request.prompts[0]),
            "limit": request.limit,
            "seeds": [seed_of(settings["seed"], request.name, i) for i in request.samples],
            "prompt_ids": list(request.prompts[0]),
        }
        for request in requests
    ]
    if name == REQUESTS:
        (folder / FORCED).unlink(missing_ok=True)
    write_atomic(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
    write_atomic(folder / name, "".join(map(json_line, rows)))
    if not (folder / SCRIPT).exists():
        write_atomic(folder / SCRIPT, Path(__file__).with_name("vllm_draw.py").read_text())
