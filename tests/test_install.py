"""The package as people install it: a wheel in an empty environment, used from another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import dail_jax
from dail_jax import config as config_lib
from dail_jax import launch, resources
from dail_jax.errors import UserError

ROOT = Path(__file__).parent.parent
# The demo with one arm, few rows and few samples.
SHORT = [
    "arms.base=null",
    "arms.sft=null",
    "arms.nll=null",
    "data.limit=8",
    "generate.slots=8",
    "train.epochs=1",
    "evaluate.samples=2",
    "evaluate.slots=8",
    "evaluate.bootstrap=20",
    *(f"evaluate.benchmarks.{i}.rows.limit=2" for i in range(3)),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment that holds a wheel of the project, and otherwise sees what the tests' own holds."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dail_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, cwd=folder)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, cwd=folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "env" / "lib" / version / "site-packages"
    # Its .pth files are not read there, so that this checkout stays out of sight.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin"


def call(command, folder):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=300)


def test_a_wheel_runs_the_demo_from_another_folder(tmp_path, installed):
    done = call([installed / "python", "-c", "import dail_jax; print(dail_jax.__file__)"], tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(installed.parent), done.stderr
    done = call([installed / "dail", "run", "demo", *SHORT], tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "demo" / "dail" / "results.json").read_text())
    assert results["benchmarks"].keys() == {"hard", "chain", "known"}
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()


def test_every_file_of_the_checkout_is_in_the_wheel(installed):
    (package,) = installed.parent.glob("lib/*/site-packages/dail_jax")

    def files(folder):
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder).as_posix() for path in found}

    assert files(package) == files(ROOT / "dail_jax") | {f"configs/{name}" for name in files(ROOT / "configs")}


@pytest.mark.parametrize("command", [["-m", "dail_jax"], ["-m", "dail_jax.launch"]])
def test_the_version(command, tmp_path, installed):
    done = call([installed / "python", *command, "--version"], tmp_path)
    assert (done.returncode, done.stdout) == (0, f"dail {dail_jax.__version__}\n"), done.stderr


def test_configurations_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"demo", "paper/tau", "qwen3_8b_reasoning"} <= set(resources.configurations())
    for name in ("demo", "pkg:demo.yaml", str(resources.CONFIGS / "demo.yaml")):
        assert config_lib.load(resources.configuration(name)).run_dir == "runs/demo"
    (tmp_path / "demo").write_text("run_dir: mine\nmodel: {path: pkg:microworld/assets/model}\n")
    config = config_lib.load(resources.configuration("demo"))  # a file of that name comes first
    assert config.run_dir == "mine"
    assert Path(config.model.path) == resources.PACKAGE / "microworld" / "assets" / "model"


@pytest.mark.parametrize("name", ["pkg:nope.yaml", "pkg:", "pkg:../pyproject.toml", "pkg:/etc/passwd"])
def test_what_does_not_come_with_the_package_is_refused(tmp_path, capsys, name):
    assert launch.main(["report", "--config", name]) == 2
    out = capsys.readouterr().err
    assert out.startswith(f"error: {name}: ") and "demo" in out and out.count("\n") == 1
    with pytest.raises(UserError, match="want a file that comes with the package"):
        config_lib.build({"run_dir": "x", "model": {"path": name}}, "test.yaml")


def test_a_name_that_is_no_configuration(capsys):
    assert launch.main(["run", "dmeo"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err
    assert launch.main(["run"]) == 2
    assert "want a configuration" in capsys.readouterr().err
