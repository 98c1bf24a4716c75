import types

import environment  # noqa: F401  (before jax)
import jax
import pytest

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib

jax.config.update("jax_default_matmul_precision", "highest")


def mesh_of(data=1, fsdp=1, tensor=1):
    """A mesh over the first data x fsdp x tensor of the eight fake devices."""
    return mesh_lib.make_mesh(
        config_lib.Mesh(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor]
    )


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of other things: plots, which take seconds to draw, are empty files."""
    from dail_jax.report import plots

    blank = types.SimpleNamespace(savefig=lambda path, **_: path.write_bytes(b""))
    monkeypatch.setattr(plots, "_figure", lambda *_: blank)


@pytest.fixture(scope="session")
def one_device():
    return mesh_of()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The finished run of all stages on the tiny configuration, on one device of this process."""
    import tiny

    path = tiny.write(tmp_path_factory.mktemp("pipeline") / "run")
    with tiny.alone(), tiny.no_network():
        for stage in tiny.STAGES:
            assert tiny.run(stage, path) == 0
    return path.with_suffix("")


@pytest.fixture(scope="session")
def synthetic_runs(tmp_path_factory):
    """The folders of three synthetic arms by name, and the traces that they share; nobody writes to them."""
    import synthetic

    root = tmp_path_factory.mktemp("synthetic")
    runs = {arm: synthetic.make_run(root / arm, arm) for arm in synthetic.SKILL}
    return runs, synthetic.make_traces(root / "shared" / "traces.jsonl")
