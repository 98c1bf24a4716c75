"""The Python API: the stages' own figures, and their files, without a run directory."""

import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import notebook
import numpy as np
import optax
import pytest
import tiny
from rich.console import Console

import dail_jax
from dail_jax.data import batches
from dail_jax.data import traces as traces_lib
from dail_jax.errors import UserError


@pytest.fixture(autouse=True, scope="module")
def one():
    with tiny.alone():
        yield


@pytest.fixture(scope="module")
def model(pipeline, one):
    """The model of the finished run, under its configuration."""
    return dail_jax.load(f"{pipeline}.yaml")


@pytest.fixture(scope="module")
def trained(model, pipeline):
    return model.train(model.traces(pipeline / "traces.jsonl"))


def as_rows(traces):
    return json.loads(json.dumps([dict(trace) for trace in traces]))


def test_importing_the_package_imports_nothing_else():
    code = "import sys, dail_jax; print(dail_jax.__version__, 'load' in dir(dail_jax), 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [dail_jax.__version__, "True", "False"]
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        dail_jax.lode  # noqa: B018


def test_rollouts_are_the_stages(model, pipeline):
    want = tiny.lines(pipeline / "traces.jsonl")[:6]
    rows = model.rows(limit=3)
    drawn = model.rollout(rows)
    assert as_rows(drawn) == [{**row, "drop": None} for row in want]
    assert as_rows(model.filter(drawn)) == want
    assert [trace.problem for trace in drawn] == [row for row in rows for _ in range(2)]
    assert as_rows(model.traces(pipeline / "traces.jsonl"))[:6] == want
    assert "".join(drawn[0].pieces).startswith(drawn[0].text)


def test_rows_come_from_anywhere(model):
    assert [row.problem_id for row in model.rows("hard")] == [r["problem_id"] for r in tiny.lines(HARD)[:3]]
    assert model.rows(HARD, limit=5)[:3] == model.rows("hard")
    (row,) = model.rows([{"problem": "1 + 1", "answer": 2}])
    assert (row.problem, row.solution, row.answer, row.index) == ("1 + 1", "", "2", 0)
    with pytest.raises(UserError, match="rows:2:problem: got no such column"):
        model.rows([{"problem": "1 + 1"}, {"question": "?"}])


HARD = tiny.ASSETS / "hard.jsonl"


def test_loss_and_gradient_are_those_of_the_first_update(model, pipeline):
    traces = [trace for trace in model.traces(pipeline / "traces.jsonl") if trace.drop is None]
    cfg = model.config.train
    examples = [batches.Example(t.name, {"student": (0,) * t.prompt_tokens["student"]}, t.response_ids) for t in traces]
    first = [traces[i] for i in batches.Plan(examples, cfg.batch_size, cfg.epochs, model.config.seed)[0]]
    recorded = next(row for row in tiny.lines(pipeline / "metrics.jsonl") if row["stage"] == "train")

    def of_lora(lora):
        return model.loss(first, method="dail", lora=lora)

    (loss, parts), slope = jax.value_and_grad(of_lora, has_aux=True)(model.lora)
    assert float(loss) == pytest.approx(recorded["loss"], rel=1e-5)
    for name in ("kl_privileged", "kl_negative", "excess", "entropy"):
        assert float(parts[name]) == pytest.approx(recorded[name], rel=1e-4), name
    gradient = model.gradient([*first, *[t.marked("wrong") for t in first[:1]]])  # which is left out
    assert float(optax.tree.norm(gradient)) == pytest.approx(recorded["grad_norm"], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, slope)
    assert jax.tree.map(np.shape, gradient) == jax.tree.map(np.shape, model.lora)


def test_training_is_the_stages(model, trained, pipeline, tmp_path):
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in trained.history] == tiny.losses(pipeline)
    assert (model.objective, trained.objective) == ("none", "dail") and model.adapter is None
    trained.save_adapter(tmp_path / "adapter")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (pipeline / "adapter" / name).read_bytes(), name
    with pytest.raises(UserError, match="adapter: already exists"):
        trained.save_adapter(tmp_path / "adapter")
    again = dail_jax.load(f"{pipeline}.yaml", adapter=tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, again.lora.tree, trained.lora.tree)
    assert again.objective == "adapter" and again.config.train.lora == trained.config.train.lora


def test_evaluation_is_the_stages(trained, pipeline):
    found = trained.evaluate()
    want = json.loads((pipeline / "results.json").read_text())
    assert found.results == {**want, "arm": "dail"}
    assert found.samples == tiny.lines(pipeline / "samples.jsonl")
    cell = want["benchmarks"]["chain"]["96"]
    assert found.pass_at(4, "chain")._asdict() == cell["pass@k"]["4"]
    assert found.pass_at(1) == found.pass_at(1, "hard", 96)
    screen = io.StringIO()
    Console(file=screen, width=100).print(found)
    assert "chain" in screen.getvalue() and f"{100 * cell['pass@k']['4']['mean']:.1f}" in screen.getvalue()
    assert "chain" in found._repr_mimebundle_([], [])["text/html"]


def test_samples_are_the_models_own(trained):
    """Greedy ones are all the same, and the same as those of an evaluation at that temperature."""
    row = trained.rows("chain")[0]
    drawn = trained.sample(row, n=4, temperature=0)
    assert len(drawn) == 4 and len(set(drawn)) == 1 and drawn == trained.sample(row.problem, n=4, temperature=0)
    found = trained.evaluate({"chain": [row]}, samples=4, temperature=0)
    assert [one["text"] for one in found.samples] == [one.text for one in drawn]
    assert found.results["benchmarks"]["chain"]["96"]["mean_tokens"] == len(drawn[0].ids) > 0
    assert drawn[0].finish == "stop" and drawn[0].ids[-1] in trained.session.stops


def test_a_trace_shows_who_wrote_what(model):
    """And nothing that it holds reaches the terminal or the page as anything but text."""
    pieces = ["<b>", "x\x1b[31m", "&", "\n"]
    trace = traces_lib.Trace(
        problem_id="<p>",
        sample=1,
        response_ids=(1, 2, 3, 4),
        text="".join(pieces),
        log_student=(-0.5, None, -1.0, -2.0),
        writer="spps",
        acceptance=0.5,
        finish="stop",
    )
    shown = dail_jax.Trace.of(trace, model.rows(limit=1)[0], SimpleNamespace(pieces=lambda ids: pieces))
    page = shown._repr_html_()
    assert "&lt;b&gt;" in page and "<b>&lt;p&gt;/1: 4 tokens, 50% the student&#x27;s, complete</b>" in page
    assert "&amp;</span>" in page and "\x1b" not in page and "x\\x1b[31m" in page
    assert page.count("rgb(0 120 215") == 2 + 1 and page.count("border-bottom") == 2 + 1  # tokens, and the key
    assert 'title="student 0.607"' in page and 'title=""' in page
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="256", width=100).print(shown)
    text = screen.getvalue()
    assert "\x1b[36m<b>\x1b[0m" in text and "208mx\\x1b[31m\x1b[0m" in text and "\x1b[31m" not in text
    assert "proposed by the student and kept" in text and "written by the privileged student" in text
    assert shown.marked("wrong").problem == shown.problem and "dropped: wrong" in shown.marked("wrong")._repr_html_()
    assert dict(shown) == dict(trace)


def test_mistakes_are_told_in_one_line(model, tmp_path, monkeypatch):
    row = model.rows(limit=1)[0]
    trace = traces_lib.Trace(problem_id=row.problem_id, sample=0, response_ids=(5,), text="", finish="")
    bad = dail_jax.Trace.of(trace.marked("wrong"), row, model.session.tokenizer)
    plain = dail_jax.load(tiny.ASSETS / "model", settings={"model.dtype": "float32"})
    assert plain.config.data is None and plain.session.model == model.session.model
    (unsolved,) = model.rows([{"problem": "x"}])
    monkeypatch.chdir(tmp_path)
    for call, message in (
        (lambda: dail_jax.load("owner/model"), "owner/model: got no such folder, want one with a model, or a conf"),
        (lambda: dail_jax.load("demo", settings={"train.gama": 1}), "demo:train.gama: unknown key; did you mean"),
        (lambda: dail_jax.load("demo", mesh={"data": 3}), "mesh: got data=3 x fsdp=1 x tensor=1, want axis sizes"),
        (lambda: plain.rows(), "data: missing: want a source of rows here, or settings="),
        (lambda: plain.filter([]), "data: missing: grading wants settings="),
        (lambda: model.configured({"train.objective": "dial"}), "train.objective: got 'dial', want one of dail, "),
        (lambda: model.rollout(row, tau=2), r"rollout\(\):generate.tau: got 2, want less than or equal to 1"),
        (lambda: model.rollout(unsolved), f"{unsolved.problem_id}:solution: got no expert solution"),
        (lambda: model.rollout(row, n=0), r"rollout\(\):generate.samples: got 0, want greater"),
        (lambda: model.loss([trace]), "data: got Trace, want the traces that 'dail' learns from"),
        (lambda: model.loss([row]), "data: got Row, want the traces that 'dail' learns from"),
        (lambda: model.loss([]), "data: there is nothing to learn from"),
        (lambda: model.loss([bad]), r"nothing to train on: all 1 traces are dropped: 1 wrong \(filters.correct\)"),
        (lambda: model.loss([row], "grpo"), "method: 'grpo' learns from samples of its own"),
        (lambda: model.train([row], "none"), "method: 'none' learns from nothing"),
        (lambda: model.loss([row], "sft", gamma=-1), r"loss\(\):train.gamma: got -1, want greater"),
        (lambda: model.sample("1 " * 5000), "evaluate.max_prompt_tokens: got a prompt of "),
        (lambda: plain.evaluate(), "there is nothing to evaluate on"),
        (lambda: model.evaluate(model.rows([{"problem": "x", "answer": "?"}])), "rows:1:answer: got "),
        (lambda: model.save_adapter(tmp_path / "a"), "a: there is no adapter to save: train one"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_the_tour_is_true(tmp_path, monkeypatch):
    """The notebook runs, has the README's lines, what its text says holds, and its stored outputs are its own."""
    monkeypatch.chdir(tmp_path)
    stored, fresh = notebook.read(), notebook.read()
    space = notebook.run(fresh)
    code = ["".join(cell["source"]) for cell in fresh["cells"] if cell["cell_type"] == "code"]
    for page in ("README.md", "docs/python.md"):
        block = re.search(r"```python\n(import dail_jax\n.*?)```", (tiny.ROOT / page).read_text(), re.DOTALL)
        lines = [line for line in block[1].splitlines() if line]
        assert len(lines) <= 8 and set(lines) <= set("\n".join(code).splitlines()), page
    traces, parts, model = space["traces"], space["parts"], space["model"]
    assert [trace.sample for trace in traces] == [0, 1, 2, 3] and {t.problem for t in traces} == {model.rows()[1]}
    assert 0.5 < traces[0].acceptance < 1
    assert float(space["loss"]) == pytest.approx(float(parts["kl_privileged"] - 0.1 * parts["kl_negative"]), rel=1e-5)
    assert jax.tree.map(np.shape, space["gradient"]) == jax.tree.map(np.shape, model.lora)
    assert space["kept"] >= 6 and space["last"] < 0.6 * space["first"]
    assert space["before"].mean < 0.1 and space["after"].pass_at(1).mean > space["before"].mean + 0.2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    def outline(cells):
        return [[(o["output_type"], sorted(o.get("data", ()))) for o in cell.get("outputs", ())] for cell in cells]

    assert outline(stored["cells"]) == outline(fresh["cells"])
    (shown,) = [o["data"]["text/html"] for c in stored["cells"] for o in c.get("outputs", ()) if "<pre" in str(o)][:1]
    assert 'title="student 0.' in "".join(shown)
