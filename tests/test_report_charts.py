"""What the page and the plots show of a chart: smoothing, scales, colours, labels; and how a figure is laid out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from dail_jax.evaluate.files import UNTRAINED
from dail_jax.report import charts, collect, page, plots
from dail_jax.train import methods


def run_of(name, objective="", metrics=None, cells=None, lengths=None):
    results = {"objective": objective, "benchmarks": cells or {}}
    return collect.Run(name, Path(name), {}, "", {}, results, {"train": metrics or {}}, lengths or {}, [], 0)


def test_smoothing_follows_the_mean_and_not_the_noise():
    line = np.linspace(3, 1, 400)
    noisy = line + 0.3 * np.random.default_rng(0).normal(size=400)
    found = np.array(charts.smooth(noisy.tolist()))
    assert (found - line)[20:-20].std() < 0.1 < 0.28 < (noisy - line).std()
    assert charts.smooth((line + np.resize([0.3, -0.3], 400)).tolist())[:3] == pytest.approx(line[:3], abs=0.06)
    assert np.abs(found - line)[[0, -1]].max() < 0.2  # no end is pulled towards the middle, or follows one value
    assert found[200] == pytest.approx(noisy[184:217].mean())
    spiked = noisy.copy()
    spiked[200] = 900.0  # which the curve behind shows
    assert np.abs(np.array(charts.smooth(spiked.tolist())) - found).max() < 0.1
    turns = np.where(np.arange(400) % 5 < 4, 0.001, 0.05)  # batches of two lengths
    assert np.mean(charts.smooth(turns.tolist())) == pytest.approx(turns.mean(), rel=0.02)
    knee = np.concatenate([np.linspace(2, 0.02, 390), np.linspace(0.02, 0.01, 10)])
    bent = charts.smooth((knee * (1 + 0.5 * np.random.default_rng(1).random(400))).tolist())
    assert bent[-1] >= 0.01  # an end is no lower than the values that it stands for
    rate = np.concatenate([np.linspace(0, 1, 50), np.linspace(1, 0, 350)])
    assert charts.smooth(rate.tolist()) == [] and charts.smooth([1.0, 5.0] * 9) == []


def test_long_curves_keep_their_extremes_and_their_means():
    values = np.sin(np.arange(1000)) + np.linspace(4, 1, 1000)
    values[500] = 40.0
    series = charts.curve("a", 0, [*enumerate(values.tolist()), (1000, float("nan"))])
    assert len(series.points) == len(series.smooth) == 200 and max(high for *_, high in series.points) == 40
    assert series.points[-1][0] == 999 and series.smooth[50] == pytest.approx(np.linspace(4, 1, 1000)[252], abs=0.15)


x = np.linspace(0, 1, 100)


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ([], "linear"),
        ([2 - x], "linear"),
        ([2 - x, 1.5 - x], "linear"),
        ([np.exp(-7 * x)], "log"),  # over three decades
        ([1.001 - x], "linear"),  # but for its end
        ([np.exp(-7 * x) - 1], "linear"),
        ([20 - 10 * x, 1 - 0.5 * x], "log"),  # the first flattens the second
        ([20 - 10 * x, 1 - 1.5 * x], "apart"),  # which a logarithm cannot show
        ([20 - 10 * x, -0.2 - 0.5 * x], "apart"),
        ([20 - 10 * x, np.full(100, 1.0)], "linear"),  # nothing is lost of what does not vary
        ([1000 - 10 * x, 1000 - 0.5 * x], "linear"),  # nor of what varies little
        ([2 - x, np.array([])], "linear"),
    ],
)
def test_scales(curves, expected):
    assert charts.scale(curves) == expected


def test_an_arm_that_flattens_the_others_is_shown_apart():
    def metrics(values):
        return {"loss": dict(enumerate(values.tolist(), 1)), "grad_norm": dict(enumerate((values + 0.6).tolist(), 1))}

    runs = [run_of("nll", metrics=metrics(20 - 10 * x)), run_of("dail", metrics=metrics(-0.2 - 0.3 * x))]
    found = {c.title: c for c in charts.build(runs, [])}
    assert list(found) == ["Loss: nll", "Loss: dail", "Gradient norm"]
    low, high = found["Loss: dail"].span
    assert -0.53 < low < -0.5 and -0.2 < high < -0.18
    assert found["Gradient norm"].log_y and [s.name for s in found["Gradient norm"].series] == ["nll", "dail"]
    assert not found["Loss: nll"].log_y and found["Loss: nll"].span[1] > 20


def test_one_outlier_does_not_flatten_a_curve():
    values = [1 + 0.2 * np.sin(i) for i in range(200)]
    values[70] = 500.0
    values[71] = -3.0
    low, high = charts.span([charts.curve("a", 0, list(enumerate(values)))])
    assert 0.7 < low < 0.8 and 1.2 < high < 1.3
    values[70] = values[71] = 1.3  # which takes little room
    assert charts.span([charts.Series("a", 0, charts.thin(list(enumerate(values))))])[1] > 1.3
    steep = charts.curve("a", 0, list(enumerate((9 * np.exp(-np.arange(300) / 9)).tolist())))
    assert not steep.smooth and charts.span([steep])[1] > 9  # no outlier: what has no noise is followed
    assert charts.span([charts.Series("a", 0, [(1, 2.0, 2.0, 2.0)])]) == (1.8, 2.2)
    low, high = charts.span([charts.Series("a", 0, [(1, 1.0, 1.0, 1.0), (2, 100.0, 100.0, 100.0)])], log=True)
    assert 0.8 < low < 1 and 100 < high < 125


def test_shares_have_room_around_what_lies_on_an_end():
    """So that the untrained model at 0%, and one at 100%, are seen as curves and not as the frame."""
    flat = charts.Series("base", 3, [(1, 0.0, 0.0, 0.0), (32, 0.062, 0.016, 0.125)])
    assert charts.shares([flat]) == pytest.approx((-0.03 * 0.13125, 1.03 * 0.13125))
    assert charts.shares([flat, charts.Series("dail", 0, [(1, 0.9, 0.85, 0.95)])]) == (-0.03, 1.03)


def test_cumulative_shares():
    assert charts.cumulative([3, 1, 3, 9]) == [(1, 0.25, 0.25, 0.25), (3, 0.75, 0.75, 0.75), (9, 1, 1, 1)]
    many = charts.cumulative(list(range(10000)))
    assert len(many) == charts.POINTS and many[0][:2] == (0, 0.0001) and many[-1][:2] == (9999, 1)
    assert charts.cumulative([]) == []


def test_labels_do_not_overlap():
    assert charts.labels([0.1, 0.9], 0.1, 0, 1) == [0.1, 0.9]
    assert charts.labels([0.5, 0.52], 0.1, 0, 1) == pytest.approx([0.46, 0.56])
    found = charts.labels([1.0, 0.98, 0.97, 0.0], 0.1, 0, 1)
    assert found == pytest.approx([1.0, 0.9, 0.8, 0.0])
    for seed in range(20):
        wanted = np.random.default_rng(seed).random(6) ** 3
        placed = np.array(charts.labels(wanted.tolist(), 0.1, 0, 1))
        assert np.diff(np.sort(placed)).min() > 0.1 - 1e-9 and placed.min() > -1e-9 and placed.max() < 1 + 1e-9
        assert (np.argsort(placed) == np.argsort(wanted)).all()


def test_an_arm_has_one_colour_everywhere():
    demo = [run_of("base", "none"), run_of("sft"), run_of("nll"), run_of("dail")]
    assert charts.colours(demo) == [3, 2, 1, 0]
    assert charts.colours([run_of("dail"), run_of("untrained", "none")]) == [0, 3]
    assert charts.colours([run_of("runs/one/dail"), run_of("runs/two/dail")]) == [0, 1]
    (alone,) = charts.colours([run_of("gamma=0.3")])
    assert charts.colours([*demo, run_of("gamma=0.3")])[-1] in (alone, *(i for i in range(4, 8)))
    many = charts.colours([run_of(f"arm{i}") for i in range(30)])
    assert len(set(many)) == 30 and set(many[:8]) == set(range(8)) and max(many) < 32
    assert charts.PLACES.keys() == methods.METHODS.keys() and UNTRAINED in charts.PLACES
    assert set(charts.PLACES.values()) == set(range(len(charts.COLOURS)))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_colours_are_seen_against_their_pages_and_have_marks_of_their_own():
    for light, dark in charts.COLOURS:
        assert 1.05 / (luminance(light) + 0.05) > 3 and (luminance(dark) + 0.05) / (luminance("#14161a") + 0.05) > 3
    assert len(plots.MARKERS) == len(set(plots.DASHES)) == len(charts.COLOURS)
    html = page.render([run_of("dail")], [], "t")
    assert re.findall(r"\.c\d \{ --c: light-dark\((#\w+), (#\w+)\)", html) == list(charts.COLOURS)
    script = (Path(page.__file__).parent / "charts.js").read_text()
    shapes = script.split("const MARKERS = [")[1].split("];\n")[0]
    assert f"const PALETTE = {len(charts.COLOURS)};" in script and f"const UNTRAINED = {plots.HOLLOW};" in script
    assert shapes.count("polygon(") + shapes.count("disc") + len(re.findall(r"\b(up|down)\b", shapes)) == 8


def interval(mean):
    return {"mean": mean, "low": max(0.0, mean - 0.05), "high": min(1.0, mean + 0.05)}


ENDED = {"answered": 1.0, "forced": 0.0, "median_tokens": 40.0}


def cells(mean):
    shares = {str(k): interval(min(1.0, mean * (1 + i / 8))) for i, k in enumerate((1, 2, 4, 8))}
    return {
        "256": {"pass@k": shares, "maj@k": shares, "mean_tokens": 40 + 9 * mean, "problems": 64, "samples": 8, **ENDED}
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Figures of three arms, the untrained one at 0%; the axes that matplotlib drew, and the files."""
    steps = np.arange(1, 300)
    loss = 2 * np.exp(-steps / 60) + 0.2 + 0.1 * np.random.default_rng(0).normal(size=299)
    loss[100] = 30.0
    metrics = {"loss": dict(zip(steps.tolist(), loss.tolist(), strict=True))}
    metrics |= {"entropy": dict(zip(steps.tolist(), (0.5 + 0.2 * np.sin(steps)).tolist(), strict=True))}
    runs = [
        run_of("base", "none", cells={"hard": cells(0.0), "known": cells(0.97)}, lengths={("hard", 256): [30, 40, 50]}),
        run_of("nll", cells={"hard": cells(0.6), "known": cells(0.7)}, metrics=metrics),
        run_of(
            "dail", cells={"hard": cells(0.9), "known": cells(0.96)}, lengths={("hard", 256): [20, 30]}, metrics=metrics
        ),
    ]
    figures, folder = {}, tmp_path_factory.mktemp("plots")
    real, make = plots._figure, lambda panels, caption: figures.setdefault(panels[0].section, real(panels, caption))
    traces = collect.TraceFile("all arms", None, 30, [20, 30, 40] * 10, [0.9, 0.95] * 15)
    traces.by_anyone, traces.by_student = np.full(40, 30), np.full(40, 27)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_figure", make)
        files = plots.draw(charts.build(runs, [traces]), folder)
    return figures, files


def test_figures_say_what_is_shown_once(drawn):
    """A row for each metric; names of benchmarks as titles, of metrics at the axes, n and intervals in the caption."""
    figure = drawn[0]["pass"]
    axes = [ax for ax in figure.axes if ax.axison]
    assert [(ax.get_title("left"), ax.get_ylabel()) for ax in axes] == [
        ("hard", "pass@k"),
        ("known", "pass@k"),
        ("hard", "maj@k"),
        ("known", "maj@k"),
    ]
    caption = "With 95% bootstrap intervals over problems. n = 64 problems x 8 samples."
    assert " ".join(figure.get_supxlabel().split()) == caption
    assert not figure.legends  # the names stand at the ends of the curves
    texts = [text for text in axes[0].texts if text.get_text()]
    assert [text.get_text() for text in texts] == ["base", "nll", "dail"]
    heights = [text.xyann[1] for text in texts]
    assert heights[0] < 0.1 < heights[1] < heights[2]
    for ax in axes:  # every arm has its points, with the intervals, on every panel, the untrained one as rings on top
        curves = [line for line in ax.lines if line.get_marker() != "None"]
        assert [line.get_label() for line in curves] == ["base", "nll", "dail"]
        assert max(curves, key=lambda line: line.zorder).get_markerfacecolor() == "none"
        assert len(ax.collections) == 3  # bands
        assert ax.get_ylim()[0] < 0 and ax.get_ylim()[1] > 1
        assert all(not line.get_clip_on() for line in ax.lines)
    (legend,) = drawn[0]["lengths"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "dail"]


def test_training_curves_have_the_raw_ones_behind_them(drawn):
    axes = drawn[0]["training"].axes
    raw, smooth, outside = axes[0].lines[:3]
    assert raw.get_alpha() == 0.35 and raw.get_linewidth() < smooth.get_linewidth()
    assert np.abs(np.diff(smooth.get_ydata())).sum() < 0.3 * np.abs(np.diff(raw.get_ydata())).sum()
    assert axes[0].get_ylim()[1] < 4 and outside.get_marker() == "^" and len(outside.get_xdata()) == 1


def test_files_of_figures(drawn):
    names = set(plots.FILES.values()) - {"tau"}
    assert {file.name for file in drawn[1]} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for file in drawn[1]:
        if file.suffix == ".png":
            pixels = image.imread(file)[..., :3]
            assert min(pixels.shape[:2]) > 400 and pixels.std() > 0.05
            frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert (frame == 1).all()  # nothing is cut off at the edge of the picture
        else:
            text = file.read_text()
            assert text.count("<path") > 30 and text.rstrip().endswith("</svg>")


def test_long_names_are_in_a_legend_that_fits(tmp_path):
    names = [f"objective=dail,learning_rate=0.0003,gamma=0.{i}" for i in range(3)]
    series = [charts.Series(name, i, [(1, 0.2, 0.1, 0.3), (2, 0.4, 0.3, 0.5)]) for i, name in enumerate(names)]
    figure = plots._figure(charts.chart("pass", "", "hard", "marked", "k", "pass@k", series), "")
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names and not figure.axes[0].texts[1:]
    assert figure.bbox.x0 <= legend.get_window_extent().x0 and legend.get_window_extent().x1 <= figure.bbox.x1


def test_data_of_charts_are_json(drawn):
    data = json.loads(
        page.render([run_of("dail", cells={"hard": cells(0.5)})], [], "t").split('id="data">')[1].split("<")[0]
    )
    chart = data["charts"][0]
    assert (
        data["colours"] == [0]
        and chart["named"]
        and chart["note"] == "n = 64 problems x 8 samples"
        and len(chart["span"]) == 2
    )
