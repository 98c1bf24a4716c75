"""The devices that a topology names, and the memory and speed of each."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

import jax

from dail_jax.errors import UserError

KNOWN = "cpu, gpu, a TPU slice such as v5e:4x4, v5p:2x2x4, v6e:4x4, or GPUs such as h100:8, h200:2x8"
LINKS = 1 / 8  # what a device exchanges along one mesh axis, of what its main memory carries; about this, TPU or NVLink
GPU_MEMORY = 0.92  # the share of a GPU's memory that `launch` lets JAX take, whose own default is 0.75
LATENCY = 10e-6  # seconds that an exchange takes for each doubling of the devices, however little it carries


@dataclass(frozen=True)
class Chip:
    """What one device has: HBM in GB (1e9 bytes), its bfloat16 peak in TFLOP/s, the HBM's bandwidth in GB/s; of a TPU its
    clock in GHz, which is the peak over what the units multiply in a cycle."""

    hbm: float
    peak: float
    bandwidth: float
    clock: float | None = None

    @property
    def usable(self) -> float:
        """GB that programs may fill."""
        return self.hbm if self.clock else GPU_MEMORY * self.hbm


CHIPS = {  # by a part of JAX's device kind; the first that fits counts
    "TPU v5 lite": Chip(16, 197, 819, 1.5),
    "TPU v5": Chip(95, 459, 2765, 1.75),
    "TPU v6 lite": Chip(32, 918, 1640, 1.75),
    "H200": Chip(141, 989, 4800),
    "H100": Chip(80, 989, 3350),
    "A100": Chip(80, 312, 2039),
}


@dataclass(frozen=True)
class Gpu:
    """What XLA's GPU compiler asks about a device that is not there: JAX's name for its kind, its compute capability, its
    number of multiprocessors, the float32 units and the KB of shared memory of each, MB of L2 cache, and the clock in GHz."""

    kind: str
    capability: tuple[int, int]
    cores: int
    units: int
    shared: int
    cache: int
    clock: float


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 40, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 50, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 228, 50, 1.98),
}


def devices(topology: str) -> list:
    """The devices of a topology: local ones for cpu and gpu, otherwise those of a TPU slice, or GPUs that need not be
    there; raises UserError."""
    if topology in ("cpu", "gpu"):
        try:
            return jax.devices(topology)
        except RuntimeError:
            raise UserError(
                f"got {topology!r}, but jax finds no such device here; want {KNOWN}", field="topology"
            ) from None
    if found := re.fullmatch(rf"({'|'.join(GPUS)}):(?:([1-9]\d*)x)?([1-9]\d*)", topology):
        return _gpus(GPUS[found[1]], hosts=int(found[2] or 1), each=int(found[3]))
    if not re.fullmatch(r"v\d+\w*:[1-9]\d*(x[1-9]\d*)*", topology):
        raise UserError(f"got {topology!r}, want {KNOWN}", field="topology")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install 'dail_jax[tpu]'", field="topology")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever the installed libtpu says about names that it does not know
        raise UserError(
            f"got {topology!r}, which libtpu refuses ({str(error).splitlines()[0]}); want {KNOWN}", field="topology"
        ) from None


def _gpus(gpu: Gpu, hosts: int, each: int) -> list:
    """Described devices of so many hosts, from which programs are compiled by the plugin for CUDA; it needs no driver."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            "compiling for a GPU needs JAX's plugin for CUDA: pip install 'dail_jax[cuda]'", field="topology"
        )
    from jax.experimental import topologies

    jax.devices()  # plugins are found when the first backend starts
    known = next(c for kind, c in CHIPS.items() if kind in gpu.kind)
    return list(
        topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{each}", target_config=_target(gpu, known)
        ).devices
    )


def _target(gpu: Gpu, known: Chip) -> str:
    """XLA's description of a GPU (`GpuTargetConfigProto`); what all kinds have in common is CUDA's."""
    major, minor = gpu.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.kind}"
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            core_count: {gpu.cores}
            fpus_per_core: {gpu.units}
            clock_rate_ghz: {gpu.clock}
            memory_bandwidth: {known.bandwidth * 1e9:.0f}
            device_memory_size: {known.hbm * 1e9:.0f}
            l2_cache_size: {gpu.cache << 20}
            shared_memory_per_core: {gpu.shared << 10}
            shared_memory_per_block: {48 << 10}
            shared_memory_per_block_optin: {(gpu.shared - 1) << 10}
            threads_per_warp: 32
            threads_per_block_limit: 1024
            threads_per_core_limit: 2048
            registers_per_core_limit: 65536
            registers_per_block_limit: 65536
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
        }}
    """


def chip(device) -> Chip | None:
    """What is known of a JAX device; None for kinds that the table does not have."""
    return next((c for kind, c in CHIPS.items() if kind in device.device_kind), None)
