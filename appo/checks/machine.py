"""Checks of the machine that trains: they need a GPU to ask.

Here is the place of a check "fits the machine", by the plan of what each GPU will hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from appo.checks.registry import Subject, check


def gpus() -> int:
    """How many GPUs this process may use. torch, which takes seconds to load, is asked only where there are any."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return 0
    import torch

    return torch.cuda.device_count()


@check("dtype", needs="gpu", remedy="set model.dtype to float32, or train on a GPU that computes in it")
def dtype(subject: Subject) -> Iterator[str]:
    import torch

    if subject.recipe.model.dtype != "bfloat16":
        return
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                name = torch.cuda.get_device_name(number)
                yield f"model.dtype=bfloat16: GPU {number} ({name}) does not compute in it"
                return
