"""The report's charts as PNG and SVG files, for papers and slides."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

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
COLOURS = tuple(light for light, _ in charts.COLOURS)
INK, SOFT = "#1d2127", "#5b6472"
# Dashes and markers go with colours, so that curves can be told apart in grey and by readers who see fewer colours.
DASHES = ((), (5, 2), (6, 2, 1.5, 2), (1.5, 1.5), (9, 2), (3, 3), (4, 1.5, 1, 1.5, 1, 1.5), (8, 2, 3, 2))
MARKERS = "os^oDvPX"
HOLLOW = charts.PLACES[charts.UNTRAINED]  # the untrained model's markers are rings around what it coincides with
COLUMNS = 3
SHORT = 16  # characters at most of a name that stands beside its curve
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.edgecolor": "#8b929e",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
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
            figure = _figure(list(group), charts.CAPTIONS[section])
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                written.append(folder / (FILES[section] + suffix))
                figure.savefig(written[-1], dpi=200, metadata=metadata)
    return written


def _figure(panels: Sequence[charts.Chart], caption: str) -> Figure:
    """Panels in rows, a new one for each variant, with a caption below them."""
    variants = [[p for p in panels if p.variant == name] for name in dict.fromkeys(p.variant for p in panels)]
    columns = min(COLUMNS, max(map(len, variants)))
    lines = [group[i : i + columns] for group in variants for i in range(0, len(group), columns)]
    longest = max(len(series.name) for chart in panels for series in chart.series)
    entry = 0.7 + 0.085 * longest  # inches that a name takes in a legend
    width = max(3.5 * columns, entry)
    figure = Figure(figsize=(width, 2.6 * len(lines) + 0.5), layout="constrained")
    notes = dict.fromkeys(chart.note for chart in panels)
    named = all(map(charts.ends_together, panels)) and longest <= SHORT
    for row, line in zip(figure.subplots(len(lines), columns, squeeze=False), lines, strict=True):
        for ax, chart in itertools.zip_longest(row, line):
            if chart is None:
                ax.set_axis_off()
            else:
                _panel(ax, chart, chart.note if len(notes) > 1 else "")
                if named and len({series.name for one in panels for series in one.series}) > 1:
                    _names(ax, chart)
    handles = {
        label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if len(handles) > 1 and not named:
        fitting = min(len(handles), int(width / entry))
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=fitting)
    common = "".join(f" {note}." for note in notes if note and len(notes) == 1)
    text = textwrap.fill(caption + common, 64 * columns)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color=SOFT)
    return figure


def _panel(ax: Axes, chart: charts.Chart, note: str) -> None:
    for series in chart.series:
        _curve(ax, chart, series)
    ax.set_title(chart.title, loc="left", pad=16 if note else 6)
    ax.annotate(note, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=7.5, color=SOFT)
    ax.set(xlabel=chart.x, ylabel=chart.y)
    if chart.log_y:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if chart.span[1] < 50 * chart.span[0] else (1.0,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    if chart.percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    ax.set_ylim(*chart.span)
    if chart.log_x:
        ticks = sorted({point[0] for series in chart.series for point in series.points})
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 8)]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())


def _curve(ax: Axes, chart: charts.Chart, series: charts.Series) -> None:
    place = max(series.colour, 0)
    colour = INK if series.colour == charts.SHARED else COLOURS[place % len(COLOURS)]
    dashes = DASHES[(place + place // len(DASHES)) % len(DASHES)]
    # Of curves that coincide the more broken one is above, and a ring is above what it is around.
    order = 2.0 + DASHES.index(dashes) / 10 + (place == HOLLOW)
    style: dict[str, Any] = {"color": colour, "linestyle": (0, dashes) if dashes else "-", "zorder": order}
    style["label"] = series.name
    x, y, low, high = zip(*series.points, strict=True)
    if chart.kind == "step":
        ax.plot((x[0], *x), (0.0, *y), drawstyle="steps-post", linewidth=1.5, **style)
        return
    if chart.kind == "marked":
        ring = place == HOLLOW
        style |= {"marker": MARKERS[place % len(MARKERS)], "markersize": 6.5 if ring else 4, "clip_on": False}
        style |= {"markerfacecolor": "none" if ring else colour, "markeredgewidth": 1.2 if ring else 0.5}
    if len(x) > 1:
        ax.fill_between(x, low, high, alpha=0.14, linewidth=0, color=colour)
    else:
        ax.vlines(x, low, high, linewidth=1.2, color=colour)
    if series.smooth:
        ax.plot(x, y, linewidth=0.6, alpha=0.35, color=colour)
    ax.plot(x, series.smooth or y, linewidth=1.5, **style)
    for end, ends, marker, beyond in ((1, high, "^", 1), (0, low, "v", -1)):  # what the axis leaves out
        edge = chart.span[end]
        outside = [at for at, value in zip(x, ends, strict=True) if beyond * value > beyond * edge]
        if outside:
            edges = [edge] * len(outside)
            ax.plot(outside, edges, marker=marker, color=colour, linestyle="", markersize=4, clip_on=False)


def _names(ax: Axes, chart: charts.Chart) -> None:
    """Writes the name of each curve beside its end."""
    if chart.title.endswith(f": {chart.series[0].name}"):
        return
    low, high = chart.span
    heights = [s.smooth[-1] if s.smooth else s.points[-1][1] for s in chart.series]
    ends = [(s.points[-1][0], min(max(y, low), high)) for s, y in zip(chart.series, heights, strict=True)]
    wanted = [float(ax.transLimits.transform(ax.transScale.transform(end))[1]) for end in ends]
    for series, end, height in zip(chart.series, ends, charts.labels(wanted, 0.08, 0.0, 1.0), strict=True):
        colour = COLOURS[max(series.colour, 0) % len(COLOURS)]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 3}
        where: Any = {"xytext": (1.04, height), "textcoords": "axes fraction", "va": "center", "fontsize": 8}
        ax.annotate(series.name, end, arrowprops=line, color=INK, annotation_clip=False, **where)
