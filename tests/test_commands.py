"""waypoints, prompts, select, sweep, calibrate: what they print and write."""

import json
import re
import subprocess
import sys

import pytest
import tiny

from dail_jax import config as config_lib
from dail_jax import launch
from dail_jax.data.prompts import PromptBuilder
from dail_jax.errors import UserError
from dail_jax.evaluate.passk import Difference
from dail_jax.stages import calibrate, experiment, recipes
from dail_jax.text import load_tokenizer
from dail_jax.train import methods


@pytest.fixture
def one():
    with tiny.alone():
        yield


def squeeze(text):
    """What was printed, without frames and spacing."""
    return " ".join("".join(c if c not in "│┃╭╮╰╯─━┏┓└┘┡┩┳╇┴┬┼├┤" else " " for c in text).split())


START = """
import sys
import jax
from dail_jax import launch
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
assert launch.main(["env", "--config", sys.argv[1]]) == 0
jax.block_until_ready(jax.jit(lambda x: x * 2 + 1)(jax.numpy.arange(8.0)))
print("found:", events.count("cache_hits"), "compiled:", events.count("cache_misses"))
"""


def test_compiled_programs_are_kept(tmp_path):
    """In the run directory: a second start compiles nothing again."""
    path = tiny.write(tmp_path / "run")
    env = {k: v for k, v in tiny.environment().items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", START, path], env=env, cwd=tiny.ROOT, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        counts.append(re.search(r"found: (\d+) compiled: (\d+)", done.stdout).groups())  # pyright: ignore
    (_, new), (again, none) = counts
    assert int(new) > 0 and again == new and none == "0"
    assert any((tmp_path / "run" / launch.PROGRAMS).rglob("*-cache"))


def test_waypoints_stand_beside_their_solution(tmp_path, capsys):
    rows = tiny.lines(tiny.ASSETS / "train.jsonl")[:12]
    path = tiny.write(tmp_path / "r", model__path="nowhere")  # no model is needed
    assert tiny.run("waypoints", path, "--row", rows[1]["problem_id"], "--row", "3") == 0
    out = capsys.readouterr().out
    for number in (2, 3):
        row = rows[number - 1]
        assert f"row {number}: {row['problem_id']}" in out
        assert row["solution"][:8] in out and row["answer"] in out
    assert "waypoints: 12 rows, " in out and "0 without a final answer" in out
    assert tiny.run("waypoints", path) == 0
    assert capsys.readouterr().out.count("row ") == 3
    assert tiny.run("waypoints", path, "--row", "13") == 2
    assert "train.jsonl:--row: got '13', want a problem_id or a number from 1 to 12" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_prompts_are_those_of_generation(tmp_path, capsys, pipeline):
    """The token counts are those that the traces record, and the text is the model's own, with control tokens."""
    path = tiny.write(tmp_path / "r")
    assert tiny.run("prompts", path, "--row", "1") == 0
    out = squeeze(capsys.readouterr().out)
    trace, row = tiny.lines(pipeline / "traces.jsonl")[0], tiny.lines(tiny.ASSETS / "train.jsonl")[0]
    for role in ("student", "privileged"):
        assert f"{role}: {trace['prompt_tokens'][role]} tokens" in out
    assert f"<|user|>{row['problem']}<|end|><|assistant|>" in out
    expert = load_tokenizer(tiny.ASSETS / "model").encode(row["solution"])
    assert f"expert: {len(expert) + 1} tokens" in out and "negative: " in out
    assert not (tmp_path / "r").exists()


def test_select_keeps_what_is_never_solved(tmp_path, one, capsys):
    chain, hard = (tiny.lines(tiny.ASSETS / f"{kind}.jsonl") for kind in ("chain", "hard"))
    chain.sort(key=lambda row: len(row["problem"]))
    rows = [chain[0], hard[0], chain[1]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tiny.write(tmp_path / "r", data={"path": str(tmp_path / "rows.jsonl")})
    assert tiny.run("select", path) == 0
    assert "1 of 3 problems were never solved in 4 samples" in capsys.readouterr().out
    assert tiny.lines(tmp_path / "r" / "selected.jsonl") == [hard[0]]
    per_problem = json.loads((tmp_path / "r" / "select" / "results.json").read_text())
    assert per_problem["benchmarks"]["selection"]["96"]["per_problem"][chain[0]["problem_id"]] == [4, 4]
    assert tiny.run("select", path) == 0  # a finished selection is not drawn again
    assert "already done" in capsys.readouterr().out


def test_combinations_are_named_by_what_differs():
    got = experiment.combinations(["train.gamma=0,0.1", "generate.tau=0.8"])
    assert got == {
        "gamma=0,tau=0.8": {"train.gamma": 0, "generate.tau": 0.8},
        "gamma=0.1,tau=0.8": {"train.gamma": 0.1, "generate.tau": 0.8},
    }
    assert list(experiment.combinations(["train.kl=reverse,forward"])) == ["kl=reverse", "kl=forward"]
    same = experiment.combinations(["generate.samples=1", "evaluate.samples=2"])  # one last part for two keys
    assert list(same) == ["generate.samples=1,evaluate.samples=2"]
    assert list(experiment.combinations(["data.path=a/b.jsonl"])) == ["path=a-b.jsonl"]
    for bad in ("gamma", "gamma=", "=1"):
        with pytest.raises(UserError, match=r"want key=a,b,c"):
            experiment.combinations([bad])
    with pytest.raises(UserError, match="twice"):
        experiment.combinations(["train.gamma=1,1"])


def test_sweep_runs_and_tabulates_every_value(tmp_path, one, pipeline, capsys, undrawn):
    path = tiny.write(
        tmp_path / "r", traces=str(pipeline / "traces.jsonl"), train__epochs=1, evaluate__samples=2, arms={"other": {}}
    )
    assert tiny.run("sweep", path, "--over", "train.gamma=0,0.3") == 0
    folders = [tmp_path / "r" / f"gamma={value}" for value in (0, 0.3)]
    assert [config_lib.load(f / "config.yaml").train.gamma for f in folders] == [0, 0.3]
    assert all((f / "adapter").is_dir() and not (f / "traces.jsonl").exists() for f in folders)
    table = (tmp_path / "r" / "results.md").read_text()
    assert all(f"| hard | gamma={value} |" in table for value in (0, 0.3)) and "other" not in table
    capsys.readouterr()
    assert tiny.run("sweep", path, "--over", "train.gama=0,1") == 2
    assert "arms.gama=0:train.gama: unknown key; did you mean 'gamma'?" in capsys.readouterr().err


def test_arms_share_traces_where_they_are_made_alike(tmp_path):
    arms = {
        "nll": {"train.objective": "nll"},
        "tau": {"generate.tau": 1},
        "star": {"train.objective": "star"},
        "grpo": {"train.objective": "grpo"},
        "nurl": {"train.objective": "nurl"},
    }
    config = config_lib.load(tiny.write(tmp_path / "r", arms=arms))
    shared = str(tmp_path / "r" / "traces.jsonl")
    got = {name: experiment.arm(config, name).traces for name in arms}
    assert got == {"nll": shared, "tau": None, "star": None, "grpo": None, "nurl": shared}


def test_calibrate_measures_roles_and_traces_by_tau(tmp_path, one, capsys):
    path = tiny.write(tmp_path / "r", data__limit=4, filters__artefacts=["add"])
    rows = {row["problem_id"]: row["answer"] for row in tiny.lines(tiny.ASSETS / "train.jsonl")}
    assert tiny.run("calibrate", path, "--tau", "0,0.6,0.99") == 0
    found = json.loads((tmp_path / "r" / "calibration.json").read_text())
    assert list(found["tau"]) == ["0", "0.6", "0.99"] and list(found["roles"]) == [
        "student",
        "privileged",
        "negative",
    ]
    assert found["tau"]["0"] == found["roles"]["student"]
    named = {"tau=0.6": found["tau"]["0.6"], "tau=0.99": found["tau"]["0.99"], **found["roles"]}
    for name, x in named.items():
        traces = tiny.lines(tmp_path / "r" / name / "traces.jsonl")
        assert x["traces"] == len(traces) == 8
        assert x["student's tokens"]["mean"] == pytest.approx(sum(t["acceptance"] for t in traces) / 8)
        right = [f"\\boxed{{{rows[t['problem_id']]}}}" in t["text"] for t in traces]
        assert x["right"]["mean"] == sum(right) / 8
        assert x["artefacts"]["mean"] == sum("add" in t["text"] for t in traces) / 8
    writers = [named[name]["student's tokens"]["mean"] for name in ("student", "tau=0.6", "tau=0.99", "privileged")]
    assert writers == sorted(writers, reverse=True) and writers[0] == 1 and writers[-1] == 0
    shares = [found["roles"][role]["right"]["mean"] for role in ("student", "privileged")]
    assert found["gain"]["mean"] == pytest.approx(shares[1] - shares[0])
    said = (tmp_path / "r" / "calibration.md").read_text()
    assert said.count("\n") == 15 and "The privileged student is" in said
    assert (tmp_path / "r" / "plots" / "tau.png").read_bytes().startswith(b"\x89PNG")
    assert "student's tokens %" in squeeze(capsys.readouterr().out)


def test_calibrate_draws_the_negative_reference_from_its_own_prompt(tmp_path, one):
    """The prompt of the role that is drawn in the privileged student's place."""
    path = tiny.write(tmp_path / "r", data__limit=2)
    config = config_lib.load(path)
    step = next(step for step in calibrate.steps(config, "0.5") if step.arm == "negative")
    rows = recipes.rows_of(config)
    tokenizer = load_tokenizer(config.model.path)
    of = [PromptBuilder(tokenizer, own.prompts, own.waypoints).build_all(rows) for own in (config, step.config)]
    assert [x.negative for x in of[0]] == [x.privileged for x in of[1]] != [x.privileged for x in of[0]]


@pytest.mark.parametrize(
    ("student", "privileged", "interval", "words"),
    [
        (
            0.05,
            0.6,
            (0.5, 0.6),
            "is a teacher: right in 60.0% of its samples, the student alone in 5.0% .difference 55.0 ",
        ),
        (
            0.5,
            0.55,
            (0.01, 0.09),
            "is hardly better than the student: .* DAIL has no teacher here. Show it the solution",
        ),
        (0.05, 0.05, (-0.05, 0.05), "is no better, as far as these samples tell, than the student"),
    ],
)
def test_whether_there_is_a_teacher_is_said_in_plain_words(student, privileged, interval, words):
    gain = Difference(privileged - student, *interval, 0.5, 1, 1, 0)
    assert re.match(f"The privileged student {words}", calibrate.verdict(student, privileged, gain))


COMMAND = re.compile(r"^#   dail (\w+) ((?:.*\\\n#)*.*)$", re.MULTILINE)


@pytest.mark.parametrize("path", sorted((tiny.ROOT / "configs" / "paper").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_paper_s_presets_are_complete(path, monkeypatch):
    """Every command in a preset's header is one that the command line takes, and each of its arms is valid."""
    monkeypatch.chdir(tiny.ROOT)
    text = path.read_text()
    assert "# Paper:" in text or "# The paper" in text or "Not in the paper" in text  # what it found
    commands = COMMAND.findall(text)
    assert any(str(path.relative_to(tiny.ROOT)) in words for _, words in commands)
    for stage, words in commands:
        args = launch.parse([stage, *words.replace("\\\n#", " ").split()])
        config = config_lib.load(args.config[0], args.overrides, args.config[1:])
        for name in config.arms:
            own = experiment.arm(config, name)
            assert (own.data is not None and own.train.objective == "none") or own.train.max_tokens > 0
            if methods.of(own).source == "samples":
                assert own.train.online.sampling.max_tokens + own.generate.max_prompt_tokens <= own.train.max_tokens


def test_overrides_may_stand_anywhere(capsys):
    args = launch.parse(["compile", "a.b=1", "--config", "c.yaml", "c.d=2", "--only", "x", "e.f=3"])
    assert args.overrides == ["a.b=1", "c.d=2", "e.f=3"] and args.only == "x"
    args = launch.parse(["compile", "--config", "d.yaml", "c.yaml", "--only", "x", "c.d=2", "--config", "e.yaml"])
    assert args.config == ["c.yaml", "d.yaml", "e.yaml"] and args.overrides == ["c.d=2"]
    for words in (["--nothing"], ["--only", "x", "--n=1"]):
        with pytest.raises(SystemExit):
            launch.parse(["compile", "a.b=1", "--config", "c.yaml", "c.d=2", *words])
        assert "unrecognized arguments" in capsys.readouterr().err
