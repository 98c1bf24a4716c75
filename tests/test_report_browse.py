"""What the page's reader browses: matched samples, the most mixed trace, problems and their solve rates, times."""

import json
import re

import pytest
from synthetic import PROBLEMS, SAMPLES, Page, decode, dump, make_run, make_traces

from dail_jax import config as config_lib
from dail_jax.data.records import dataset_hash, read_rows
from dail_jax.report import collect, page

# ---------------------------------------------------------------------------------------------------
# Which samples and traces
# ---------------------------------------------------------------------------------------------------


def test_shares_are_even():
    assert collect.shares([2, 1000, 1000], 42) == [2, 20, 20]
    assert collect.shares([5, 5, 5], 100) == [5, 5, 5]
    assert collect.shares([9, 9, 9], 0) == [0, 0, 0]
    few = collect.shares([4] * 20, 10)  # every second of them
    assert sum(few) == 10 and set(few) == {0, 1} and sum(few[:10]) == 5
    assert collect.shares([], 7) == []


def drawn(verdicts: str, start: int = 0) -> collect.Drawn:
    """One problem whose samples have these verdicts: + is right, - is wrong."""
    return {"p": {start + i: (i, mark == "+") for i, mark in enumerate(verdicts)}}


def test_the_usual_verdicts_come_first_then_the_rarest():
    base, dail = drawn("--------"), drawn("+++++--+")
    assert collect._in_order([base, dail]) == {"p": [0, 5, 1, 6, 2, 3, 4, 7]}
    # one sample of each kind: both wrong twice, right after training five times, right before it once
    assert collect._in_order([drawn("-------+"), drawn("+++++---")])["p"][:3] == [0, 7, 5]


def test_samples_are_those_of_all_runs():
    place = ("hard", 64)
    runs = [{place: drawn("+-+-")}, {place: drawn("--", 2)}, {}]
    assert collect.matched(runs) == [(place, "p", 2), (place, "p", 3)]
    apart = [{place: drawn("+-")}, {place: drawn("--", 2)}]  # no sample in common: all that there are
    assert {sample for _, _, sample in collect.matched(apart)} == {0, 1, 2, 3}


def test_arms_show_the_same_samples(synthetic_runs, monkeypatch):
    monkeypatch.setattr(collect, "MAX_SAMPLES", 100)
    runs, _ = collect.read(*synthetic_runs)
    keys = [[(s["benchmark"], s["budget"], s["problem_id"], s["sample"]) for s in run.samples] for run in runs]
    assert keys[0] == keys[1] == keys[2] and len(set(keys[0])) == 100
    per_problem = [sum(key[:3] == one for key in keys[0]) for one in {key[:3] for key in keys[0]}]
    assert len(per_problem) == 2 * 2 * PROBLEMS and set(per_problem) == {2, 3}
    assert {s["correct"] for s in runs[2].samples} == {True, False}


def test_the_viewer_opens_on_the_most_mixed_trace(tmp_path, monkeypatch):
    path = make_traces(tmp_path / "traces.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, share in ((8, 0.5), (17, 0.45), (23, 0.3)):  # the first of them is dropped
        length = len(rows[i]["writer"])
        rows[i]["writer"] = "s" * round(share * length) + "p" * (length - round(share * length))
    dump(path, rows)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(collect, "MAX_TRACES", 3)
    _, (traces,) = collect.read({"run": tmp_path / "run"}, path)
    assert rows[8]["drop"] and traces.rows[0]["problem_id"] == "p017"
    assert len(traces.rows) == 3 and traces.total == 40
    monkeypatch.setattr(collect, "MAX_TRACES", 200)
    _, (traces,) = collect.read({"run": tmp_path / "run"}, path)
    assert [row["problem_id"] for row in traces.rows][:2] == ["p017", "p023"] and len(traces.rows) == 40
    assert [bool(row["drop"]) for row in traces.rows] == sorted(bool(row["drop"]) for row in rows)


# ---------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run beside its data, as its config.yaml names them."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "hard", "known"):
        ids = [f"p{i:03}" for i in range(40)] if name == "train" else [f"{name}-{i:03}" for i in range(PROBLEMS)]
        rows = [{"problem_id": x, "problem": f"Add one to {x}.", "answer": "465"} for x in ids]
        dump(tmp_path / f"{name}.jsonl", [{**row, "solution": "$a=1$, $b=2$, \\boxed{465}"} for row in rows])
    made = make_run(tmp_path / "dail", "dail")
    make_traces(made / "traces.jsonl")
    return made


def shown(run) -> dict:
    return Page(page.write({"dail": run}, run / "report.html", "t", None, decode).read_text("utf-8")).data()


def test_problems_stand_beside_samples_and_traces(run):
    data = shown(run)
    sets = [data["problems"][trace["set"]] for trace in data["traces"]]
    row = sets[0]["rows"][data["traces"][0]["problem_id"]]
    assert row["problem"].startswith("Add one to p0") and row["answer"] == "465"
    assert row["solutions"] == [{"text": "$a=1$, $b=2$, \\boxed{465}", "waypoints": ["1", "2"]}]
    for sample in data["samples"]:
        own = data["problems"][sample["set"]]
        assert own["rows"][sample["problem_id"]]["problem"] == f"Add one to {sample['problem_id']}."
    assert sorted(one["count"] for one in data["problems"]) == [PROBLEMS, PROBLEMS, 40]
    assert "from 40 expert solutions" in " ".join(Page((run / "report.html").read_text()).text)


def test_data_that_are_gone_or_changed_are_not_shown(run, tmp_path):
    (tmp_path / "train.jsonl").unlink()
    cfg = config_lib.Dataset(path="hard.jsonl")
    inputs = {"evaluate.benchmarks.hard.rows": {"path": "hard.jsonl", "sha256": dataset_hash(read_rows(cfg))}}
    manifest = json.loads((run / "run.json").read_text())
    manifest["stages"]["evaluate"] = {"inputs": inputs}
    (run / "run.json").write_text(json.dumps(manifest))
    whole = shown(run)
    missing = {name: whole["problems"][whole[name][0]["set"]]["missing"] for name in ("samples", "traces")}
    assert missing["samples"] == "" and missing["traces"] == "train.jsonl: no such file"
    dump(tmp_path / "hard.jsonl", [{"problem_id": "hard-000", "problem": "Another one."}])
    data = shown(run)
    sets = {sample["benchmark"]: data["problems"][sample["set"]] for sample in data["samples"]}
    assert sets["hard"]["missing"] == "the file has changed since the run" and not sets["hard"]["rows"]
    assert not sets["known"]["missing"] and len(sets["known"]["rows"]) == PROBLEMS
    (run / "config.yaml").write_text("run_dir: r\n")
    data = shown(run)
    assert {one["missing"] for one in data["problems"]} == {
        "the run directory's config.yaml does not say where they were read from"
    }


def test_choices_are_shown(run, tmp_path):
    rows = [
        {"problem_id": f"hard-{i:03}", "problem": "Which?", "answer": "B", "options": ["x", "y", "z"]}
        for i in range(PROBLEMS)
    ]
    dump(tmp_path / "hard.jsonl", rows)
    tree = config_lib.read_yaml(run / "config.yaml")
    tree["evaluate"]["benchmarks"][0]["rows"]["columns"]["choices"] = "options"
    (run / "config.yaml").write_text(config_lib.dump(config_lib.build(tree, "test")))
    data = shown(run)
    sample = next(s for s in data["samples"] if s["benchmark"] == "hard")
    assert data["problems"][sample["set"]]["rows"][sample["problem_id"]]["choices"] == ["y", "x", "z"]


def test_solve_rates_are_those_of_the_results(synthetic_runs):
    runs, _ = collect.read(*synthetic_runs)
    found = page._solved(runs)
    assert [(one["benchmark"], one["budget"]) for one in found] == [
        ("hard", 256),
        ("hard", 64),
        ("known", 256),
        ("known", 64),
    ]
    results = json.loads((synthetic_runs[0]["dail"] / "results.json").read_text())["benchmarks"]["hard"]["256"]
    assert found[0]["problems"] == [f"hard-{i:03}" for i in range(PROBLEMS)]
    assert [row[2] for row in found[0]["right"]] == list(results["per_problem"].values())
    mean = sum(row[2][0] for row in found[0]["right"]) / (PROBLEMS * SAMPLES)
    assert mean == pytest.approx(results["pass@k"]["1"]["mean"], abs=1e-6)


# ---------------------------------------------------------------------------------------------------
# The page around them
# ---------------------------------------------------------------------------------------------------


def test_what_it_took():
    stage = {"started": "2026-01-01T10:00:00Z", "finished": "2026-01-01T10:02:03Z"}
    begun = {"started": "2026-01-01T10:00:00Z"}
    manifests = [{"stages": {"train": stage, "evaluate": begun}}, {"stages": {"generate": stage}}]
    assert page._took(manifests) == "Took 4 min 6 s: generate 2 min 3 s, train 2 min 3 s."
    assert page._took([{"stages": {"train": begun}}]) == ""


def test_cells_have_the_figures_for_csv_files(synthetic_runs):
    runs, _ = collect.read(*synthetic_runs)
    header, cells = page._header(runs), page._results(runs)[0][1][2][2]
    result = runs[2].benchmarks["hard"]["64"]
    assert cells[0]["figures"] == [result["pass@k"]["1"][key] for key in ("mean", "low", "high")]
    assert len(cells[header.index("pass@1 against base")]["figures"]) == 3
    assert cells[header.index("mean tokens")]["figures"] == [result["mean_tokens"]]


def test_parts_of_the_script_share_no_names():
    """They are joined into one script, in which a name that is declared twice is an error."""
    names = re.findall(r"^(?:const|let|function) (?:\[[^\]]*\]|(\w+))", page.joined(*page.SCRIPTS, "js"), re.M)
    names = [name for name in names if name]
    assert len(names) > 40 and len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast(scheme):
    """The borders of controls have 3:1 against all that they may lie on, texts 4.5:1."""
    css = page.joined(*page.STYLES, "css")
    found = {name: pair for name, *pair in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", css) if name != "c"}
    grounds = [found[name][scheme] for name in ("page", "card", "sunk")]
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert min(contrast(found["edge"][scheme], ground) for ground in grounds) >= 3
    for name in ("ink", "soft", "link", "good", "bad"):
        assert min(contrast(found[name][scheme], ground) for ground in grounds) >= 4.5, name
    controls = next(rule for rule in css.split("}") if rule.strip().startswith("button, select, input {"))
    assert "border: 1px solid var(--edge)" in controls


def test_hostile_problems_and_titles_stay_texts(run, tmp_path):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- \" ' & \u2028 x"
    rows = [{"problem_id": f"hard-{i:03}", "problem": hostile, "answer": hostile} for i in range(PROBLEMS)]
    dump(tmp_path / "hard.jsonl", [{**row, "solution": hostile} for row in rows])
    tree = config_lib.read_yaml(run / "config.yaml")
    tree |= {"title": hostile, "about": hostile}
    tree["model"]["title"] = hostile
    tree["data"]["about"] = f"how to read them {hostile}"
    for one in tree["evaluate"]["benchmarks"]:
        one |= {"title": hostile, "about": hostile}
    cfg = config_lib.build(tree, "test").model_dump(mode="json")
    (run / "config.yaml").write_text(config_lib.dump(config_lib.build(tree, "test")))
    found = Page(page.write({"dail": run}, run / "report.html", "t", None, decode, cfg).read_text("utf-8"))
    assert len(found.find("script")) == 2 and not found.find("img") and hostile in "".join(found.text)
    assert f"how to read them {hostile}" in "".join(found.text)
    sample = next(s for s in found.data()["samples"] if s["benchmark"] == "hard")
    shown = found.data()["problems"][sample["set"]]["rows"][sample["problem_id"]]
    assert shown["problem"] == shown["solutions"][0]["text"] == shown["answer"] == hostile
