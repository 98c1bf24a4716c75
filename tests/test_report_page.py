"""The page and the plots of synthetic runs: structure, figures, escaping, and that the page fetches nothing."""

import base64
import hashlib
import html
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic import BUDGETS, HOSTILE, PROBLEMS, SAMPLES, Page, decode, dump, make_run, make_traces

from dail_jax import config as config_lib
from dail_jax import launch, metrics
from dail_jax.data import batches
from dail_jax.errors import UserError
from dail_jax.evaluate import protocol
from dail_jax.report import charts, collect, diagnosis, page, plots
from dail_jax.stages import report

NAMES = (("", "generate"), ("dail", "train"))  # run directories and stages that leave something out


@pytest.fixture(scope="module")
def runs(synthetic_runs):
    return synthetic_runs


@pytest.fixture(scope="module")
def parsed(runs, tmp_path_factory):
    out = page.write(runs[0], tmp_path_factory.mktemp("page") / "report.html", "A <b>title</b>", runs[1], decode)
    return Page(out.read_text("utf-8"))


def test_the_page_has_every_part(parsed):
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {
        "results",
        "diagnosis",
        "pass",
        "budget",
        "lengths",
        "training",
        "traces",
        "viewer",
        "samples",
        "run",
    } <= set(ids)
    assert {a["href"][1:] for a in parsed.find("a")} <= set(ids)
    text = " ".join(parsed.text)
    for expected in ("A <b>title</b>", "models/tiny", "TPU v5e", "2 min 3 s", "train.objective", "pass@1 against base"):
        assert expected in text
    data = parsed.data()
    assert data["runs"] == ["base", "nll", "dail"]
    assert {chart["section"] for chart in data["charts"]} == set(plots.FILES) - {"tau"}  # of `calibrate`


def test_nothing_leads_out_of_the_page(parsed):
    """No element can load anything, and only the page's own script and style may run."""
    for tag, attrs in parsed.elements:
        assert tag not in ("iframe", "object", "embed", "img", "base", "form")
        assert not any(name.startswith("on") or name in ("src", "srcdoc", "action", "style") for name in attrs), (
            tag,
            attrs,
        )
        assert attrs.get("href", "#").startswith("#") or attrs["href"] == "data:,"
    policy = next(attrs["content"] for attrs in parsed.find("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    own = [(tag, text) for tag, attrs, text in parsed.raw if attrs.get("id") != "data"]
    assert [tag for tag, _ in own] == ["style", "script"]
    for tag, text in own:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        # The only address is the name of the SVG namespace, which is never fetched.
        assert re.findall(r"https?:[^\"']*|url\(|@import", text) in ([], ["http://www.w3.org/2000/svg"])
        assert "innerHTML" not in text and "fetch(" not in text


def test_hostile_texts_stay_texts(parsed):
    assert len(parsed.find("script")) == 2 and not parsed.find("img")
    data = parsed.data()
    assert any(sample["text"] == HOSTILE for sample in data["samples"])
    assert any("</script>" in trace["pieces"] for trace in data["traces"])


def test_charts_hold_the_results(runs, parsed):
    results = json.loads((runs[0]["dail"] / "results.json").read_text())["benchmarks"]["hard"]["256"]
    found = {
        (c["section"], c["variant"], c["title"]): {s["name"]: s["points"] for s in c["series"]}
        for c in parsed.data()["charts"]
    }
    points = found["pass", "pass@k, budget 256", "hard"]["dail"]
    assert [p[0] for p in points] == [1, 2, 4, 8]
    assert points[0][1:] == [results["pass@k"]["1"][key] for key in ("mean", "low", "high")]
    by_budget = found["budget", "pass@1 against token budget", "hard"]["dail"]
    assert [p[0] for p in by_budget] == list(BUDGETS) and by_budget[1][1] == results["pass@k"]["1"]["mean"]
    lengths = found["lengths", "budget 256", "hard"]["dail"]
    assert lengths[-1][1] == 1 and [p[1] for p in lengths] == sorted(p[1] for p in lengths)
    excess = found["training", "", charts.TRAINING["excess"][0]]
    assert list(excess) == ["dail"] and len(excess["dail"]) == 60


def test_acceptance_by_position_is_counted(runs):
    _, (traces,) = collect.read(runs[0], runs[1])
    rows = [json.loads(line) for line in runs[1].read_text().splitlines()]
    at = 40
    assert traces.by_anyone[at] == sum(len(row["writer"]) > at for row in rows)
    assert traces.by_student[at] == sum(row["writer"][at : at + 1] == "s" for row in rows)
    assert traces.drops == {"artefact": 5, "repetition": 3}
    assert traces.scored and traces.rows[0]["push"][0] is not None and traces.rows[0]["log_privileged"][0] is None


def test_selection_is_even():
    groups = {"rare": [3, 99], "common": list(range(1000, 2000)), "other": list(range(5000, 6000))}
    chosen = collect.spread(groups, 42)
    assert len(chosen) == 42 and chosen == sorted(chosen) and {3, 99} <= set(chosen)
    common = [i for i in chosen if 1000 <= i < 2000]
    assert len(common) == 20 and common[0] == 1000 and common[-1] == 1999 and max(np.diff(common)) < 60
    assert collect.spread(groups, 5000) == sorted(itertools.chain(*groups.values()))


def test_embedded_rows_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "MAX_SAMPLES", 30)
    monkeypatch.setattr(collect, "MAX_TRACES", 10)
    monkeypatch.setattr(collect, "MAX_TEXT", 50)
    run = make_run(tmp_path / "dail", "dail")
    make_traces(run / "traces.jsonl")
    found = Page(page.write({"dail": run}, tmp_path / "report.html", "t").read_text("utf-8"))
    data = found.data()
    assert len(data["samples"]) == 30 and len(data["traces"]) == 10
    assert {s["correct"] for s in data["samples"]} == {True, False}
    assert all(len(s["text"]) < 50 + 60 for s in data["samples"]) and any(
        "left out" in s["text"] for s in data["samples"]
    )
    total = 2 * PROBLEMS * SAMPLES * len(BUDGETS)
    assert f"30 of {total} samples" in " ".join(parsed_text(found)) and "10 of 40 traces" in " ".join(
        parsed_text(found)
    )


def parsed_text(found: Page) -> list[str]:
    return [" ".join(text.split()) for text in found.text]


def test_an_empty_run_still_gives_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    found = Page(page.write({"run": tmp_path / "run"}, tmp_path / "report.html", "nothing yet").read_text("utf-8"))
    empty = {key: [] for key in ("charts", "samples", "traces", "problems", "solved")}
    assert found.data() == {"runs": ["run"], "colours": [0], "baseline": 0, **empty}
    assert plots.write({"run": tmp_path / "run"}, tmp_path / "plots") == []


def test_files_of_a_run_in_progress(tmp_path):
    run = make_run(tmp_path / "dail", "dail")
    make_traces(run / "traces.jsonl")
    for name in ("samples.jsonl", "metrics.jsonl", "traces.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"torn": ')
    with open(run / "metrics.jsonl", "r+") as file:
        rows = file.read()
        file.seek(0)  # a resumed run writes some updates twice, and the later values count
        file.write(
            rows.replace('{"torn": ', "") + json.dumps({"stage": "train", "step": 60, "time": 1, "loss": 77.0}) + "\n"
        )
    (read,), (traces,) = collect.read({"dail": run})
    assert read.total == 2 * PROBLEMS * SAMPLES * len(BUDGETS) and traces.total == 40
    assert len(read.metrics["train"]["loss"]) == 60 and read.metrics["train"]["loss"][60] == 77.0


def test_comparison_of_runs_that_lie_anywhere(tmp_path, capsys, undrawn):
    """Two experiments whose arms have the same name, each with its own traces and scores of the same problems."""
    for i, place in enumerate(("one", "two")):
        run = make_run(tmp_path / place / "dail", "dail")
        make_traces(run / "traces.jsonl")
        (run / "token_scores.jsonl").write_text(
            "".join(
                json.dumps({"problem_id": f"p{j:03}", "sample": 0, "log_ratio": [float(i)] * len(row["response_ids"])})
                + "\n"
                for j, row in enumerate(map(json.loads, (run / "traces.jsonl").read_text().splitlines()))
            )
        )
    make_run(tmp_path / "base", "base")
    out = tmp_path / "comparison"
    runs = [str(tmp_path / name) for name in ("base", "one", "two/dail")]
    assert launch.main(["compare", *runs, "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    d = protocol.compare(
        *(json.loads((tmp_path / name / "results.json").read_text()) for name in ("base", "one/dail")),
        "hard",
        "256",
        1,
        0,
        diagnosis.RESAMPLES,
    )
    low, mean, high = (f"{100 * value:+.1f}" for value in (d.low, d.mean, d.high))
    assert f"{mean} [{low}, {high}]" in (out / "results.md").read_text() and f"[{low}, {high}]" in shown
    assert {f.name for f in out.iterdir()} == {"report.html", "results.md", "results.tex", "plots"}
    assert {f.stem for f in (out / "plots").iterdir()} == set(plots.FILES.values()) - {"tau"}
    data = Page((out / "report.html").read_text("utf-8")).data()
    assert data["runs"] == [str(tmp_path / name) for name in ("base", "one/dail", "two/dail")]
    pushes = {(trace["file"], trace["push"][0]) for trace in data["traces"]}
    assert pushes == {(data["runs"][1], 0.0), (data["runs"][2], 1.0)}  # neither has the scores of the other
    assert launch.main(["compare", str(tmp_path / "comparison")]) == 2
    assert "got no results.json here or in its folders, want a finished evaluation" in capsys.readouterr().err
    results = tmp_path / "base" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "schema": 2}))
    assert launch.main(["compare", str(tmp_path / "base"), "--out", str(out)]) == 2
    assert f"{results}: got schema 2, want 1" in capsys.readouterr().err


def test_faults_are_named(tmp_path):
    run = make_run(tmp_path / "dail", "dail")
    (run / "metrics.jsonl").write_text('{"stage":"train","step":1,"time":0,"loss":1}\nnot JSON\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: got a line that is not JSON"):
        page.write({"dail": run}, tmp_path / "report.html", "t")
    with pytest.raises(UserError, match="no such run directory"):
        page.write({"x": tmp_path / "absent"}, tmp_path / "report.html", "t")


TRACE = {"problem_id": "a", "sample": 0, "response_ids": [1], "text": "x", "finish": "stop"}


def second(line: str):
    """A change that puts this line in place of the second row."""
    return lambda text: text.replace(text.split("\n")[1], line, 1)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "samples.jsonl",
            lambda text: text[: len(text) // 2] + text[len(text) // 2 + 9 :].lstrip("{"),
            "got a line that is not JSON",
        ),
        ("samples.jsonl", second("{}"), ":2:benchmark: missing"),
        ("samples.jsonl", second('{"a":' * 9000), ":2: got a line nested too deeply, want at most 50 levels"),
        ("samples.jsonl", lambda text: text.replace('"tokens": ', '"tokens": 1.5, "old": ', 1), ":1:tokens: got 1.5"),
        ("metrics.jsonl", second('{"step": 2}'), ":2:stage: missing"),
        ("traces.jsonl", second(json.dumps({**TRACE, "logq": ["x"]})), ":2:logq.0: got 'x', want a valid number"),
        ("results.json", lambda text: text[:900], ": got a file that is not JSON"),
        ("results.json", lambda text: "[]", ": got a list, want a JSON object"),
        ("results.json", lambda text: '{"accuracy": 0.5}', ":benchmarks: missing"),
        ("results.json", lambda text: text.replace('"64"', '"short"', 1), ":benchmarks.hard.short: got 'short', want"),
        ("results.json", lambda text: text.replace('"mean": ', '"mean": NaN, "old": ', 1), "1.mean: got nan, want"),
        ("results.json", lambda text: text.replace(", 8]", ", 7]", 1), ".64: got impossible counts in per_problem"),
        ("results.json", lambda text: text.replace('"hard-000"', '"hard-001"', 1), ":hard-001: got the key twice"),
        (
            "results.json",
            lambda text: re.sub(r'"hard-000": .*?\], ', "", text, count=1),
            ".64: got 2 in per_problem, want",
        ),
        ("results.json", lambda text: text.replace('"8": ', '"9": ', 1), ".64: got pass@k for a larger k, want"),
    ],
)
def test_damaged_files_are_refused_in_one_line(damaged, file, change, message, capsys):
    """The line names the file, its row and the field; `report` and `compare` read the same files."""
    whole = (damaged / file).read_text()
    (damaged / file).write_text(change(whole))
    try:
        assert launch.main(["report", "--config", str(damaged / "config.yaml")]) == 2
        assert launch.main(["compare", str(damaged), "--out", str(damaged / "comparison")]) == 2
    finally:
        (damaged / file).write_text(whole)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(x.startswith(f"error: {damaged / file}:") and message in x for x in lines), lines


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("damaged") / "dail", "dail", problems=3)
    make_traces(run / "traces.jsonl", 4)
    return run


def test_short_fields_of_samples_are_clipped(damaged):
    """An answer may be as long as a text, and the page must stay small."""
    rows = [
        {**json.loads(line), "answer": "1" * 5000, "gold": "2" * 5000}
        for line in (damaged / "samples.jsonl").read_text().splitlines()
    ]
    whole = (damaged / "samples.jsonl").read_text()
    dump(damaged / "samples.jsonl", rows)
    (run,), _ = collect.read({"dail": damaged})
    (damaged / "samples.jsonl").write_text(whole)
    half = collect.MAX_ANSWER // 2
    assert run.samples[0]["answer"] == f"{'1' * half}\n\n[… 4,600 characters left out …]\n\n{'1' * half}"
    assert all(len(sample["gold"]) < 2 * half + 60 for sample in run.samples)
    texts = {(row["problem_id"], row["sample"], row["budget"]): row["text"] for row in rows}
    assert all(s["text"] == texts[s["problem_id"], s["sample"], s["budget"]] for s in run.samples)


def test_traces_without_a_tokenizer_or_a_role(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    dump(
        run / "traces.jsonl",
        [
            {
                "problem_id": "a",
                "sample": 0,
                "response_ids": [1, 2],
                "text": HOSTILE,
                "logq": [-0.5, float("-inf")],
                "log_student": None,
                "log_privileged": [-0.5, None],
                "writer": "pp",
                "acceptance": 0.0,
                "finish": "stop",
                "drop": None,
            }
        ],
    )
    data = Page(page.write({"run": run}, tmp_path / "report.html", "t").read_text("utf-8")).data()
    (trace,) = data["traces"]
    assert (
        trace["pieces"] is None
        and trace["log_student"] is None
        and trace["logq"] == [-0.5, None]
        and trace["text"] == HOSTILE
    )


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    pages = [page.write(runs[0], tmp_path / f"{i}.html", "t", runs[1]).read_bytes() for i in range(2)]
    assert pages[0] == pages[1] and len(pages[0]) < 2_000_000


def test_plots_are_the_same_bytes(runs, tmp_path):
    found = charts.build(*collect.read(runs[0]))[:1]
    first, again = ([file.read_bytes() for file in plots.draw(found, tmp_path / name)] for name in ("a", "b"))
    assert first == again and len(first) == 2


def test_lists_hold_options_alone():
    """A listbox may hold nothing else; checks in a browser are in benchmarks/browser.py."""
    script = (Path(page.__file__).parent / "browse.js").read_text()
    items = re.findall(r'make\("li", \{(.*?)\}', script)
    assert items and all('role: "option"' in item for item in items)


# ---------------------------------------------------------------------------------------------------
# Diagnosis
# ---------------------------------------------------------------------------------------------------


def seen_in(runs, traces=None) -> dict[str, str]:
    """The figures of the signs that were seen, by title."""
    return {f.title: " | ".join(f.figures) for f in diagnosis.find(*collect.read(runs, traces)) if f.seen}


def test_diagnosis_has_the_figures(runs):
    found = seen_in(*runs)
    assert found.keys() == {"Traces that mention the reference", "Below the untrained model"}
    assert found["Traces that mention the reference"] == "all arms: 6 of 40 traces (15.0%), 5 dropped for it"
    a, b = (json.loads((runs[0][arm] / "results.json").read_text()) for arm in ("base", "nll"))
    d = protocol.compare(a, b, "known", "256", 1, 0, diagnosis.RESAMPLES)
    figures = f"nll, known (budget 256), pass@1: {100 * d.mean:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}], p = 0.0"
    assert figures in found["Below the untrained model"] and "dail" not in found["Below the untrained model"]
    everything = diagnosis.find(*collect.read(*runs))
    assert [f.severity for f in everything[:3]] == ["red", "red", "none"]
    unseen = {f.title: f.figures for f in everything if not f.seen}
    assert len(unseen["Loss spikes"]) == 2 and unseen["Below the untrained model"][0].startswith("dail")


def test_batches_of_another_length_are_no_spikes(tmp_path):
    """Traces are cut at 256 tokens; those that end earlier make batches of their own, with another loss."""
    rng, run = np.random.default_rng(5), make_run(tmp_path / "dail", "dail")
    lengths = np.where(rng.random(640) < 0.9, 256, rng.integers(20, 200, 640))
    examples = [batches.Example(str(i), {"student": (1,)}, (1,) * int(n)) for i, n in enumerate(lengths)]
    plan, rows = batches.Plan(examples, 16, 12, seed=3), []
    for step in range(len(plan)):
        own = lengths[plan[step]]
        loss = (own * (0.5 + 20 / own)).sum() / own.sum() + rng.normal() / 200  # the first tokens are the hardest
        row = {"stage": "train", "step": step + 1, "time": 0, "loss": loss, "kl_negative": 1.0}
        rows.append({**row, "tokens": float(own.sum())})
    dump(run / "metrics.jsonl", rows)
    assert "Loss spikes" not in seen_in({"dail": run})
    dump(run / "metrics.jsonl", [{k: v for k, v in row.items() if k != "tokens"} for row in rows])
    found = re.search(r"(\d+) spikes", seen_in({"dail": run})["Loss spikes"])
    assert found and int(found[1]) > 10  # what they look like if batch sizes are not known
    at = next(i for i in range(300, 480) if rows[i]["tokens"] == 16 * 256)
    rows[at]["loss"] += 0.2
    dump(run / "metrics.jsonl", rows)
    assert (
        seen_in({"dail": run})["Loss spikes"]
        == f"dail (gamma 0.1): 1 spike at updates {at + 1}, in {len(rows)} updates"
    )


def test_what_was_left_out_is_in_the_report(tmp_path, capsys, undrawn):
    """Not only on the terminal. The last record of a stage counts, and a count of 0 is not shown."""
    arms = {arm: make_run(tmp_path / "r" / arm, arm) for arm in ("base", "dail")}
    root, arm = (metrics.Metrics(tmp_path / "r" / name, config_lib.Log(), stage) for name, stage in NAMES)
    for count in (12, 34):
        root.left_out("solutions cut to fit <b>", count, 669)
    root.left_out("problems skipped", 0, 669)
    arm.left_out("examples dropped", 2, 1669, ": a, b")
    assert (
        "generate: 34 of 669 solutions cut to fit <b>\ntrain: 2 of 1669 examples dropped: a, b\n"
        in capsys.readouterr().out
    )
    report.show(arms, tmp_path / "r", "r", make_traces(tmp_path / "r" / "traces.jsonl"))
    lines = [
        "all arms, generate: 34 of 669 solutions cut to fit <b>",
        "dail, train: 2 of 1,669 examples dropped",
    ]
    listed = "".join(f"- {protocol.markdown_text(line)}\n" for line in lines)
    assert (tmp_path / "r" / "results.md").read_text().endswith(f"\n\nLeft out:\n\n{listed}")
    page_text = (tmp_path / "r" / "report.html").read_text()
    assert all(f'<li class="fine">{html.escape(line)}</li>' in page_text for line in lines)
    assert "problems skipped" not in page_text
    (root_run,), _ = collect.read({"root": tmp_path / "r"})
    assert root_run.metrics.keys() == {metrics.LEFT_OUT}  # such counts are not curves of a stage


def test_few_problems_show_nothing(tmp_path):
    """With one problem the interval of a difference has no width, so there is neither a colour nor a finding."""
    runs = {arm: make_run(tmp_path / arm, arm, problems=1) for arm in ("base", "nll")}
    for arm, right in (("base", 5), ("nll", 2)):
        rewrite(runs[arm], lambda b, c=right: b["known"]["256"].update(per_problem={"known-000": [c, SAMPLES]}))
    read, _ = collect.read(runs)
    d = diagnosis.difference(*read, "known", "256")
    assert d is not None and d[:4] == (-3 / 8, -3 / 8, -3 / 8, 1)
    cell = page._results(read)[-1][1][1][2][page._header(read).index("pass@1 against base")]
    assert cell.pop("figures") == [-0.375] * 3
    assert cell == {"text": "\u221237.5", "note": "\u221237.5 to \u221237.5, p = 1", "sign": ""}
    (finding,) = (f for f in diagnosis.find(read, []) if f.title == "Below the untrained model")
    assert not finding.seen and "-37.5 points [-37.5, -37.5], p = 1" in finding.figures[0]


def rewrite(run: Path, change) -> None:
    results = json.loads((run / "results.json").read_text())
    change(results["benchmarks"])
    (run / "results.json").write_text(json.dumps(results))


def test_diagnosis_of_shortcuts_and_long_budgets(tmp_path):
    """First better on the training problems alone, then worse with more tokens."""
    base, dail = make_run(tmp_path / "base", "base"), make_run(tmp_path / "dail", "dail")
    for run in (base, dail):
        tree = config_lib.read_yaml(run / "config.yaml")
        tree["evaluate"]["benchmarks"][0]["rows"]["path"] = "train.jsonl"
        (run / "config.yaml").write_text(config_lib.dump(config_lib.build(tree, "test")))
    before = json.loads((base / "results.json").read_text())["benchmarks"]["known"]
    rewrite(dail, lambda benchmarks: benchmarks.update(known=before))
    assert "(trained on hard)" in seen_in({"base": base, "dail": dail})["Better on its training problems alone"]
    rewrite(dail, lambda b: b.update(hard={"64": b["hard"]["256"], "256": b["hard"]["64"]}))
    found = seen_in({"base": base, "dail": dail})["Accuracy falling at long budgets"]
    assert re.fullmatch(r"dail, hard, pass@1: -\d.* from budget 64 to 256", found)
