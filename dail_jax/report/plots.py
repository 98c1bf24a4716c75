"""The report's charts as PNG and SVG files, for papers and slides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from dail_jax.errors import writing
from dail_jax.report import charts, collect

FILES = {
    "pass": "pass_at_k",
    "budget": "accuracy_by_tokens",
    "lengths": "token_lengths",
    "training": "training",
    "traces": "traces",
    "tau": "tau",
}
# The colours of page.css in its light scheme; the dashes distinguish curves where there are more runs than colours.
COLOURS = ("#2463c4", "#d1620a", "#16806a", "#a3388f", "#8a6d00", "#5b6472", "#c22f3d", "#3f8fb8")
DASHES = ("-", "--", "-.", ":")
COLUMNS = 3
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.edgecolor": "#8b929e",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "svg.hashsalt": "dail_jax",
    "axes.axisbelow": True,
    "text.parse_math": False,  # the name of a run may contain dollar signs
}


def write(runs: Mapping[str, Path], folder: Path, traces: Path | None = None) -> list[Path]:
    """Draws one figure for each kind of chart that there are data for; returns the files, a PNG and an SVG of each."""
    return draw(charts.build(*collect.read(runs, traces)), folder)


def draw(found: Sequence[charts.Chart], folder: Path) -> list[Path]:
    """Figures with one panel per chart, written as FOLDER/NAME.png and .svg; equal charts give equal bytes."""
    written = []
    with writing(folder), matplotlib.rc_context(STYLE):
        folder.mkdir(parents=True, exist_ok=True)
        for section, group in itertools.groupby(found, key=lambda chart: chart.section):
            panels = list(group)
            columns = min(COLUMNS, len(panels))
            rows = math.ceil(len(panels) / columns)
            figure = Figure(figsize=(3.6 * columns, 2.8 * rows + 0.4), layout="constrained")
            axes = figure.subplots(rows, columns, squeeze=False).ravel()
            for ax, chart in itertools.zip_longest(axes, panels):
                if chart is None:
                    ax.set_axis_off()
                else:
                    _panel(ax, chart)
            handles = {
                label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
            }
            figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=min(len(handles), 6))
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                written.append(folder / (FILES[section] + suffix))
                figure.savefig(written[-1], dpi=200, metadata=metadata)
    return written


def _panel(ax: Axes, chart: charts.Chart) -> None:
    for series in chart.series:
        place = max(series.colour, 0)  # what all runs share has the first colour
        style: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
        }
        x, y, low, high = zip(*series.points, strict=True)
        if chart.kind == "step":
            ax.stairs(y[:-1], x, fill=True, alpha=0.12, linewidth=0, color=style["color"])
            ax.stairs(y[:-1], x, label=series.name, linewidth=1.3, **style)
            continue
        ax.plot(
            x,
            y,
            label=series.name,
            linewidth=1.4,
            marker="o" if chart.kind == "marked" else None,
            markersize=3.5,
            **style,
        )
        if len(x) > 1:
            ax.fill_between(x, low, high, alpha=0.14, linewidth=0, color=style["color"])
        else:
            ax.vlines(x, low, high, linewidth=1.2, color=style["color"])
    ax.set(title=f"{chart.title} ({chart.variant})" if chart.variant else chart.title, xlabel=chart.x, ylabel=chart.y)
    if chart.percent:
        ax.set_ylim(0, 1.02 * ax.get_ylim()[1])
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if chart.log_x:
        ticks = sorted({point[0] for series in chart.series for point in series.points})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks[:: math.ceil(len(ticks) / 8)])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
