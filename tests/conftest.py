import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the suite's time is spent in XLA: what one test has compiled, no other test, process or worker compiles again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dail_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of machine code, which takes LLVM twice the time
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if importlib.metadata.version("jax").startswith("0.10."):  # as above; XLA refuses flags that it does not know
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)

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
