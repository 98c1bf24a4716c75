"""Configurations: what is wrong is said in one line, with file, line or key, and the nearest known key."""

import functools
import itertools
import re
from pathlib import Path

import pytest

from dail_jax import config as config_lib
from dail_jax import launch, resources
from dail_jax.ahead import plan as plan_lib
from dail_jax.ahead import programs
from dail_jax.errors import UserError
from dail_jax.model import families
from dail_jax.stages import plan
from dail_jax.train import methods

CONFIGS = Path(__file__).parent.parent / "configs"
BASE = "run_dir: r\nmodel: {path: m}\n"


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config_lib.load(path, overrides)


def complaint(tmp_path, text, *overrides):
    """The error without the folder's name: one line."""
    with pytest.raises(UserError) as error:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{tmp_path}/", "")


BAD = {
    # unknown keys name the nearest known one, in their section or else anywhere
    "train: {gama: 0.2}": "c.yaml:train.gama: unknown key; did you mean 'gamma'?",
    "train: {lr: 1}": "c.yaml:train.lr: unknown key; did you mean 'train.optimizer.learning_rate'?",
    "train: {lora: {rnk: 3}}": "c.yaml:train.lora.rnk: unknown key; did you mean 'rank'?",
    "gamm: 1": "c.yaml:gamm: unknown key; did you mean 'train.gamma'?",
    "evaluate: {benchmarks: [{name: a, rows: {pth: x}}]}": "c.yaml:evaluate.benchmarks.0.rows.pth: unknown key; did you mean 'path'?",
    # URLs, of which the file system would make folders
    "traces: s3://bucket": "c.yaml:traces: got 's3://bucket', want a path on this machine, or a URL such as gs://bucket/name (or s3://, az://)",
    "data: {path: file:///rows.jsonl}": "c.yaml:data.path: got 'file:///rows.jsonl', want a path on this machine, or a URL such as gs://bucket/name (or s3://, az://)",
    "prompts: {negative: hf://a/b}": "c.yaml:prompts.negative: got 'hf://a/b', want a path on this machine, or a URL such as gs://bucket/name (or s3://, az://)",
    # duplicates
    "seed: 1\nseed: 2": 'c.yaml:4: not valid YAML: found duplicate key "seed" with value "2" (original value: "1")',
    "train: {gamma: 0.1, gamma: 0.2}": 'c.yaml:3: not valid YAML: found duplicate key "gamma" with value "0.2" (original value: "0.1")',
    # numbers that make no sense
    "train: {gamma: .nan}": "c.yaml:train.gamma: got nan, want a finite number",
    "train: {gamma: nan}": "c.yaml:train.gamma: got 'nan', want a finite number",
    "train: {optimizer: {learning_rate: .inf}}": "c.yaml:train.optimizer.learning_rate: got inf, want a finite number",
    "train: {optimizer: {learning_rate: -1}}": "c.yaml:train.optimizer.learning_rate: got -1, want greater than 0",
    "train: {optimizer: {learning_rate: 0}}": "c.yaml:train.optimizer.learning_rate: got 0, want greater than 0",
    "train: {optimizer: {b2: 1}}": "c.yaml:train.optimizer.b2: got 1, want less than 1",
    "train: {epochs: 0}": "c.yaml:train.epochs: got 0, want greater than or equal to 1",
    "train: {epochs: 2.5}": "c.yaml:train.epochs: got 2.5, want a valid integer, got a number with a fractional part",
    "generate: {tau: 1.5}": "c.yaml:generate.tau: got 1.5, want less than or equal to 1",
    "seed: true": "c.yaml:seed: got True, want a number",
    "seed: -1": "c.yaml:seed: got -1, want greater than or equal to 0",
    "prompts: {opening: 3}": "c.yaml:prompts.opening: got 3, want a valid string",
    # keys that do not go together
    "train: {batch_size: 10, accumulate: 4}": "c.yaml:train: batch_size must be a multiple of accumulate",
    "evaluate: {samples: 4, ks: [1, 8]}": "c.yaml:evaluate: ks must not exceed samples (4)",
    "evaluate: {budgets: [9999]}": "c.yaml:evaluate: budgets must not exceed sampling.max_tokens (4096)",
    "mesh: {data: -1, fsdp: -1}": "c.yaml:mesh: axis sizes must be positive, and at most one may be -1",
    "train: {lora: {targets: [q, q]}}": "c.yaml:train.lora: targets must be a non-empty list without repeats",
    # shapes
    "train: 3": "c.yaml:train: got 3, want a mapping of keys",
    "train:": "c.yaml:train: got None, want a mapping of keys",
    "1: 2": "c.yaml:1: got 1, want strings",
    "arms: {'a/b': {}}": "c.yaml:arms.a/b: got 'a/b', want pattern '^[A-Za-z0-9_,=-][A-Za-z0-9_.,=-]*$'",
    # YAML that nobody needs
    "seed: !!python/object/apply:os.system ['true']": "c.yaml:3: got the YAML tag tag:yaml.org,2002:python/object/apply:os.system, want plain values",
    "seed: !!int '3'": "c.yaml:3: got the YAML tag tag:yaml.org,2002:int, want plain values",
    "arms: &a {b: *a}": "c.yaml:3: got a YAML alias, want plain values",
    "train:\n\tepochs: 1": "c.yaml:4: not valid YAML: found character '\\t' that cannot start any token",
    "seed: [1": "c.yaml:4: not valid YAML: expected ',' or ']', but got '<stream end>'",
    "---\nb: 1": "c.yaml:3: not valid YAML: but found another document",
    "seed: \0": "c.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_keys_and_values(tmp_path, text):
    assert complaint(tmp_path, f"{BASE}{text}\n") == BAD[text]


@pytest.mark.parametrize(
    ("text", "want"),
    {
        "": "c.yaml: got an empty file, want a mapping of keys",
        "# nothing\n": "c.yaml: got an empty file, want a mapping of keys",
        "- a\n- b\n": "c.yaml: got a list, want a mapping of keys",
        "words\n": "c.yaml: got a str, want a mapping of keys",
        "run_dir: r\n": "c.yaml:model: missing, and it has no default",
        "run_dir: r\nmodel: {pth: m}\n": "c.yaml:model.pth: unknown key; did you mean 'path'?",
    }.items(),
)
def test_files_that_are_no_configuration(tmp_path, text, want):
    assert complaint(tmp_path, text) == want


def test_files_that_cannot_be_read(tmp_path):
    assert complaint(tmp_path, b"\xff\xfe\x00").startswith("c.yaml: cannot be read as UTF-8 text")
    with pytest.raises(UserError, match="no such file"):
        config_lib.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        config_lib.load(tmp_path)


def test_explosions_are_refused_at_once(tmp_path):
    """Nine levels of nine aliases would be 387 million values; nesting costs the reader more than linear time."""
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    assert complaint(tmp_path, bomb) == "c.yaml:2: got a YAML alias, want plain values"
    deep = "a: " + "[" * 5000 + "]" * 5000
    assert complaint(tmp_path, deep) == "c.yaml:1: got more than 50 levels, want plain values"


def test_numbers_are_numbers(tmp_path):
    got = load(tmp_path, BASE + "seed: 0x10\ntrain: {optimizer: {learning_rate: 1e-5, clip: 2}}\n")
    assert got.train.optimizer.learning_rate == 1e-5 and got.train.optimizer.clip == 2.0 and got.seed == 16
    assert load(tmp_path, b"\xef\xbb\xbf" + BASE.encode()).run_dir == "r"  # a byte order mark
    with pytest.raises(Exception, match="frozen"):
        got.seed = 4


def test_overrides(tmp_path):
    got = load(
        tmp_path,
        BASE,
        "train.optimizer.learning_rate=1e-5",
        "model.path=a=b",
        "train.lora.targets=[q, v]",
        "evaluate.benchmarks=[{name: x, rows: {path: y}}]",
        "evaluate.benchmarks.0.rows.limit=3",
    )
    assert got.train.optimizer.learning_rate == 1e-5 and got.model.path == "a=b"
    assert got.train.lora.targets == ("q", "v")
    assert got.evaluate.benchmarks[0].rows.limit == 3
    for override, want in {
        "seed": "got override 'seed', want key.sub=value",
        "=3": "got override '=3', want key.sub=value",
        "nope=1": "c.yaml:nope: unknown key; did you mean 'model'?",
        "train.gama=1": "c.yaml:train.gama: unknown key; did you mean 'gamma'?",
        "train.gamma=": "c.yaml:train.gamma: got None, want a valid number",
        "run_dir.x=1": "got override 'run_dir.x', but its parent is not a section",
        "run_dir.x.y=1": "got override 'run_dir.x.y', but 'x' is not inside a section",
        "seed=[1": "override seed:1: not valid YAML: expected ',' or ']', but got '<stream end>'",
        "seed=*a": "override seed:1: got a YAML alias, want plain values",
    }.items():
        assert complaint(tmp_path, BASE, override) == want


def test_a_resolved_configuration_reads_back(tmp_path):
    got = load(tmp_path, BASE, "train.optimizer.learning_rate=1e-5", "arms={a: {train.objective: nll}}", "seed=7")
    (tmp_path / "again.yaml").write_text(config_lib.dump(got))
    assert config_lib.load(tmp_path / "again.yaml") == got


def test_null_takes_an_arm_away(tmp_path):
    assert list(load(tmp_path, BASE, "arms={a: {train.objective: nll}, b: {}}", "arms.b=null").arms) == ["a"]
    # Their names may hold what separates the parts of a key, and a key from its value.
    arms = "arms={tau=0.5: {}, tau=0.8: {}, v1.5: {train.gamma: 0.2}, v1: {}}"
    assert list(load(tmp_path, BASE, arms, "arms.tau=0.5=null", "arms.v1.5=null").arms) == ["tau=0.8", "v1"]
    changed = load(tmp_path, BASE, arms, "arms.v1.5.train.gamma=0.3").arms
    assert changed["v1.5"] == {"train.gamma": 0.3} and changed["v1"] == {}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load(path):
    base = re.search(r"laid over (\w+\.yaml)", path.read_text())
    if base is None and "\nrun_dir:" in path.read_text():
        config = config_lib.load(path)
    else:
        config = config_lib.load(CONFIGS / (base[1] if base else "qwen3_8b_reasoning.yaml"), (), [str(path)])
    assert re.search(r"\bdail [a-z]+ ", path.read_text().split("\nrun_dir:")[0])  # the command that runs it
    for name, changes in config.arms.items():
        config_lib.with_overrides(config, {"arms": {}, **changes}, f"arms.{name}")
    assert not re.search(r"[\s:'\"]/\w", path.read_text())  # no place on anyone's machine


def test_paths_may_be_on_a_store(tmp_path):
    for key in ("run_dir", "model.path", "model.tokenizer", "data.path", "prompts.hint", "evaluate.adapter", "traces"):
        section, _, name = key.rpartition(".")
        config = load(tmp_path, BASE, f"{key}=gs://bucket/x/")
        assert getattr(getattr(config, section) if section else config, name) == "gs://bucket/x"
    assert load(tmp_path, BASE, "data.path=hub:org/name").data.path == "hub:org/name"


def test_the_papers_presets_evaluate_as_the_reference_does():
    """Budgets of thoughts, and 100 tokens for the answer of a reply that has none."""
    presets = [CONFIGS / f"{name}.yaml" for name in ("qwen3_8b_reasoning", "qwen2_5_7b_instruct")]
    for preset in presets:
        for overlay in ("", *sorted((CONFIGS / "paper").glob("*.yaml"))):
            cfg = config_lib.load(preset, (), [str(overlay)] if overlay else []).evaluate
            assert cfg.budget == "thoughts" and cfg.force is not None and cfg.force.max_tokens == 100
            assert "think" not in cfg.force.text and cfg.room == 100
            assert {b.pool for b in cfg.benchmarks if b.name.startswith("aime_")} in ({"aime_24_25"}, set())
    assert config_lib.load(presets[0]).evaluate.cuts == [512, 1024, 2048, 4096]
    assert config_lib.load(presets[1]).evaluate.cuts == [4096]


PRESETS = [CONFIGS / "qwen3_8b_reasoning.yaml", CONFIGS / "qwen2_5_7b_instruct.yaml"]


def arms_of(preset, overlay):
    config = config_lib.load(preset, (), [str(CONFIGS / "paper" / f"{overlay}.yaml")])
    return {
        name: config_lib.with_overrides(config, {"arms": {}, **changes}, name) for name, changes in config.arms.items()
    }


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_the_papers_presets_train_on_what_fits(preset):
    """Of a prompt as long as its limit and a response as long as its own, in every arm that learns from traces."""
    paths = sorted((CONFIGS / "paper").glob("*.yaml"))
    for overlay in (path.stem for path in paths if f"configs/{preset.name}" in path.read_text()):
        for name, own in arms_of(preset, overlay).items():
            method = methods.of(own)
            if method.reads_traces(own.train) and not method.rationalises:
                longest = own.generate.max_prompt_tokens + own.generate.sampling.max_tokens
                assert longest <= own.train.max_tokens, (overlay, name)
            assert own.prompts.max_solution_tokens is None  # they are cut to fit the prompt


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_the_papers_presets_drop_nothing_that_the_paper_keeps(preset):
    for overlay in sorted(p.stem for p in (CONFIGS / "paper").glob("*.yaml")):
        for own in arms_of(preset, overlay).values():
            assert own.filters.artefacts == () and own.filters.max_repetition == 1
            assert own.train.reduce == "sequence"  # as the reference implementation does
            assert own.filters.correct == own.filters.finished == ("qwen2_5" in preset.stem)


REAL = [*PRESETS, CONFIGS / "own_data.yaml", *sorted((CONFIGS / "paper").glob("*.yaml"))]


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_presets_for_real_models_have_a_base_arm_and_say_what_they_cost(path):
    text = path.read_text()
    under = [preset for preset in PRESETS if "\nrun_dir:" not in text and f"configs/{preset.name}" in text]
    for config in [config_lib.load(preset, (), [str(path)]) for preset in under] or [config_lib.load(path)]:
        arms = [
            config_lib.with_overrides(config, {"arms": {}, **changes}, name) for name, changes in config.arms.items()
        ]
        assert "none" in {arm.train.objective for arm in arms} and len(arms) > 1
    header = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(_is_comment, text.splitlines()))
    assert re.search(r"Hardware.*\b\d+ (chips|GPUs?)\b.*Memory: .*\d GB.*Hours, by estimate\b.*\d chip-hours", header)


RUN = re.compile(r"^#   dail run ((?:.*\\\n#)*.*)$", re.MULTILINE)
RUNS = [
    pytest.param(path, words.replace("\\\n#", " ").split(), id=f"{path.stem}-{i}")
    for path in REAL
    for i, words in enumerate(RUN.findall(path.read_text()))
]


def planned(words):
    """A command's configuration, the number of its chips, and the stored programs for them."""
    args = launch.parse(["run", *(word for word in words if not word.endswith(("=DIR", "=FILE")))])
    topology = re.search(r"\((v\de:(\d)x(\d)), ", (CONFIGS.parent / args.config[0]).read_text())
    assert topology is not None
    config = config_lib.load(
        CONFIGS.parent / args.config[0], args.overrides, [CONFIGS.parent / c for c in args.config[1:]]
    )
    known = plan.reports_of([str(CONFIGS.parent / "docs/measured/plans")], topology[1])
    return config, int(topology[2]) * int(topology[3]), known


@pytest.mark.parametrize(("path", "words"), RUNS)
def test_presets_fit_by_the_stored_plans_and_say_what_these_say(path, words):
    """For each command in a preset's header the stored plans have every program, all fit, and the header has the sums."""
    config, chips, known = planned(words)
    meshes, rows = functools.partial(programs.abstract_meshes, devices=chips), {}
    for own in plan.arms_of(config).values():
        folder = resources.model(own.model.path)
        for program in programs.programs_of(own, families.read_config(folder), *meshes(own.mesh)):
            if program.kind != "loss":
                rows[plan.key_of(folder, program)] = known[plan.key_of(folder, program)]
    assert all(row.fits and row.seconds for row in rows.values())
    lines = plan.lines_of(config, meshes, rows, plan_lib.Lengths(0.1), 256)
    hours, worst = (sum(getattr(line, name) for line in lines) for name in ("hours", "worst"))
    peak = max(row.peak_gb for row in rows.values())
    text = " ".join(line.removeprefix("# ") for line in itertools.takewhile(_is_comment, path.read_text().splitlines()))
    assert f"{peak:.0f} GB per chip" in text
    assert f"{hours:.1f}, which is {hours * chips:.0f} chip-hours; {worst:.1f}, {worst * chips:.0f}" in text


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def test_the_papers_ablations():
    assert {"base", "grpo", "dail"} == set(arms_of(PRESETS[1], "gpqa"))
    assert [own.generate.tau for name, own in arms_of(PRESETS[0], "tau").items() if name != "base"] == [
        0,
        0.1,
        0.2,
        0.3,
        0.5,
        0.7,
        0.8,
        0.9,
        0.99,
    ]
    arms = arms_of(PRESETS[0], "open_questions")
    rooms = {n: a.train.max_tokens - a.generate.sampling.max_tokens for n, a in arms.items() if n.startswith("length")}
    assert rooms["length_512"] == rooms["length_1024"] == 1792 and rooms["length_128"] >= 1792


def test_a_benchmark_reads_what_is_held_out(tmp_path):
    tree = {
        "run_dir": "r",
        "model": {"path": "m"},
        "data": {"path": "d.jsonl", "answer": "integer", "hold_out": {"rows": 5, "seed": 3}},
        "evaluate": {"benchmarks": [{"name": "mine", "rows": "held_out"}, {"name": "b", "rows": {"path": "b.jsonl"}}]},
    }
    made = config_lib.build(tree, "test.yaml")
    mine, other = made.evaluate.benchmarks
    assert (mine.rows.path, mine.answer, other.rows.hold_out) == ("d.jsonl", "integer", None)
    assert mine.rows.hold_out == config_lib.HoldOut(rows=5, seed=3, use="held_out")
    assert made.data is not None and made.data.hold_out == config_lib.HoldOut(rows=5, seed=3)
    assert config_lib.with_overrides(made, {"seed": 1}, "again").evaluate == made.evaluate
    del tree["data"]["hold_out"]
    with pytest.raises(UserError, match=r"test.yaml: a benchmark with rows: held_out wants data.hold_out"):
        config_lib.build(tree, "test.yaml")
