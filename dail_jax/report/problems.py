"""The problems that stand beside samples and traces: their texts, solutions and waypoints, read from the data again.

A report is often made when the data are no longer there, or no longer the same: then the page says so instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from dail_jax import config as config_lib
from dail_jax.data import waypoints
from dail_jax.data.records import Row, dataset_hash, read_rows
from dail_jax.errors import UserError
from dail_jax.report.collect import MAX_ANSWER, MAX_TEXT, Run, TraceFile, clip, setting

TRAINING = "data"  # the key of the problems that are trained on; others have their benchmark's


@dataclass
class ProblemSet:
    """The rows of one dataset that the page shows, by problem_id. `missing` says why there are none."""

    count: int | None = None  # of expert solutions, in all rows
    missing: str = ""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


class Problems:
    """The datasets of some runs; each is read once, however many runs it serves."""

    def __init__(self, runs: Iterable[Run], traces: Iterable[TraceFile]):
        self.runs = list(runs)
        self.sets: list[ProblemSet] = []
        self._found: dict[str, tuple[int, dict[str, Row]]] = {}
        for i, run in enumerate(self.runs):
            for sample in run.samples:
                sample["set"] = self._add(i, sample["benchmark"], sample["problem_id"])
        for trace in traces:
            owner = next((i for i, run in enumerate(self.runs) if setting(run.config, TRAINING)), 0)
            for row in trace.rows:
                row["set"] = self._add(owner if trace.owner is None else trace.owner, TRAINING, row["problem_id"])

    def solutions(self, run: int) -> int | None:
        """How many expert solutions a run was given; None if that is not known."""
        return self.sets[self._index(run, TRAINING)[0]].count

    def _add(self, run: int, name: str, problem_id: str) -> int:
        """The index of the set that holds a problem, which is now among the rows to show."""
        index, rows = self._index(run, name)
        if problem_id in rows and problem_id not in self.sets[index].rows:
            self.sets[index].rows[problem_id] = _shown(rows[problem_id], self.runs[run].config)
        return index

    def _index(self, run: int, name: str) -> tuple[int, dict[str, Row]]:
        config, manifest = self.runs[run].config, self.runs[run].manifest
        listed = setting(config, "evaluate.benchmarks") or ()
        tree = (
            config.get(TRAINING) if name == TRAINING else next((b["rows"] for b in listed if b["name"] == name), None)
        )
        key = f"{tree} {setting(config, 'waypoints')}"
        if key not in self._found:
            self._found[key] = len(self.sets), {}
            self.sets.append(ProblemSet())
            try:
                rows = _read(tree, name)
                _refuse_others(rows, manifest, name)
                self._found[key][1].update((clip(row.problem_id, MAX_ANSWER), row) for row in rows)
                self.sets[-1].count = sum(len(row.views) for row in rows)
            except (UserError, OSError) as error:
                self.sets[-1].missing = clip(str(error), MAX_ANSWER)
        return self._found[key]


def _read(tree: Any, name: str) -> list[Row]:
    try:
        dataset = (config_lib.Data if name == TRAINING else config_lib.Dataset).model_validate(tree)
    except ValidationError:  # there is no such section, or another version wrote it
        raise UserError("the run directory's config.yaml does not say where they were read from") from None
    return read_rows(dataset, ("problem",))


def _refuse_others(rows: list[Row], manifest: Mapping[str, Any], name: str) -> None:
    """Raises UserError if a stage has recorded that it read other rows."""
    key = "data.path" if name == TRAINING else f"evaluate.benchmarks.{name}.rows"
    inputs = [one.get("inputs", {}).get(key) for one in manifest.get("stages", {}).values()]
    recorded = {one["sha256"] for one in inputs if one}
    if recorded and dataset_hash(rows) not in recorded:
        raise UserError("the file has changed since the run")


def _shown(row: Row, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the page gets of a row."""
    try:
        cfg = config_lib.Waypoints.model_validate(config.get("waypoints") or {})
        found = [waypoints.waypoints(view, cfg) for view in row.views if view.solution]
    except (ValidationError, UserError):  # an extractor that is not registered here
        found = [[] for view in row.views if view.solution]
    solutions = [view.solution for view in row.views if view.solution]
    return {
        "before": [[message.role, clip(message.content, MAX_TEXT)] for message in row.before],
        "problem": clip(row.problem, MAX_TEXT),
        "choices": [clip(choice, MAX_ANSWER) for choice in row.choices],
        "solutions": [
            {"text": clip(text, MAX_TEXT), "waypoints": [clip(one, MAX_ANSWER) for one in own]}
            for text, own in zip(solutions, found, strict=True)
        ],
        "answer": clip(waypoints.final_answer(row) or "", MAX_ANSWER),
    }
