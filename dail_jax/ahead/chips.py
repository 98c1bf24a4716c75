"""The devices that a topology names, and the memory and speed of each."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

import jax

from dail_jax.errors import UserError

KNOWN = "cpu, gpu, or a TPU slice such as v5e:4x4, v5p:2x2x4, v6e:4x4"
LINKS = 1 / 8  # what a device exchanges along one mesh axis, of what its main memory carries; of TPUs about this
LATENCY = 10e-6  # seconds that an exchange takes for each doubling of the devices, however little it carries


@dataclass(frozen=True)
class Chip:
    """What one device has: HBM in GB (1e9 bytes), its bfloat16 peak in TFLOP/s, the HBM's bandwidth in GB/s; of a TPU its
    clock in GHz, which is the peak over what the units multiply in a cycle."""

    hbm: float
    peak: float
    bandwidth: float
    clock: float | None = None


CHIPS = {  # by a part of JAX's device kind; the first that fits counts
    "TPU v5 lite": Chip(16, 197, 819, 1.5),
    "TPU v5": Chip(95, 459, 2765, 1.75),
    "TPU v6 lite": Chip(32, 918, 1640, 1.75),
    "H200": Chip(141, 989, 4800),
    "H100": Chip(80, 989, 3350),
    "A100": Chip(80, 312, 2039),
}


def devices(topology: str) -> list:
    """The devices of a topology: local ones for cpu and gpu, otherwise those of a TPU slice; raises UserError."""
    if topology in ("cpu", "gpu"):
        try:
            return jax.devices(topology)
        except RuntimeError:
            raise UserError(
                f"got {topology!r}, but jax finds no such device here; want {KNOWN}", field="topology"
            ) from None
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


def chip(device) -> Chip | None:
    """What is known of a JAX device; None for kinds that the table does not have."""
    return next((c for kind, c in CHIPS.items() if kind in device.device_kind), None)
