"""The name of an accelerator -> what its maker says it can do; where none is known, one matrix product says.

Dense figures, without sparsity, from the makers' data sheets. MFU is a fraction of these, so that runs on one card can
be compared; a measured product is what that machine reaches at best, and lower.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

_MEASURED_SIDE, _MEASURED_S = 4096, 0.05


@dataclass(frozen=True, slots=True)
class Device:
    """memory_gib: as sold. bfloat16, float32: operations a second in matrix products, the latter without TF32.
    bandwidth: bytes a second of its memory.
    """

    name: str
    memory_gib: float
    bfloat16: float
    float32: float
    bandwidth: float

    def peak(self, dtype: str) -> float:
        return self.bfloat16 if dtype == "bfloat16" else self.float32


# A longer name stands before the shorter one that it holds: the first that is found in a device's name counts.
DEVICES = (
    Device("H200", 141, 989e12, 67e12, 4.8e12),
    Device("H100 NVL", 94, 835e12, 60e12, 3.9e12),
    Device("H100 PCIe", 80, 756e12, 51e12, 2.0e12),
    Device("H100", 80, 989e12, 67e12, 3.35e12),
    Device("H20", 96, 148e12, 44e12, 4.0e12),
    Device("A100-SXM4-40GB", 40, 312e12, 19.5e12, 1.555e12),
    Device("A100", 80, 312e12, 19.5e12, 2.039e12),
    Device("L40S", 48, 362e12, 91.6e12, 0.864e12),
    Device("A40", 48, 149.7e12, 37.4e12, 0.696e12),
    Device("L4", 24, 121e12, 30.3e12, 0.3e12),
    Device("A10G", 24, 70e12, 35e12, 0.6e12),
    Device("A10", 24, 125e12, 31.2e12, 0.6e12),
    Device("RTX 4090", 24, 165.2e12, 82.6e12, 1.008e12),
    Device("RTX 3090", 24, 71e12, 35.6e12, 0.936e12),
)
# What a GPU of a given size is taken for where only its memory is known: the slower of the usual ones.
_BY_MEMORY = ((28, "A10"), (56, "A40"), (84, "A100"), (float("inf"), "H200"))


def known(name: str) -> Device | None:
    """The entry for a device as CUDA names it, e.g. "NVIDIA H100 80GB HBM3"; None for another one."""
    return next((device for device in DEVICES if device.name.lower() in name.lower()), None)


def of_memory(memory_gib: float) -> Device:
    """The card that a GPU of so much memory is taken for."""
    wanted = next(name for limit, name in _BY_MEMORY if memory_gib <= limit)
    return next(device for device in DEVICES if device.name == wanted)


def peak_here(dtype: str) -> tuple[float, str]:
    """Operations a second of this process's device in matrix products of `dtype`, and where the figure comes from.

    Published for a known GPU, else measured with square products for a twentieth of a second.
    """
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if (device := known(name)) is not None:
            return device.peak(dtype), f"published for {device.name}"
        where = torch.device("cuda")
    else:
        name, where = "this CPU", torch.device("cpu")
    return _measured(dtype, where), f"measured on {name}"


def _measured(dtype: str, where: object) -> float:
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    side = _MEASURED_SIDE if torch.cuda.is_available() else _MEASURED_SIDE // 8
    generator = torch.Generator().manual_seed(0)  # no draw of the training's
    one = torch.randn(side, side, generator=generator).to(where, getattr(torch, dtype))
    out = one @ one  # kernels are chosen
    best, until = 0.0, time.perf_counter() + _MEASURED_S
    while time.perf_counter() < until:
        wait()
        began = time.perf_counter()
        torch.mm(one, one, out=out)
        wait()
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best
