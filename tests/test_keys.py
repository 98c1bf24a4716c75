"""The configuration's keys: every one is described, misspelt ones are recognised, and the reference page is current."""

from pathlib import Path

import pytest

from dail_jax import config as config_lib
from dail_jax import keys, launch
from dail_jax.data.waypoints import EXTRACTORS
from dail_jax.evaluate.answers import ANSWERS
from dail_jax.stages.samplers import SAMPLERS
from dail_jax.train.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
EVERY = keys.all_keys(config_lib.Config)
PATHS = [key.path for key in EVERY]


def test_every_key_has_a_description():
    """Sentences below the key; every section has a docstring of its own."""
    sections = {config_lib.Config, *(key.section for key in EVERY if key.section)}
    assert len(EVERY) > 150 and len(sections) > 15
    assert not [key.path for key in EVERY if not (key.description.endswith(".") and key.description[0].isupper())]
    assert not [section for section in sections if "__doc__" not in vars(section)]


def test_the_reference_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == keys.markdown(config_lib.Config), f"write it again: {keys.GENERATED}"


def test_descriptions_name_all_that_is_registered():
    for path, registry in {
        "train.objective": METHODS,
        "waypoints.extractor": EXTRACTORS,
        "evaluate.sampler": SAMPLERS,
        "evaluate.benchmarks.N.answer": ANSWERS,
    }.items():
        description = keys.find(config_lib.Config, path).description
        assert not [name for name in registry if name not in description], path
    settings = {key for method in METHODS.values() for key in method.settings}
    assert not [key for key in settings if f"`{key}`" not in keys.find(config_lib.Config, "train.loss").description]


def test_what_is_known_of_a_key():
    def of(path):
        key = keys.find(config_lib.Config, path)
        return key.type, key.shown_default, key.allowed

    assert of("train.gamma") == ("number", "0.1", ">= 0")
    assert of("train.kl") == ("text", '"reverse"', "one of reverse, forward")
    assert of("seed") == ("integer", "3407", ">= 0 and < 4294967296")
    assert of("filters.keep") == ("integer or text", "1", ">= 1, or all")
    assert of("model.path") == ("path", "none: must be set", "")
    assert of("model.tokenizer") == ("path or null", "null", "")
    assert of("evaluate.benchmarks") == ("list of sections", "[]", "")
    assert of("evaluate.benchmarks.0.rows.columns.choices")[0] == "text or list of texts or null"
    assert of("train.lora.targets")[2] == "one of q, k, v, o, gate, up, down, in_qkv, in_z, in_b, in_a, out"
    assert of("train.lora") == ("section", "", "")
    # one type of section, with the defaults of the place
    assert of("generate.sampling.temperature")[1] == of("train.online.sampling.temperature")[1] == "1.0"
    assert of("evaluate.sampling.temperature")[1] == "0.6"
    assert of("pretrain.optimizer.name")[1] == '"muon"' and of("train.optimizer.name")[1] == '"adamw"'


MISSPELT = {
    "train.lr": ["train.optimizer.learning_rate", "pretrain.optimizer.learning_rate"],
    "optimizer.lr": ["train.optimizer.learning_rate", "pretrain.optimizer.learning_rate"],
    "learning_rate": ["train.optimizer.learning_rate", "pretrain.optimizer.learning_rate"],
    "pretrain.lr": ["pretrain.optimizer.learning_rate", "train.optimizer.learning_rate"],
    "train.gama": ["train.gamma"],
    "gamm": ["train.gamma"],
    "evaluate.temperature": ["evaluate.sampling.temperature"],
    "train.lora.rnk": ["train.lora.rank"],
    "evaluate.benchmarks.3.nam": ["evaluate.benchmarks.N.name"],
    "data.id": ["data.columns.problem_id"],
    "train.bs": ["train.batch_size"],
}


@pytest.mark.parametrize("path", MISSPELT)
def test_a_misspelt_key_is_recognised(path):
    want = MISSPELT[path]
    assert keys.nearest(path, PATHS)[: len(want)] == want


def test_shared_keys_are_one_section():
    for section in (config_lib.Generate, config_lib.Online, config_lib.Evaluate):
        assert issubclass(section, config_lib.Inference)
    shared = set(config_lib.Inference.model_fields)
    assert shared == {"slots", "pages", "kv_dtype", "max_prompt_tokens", "sampling"}
    for section in (config_lib.Generate, config_lib.Online):
        assert not shared & set(section.__annotations__)
    # its keys stand where they stood in files of earlier versions
    older = shared - {"pages", "kv_dtype"}
    assert {f"{s}.{k}" for s in ("generate", "train.online", "evaluate") for k in older} < set(PATHS)


def test_the_command_explains(capsys):
    assert launch.main(["config", "--explain", "train.optimizer.learning_rate"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "train.optimizer.learning_rate\n  type:    number\n  default: 0.0002\n  allowed: > 0\n\n  Peak"
    )
    assert launch.main(["config", "--explain", "train.optimizer"]) == 0
    out = capsys.readouterr().out
    assert all(f"train.optimizer.{name} " in out for name in config_lib.Optimizer.model_fields)
    assert "Muon on matrices" in out
    assert launch.main(["config", "--explain", "train.lr"]) == 2
    assert capsys.readouterr().err == (
        "error: train.lr: unknown key; did you mean 'train.optimizer.learning_rate' or "
        "'pretrain.optimizer.learning_rate'?\n"
    )
    assert launch.main(["config"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in config_lib.Config.model_fields)
    assert launch.main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8")


def test_the_command_prints_what_a_file_resolves_to(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\nmodel: {path: m}\n")
    assert launch.main(["config", "--config", str(path), "train.gamma=0.3"]) == 0
    path.write_text(capsys.readouterr().out)
    assert config_lib.load(path).train.gamma == 0.3
