"""A stand-in for GPUs: lets accelerate shard on CPU processes, which it otherwise refuses.

accelerate makes FSDP and DeepSpeed of accelerators only and falls back to plain copies on CPUs, in silence. The sharding
itself runs over gloo. `install` is called in each process that a test launches; `lifted` in the one that launches them,
since appo refuses what accelerate would replace. Everything else of a launch is as shipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def install() -> None:
    """Let accelerate's state treat this CPU process as one that has an accelerator."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _without_compiled_reductions()
    from accelerate import state

    make = state.AcceleratorState.__init__

    def init(self, *args, cpu=False, **kwargs):
        wanted = "DEEPSPEED" if _asked("DEEPSPEED") else "MULTI_GPU" if _asked("FSDP") else None
        if wanted is None or state.AcceleratorState._shared_state:
            make(self, *args, cpu=cpu, **kwargs)
            return
        state.PartialState(cpu=True)  # gloo, and "cpu" for a device
        state.PartialState._shared_state["distributed_type"] = state.DistributedType[wanted]
        os.environ["ACCELERATE_USE_CPU"] = "false"
        make(self, *args, cpu=False, **kwargs)

    state.AcceleratorState.__init__ = init


def _without_compiled_reductions() -> None:
    """DeepSpeed would compile an all-reduce over shared memory, for CPUs alone; gloo's needs no compiler."""
    if not _asked("DEEPSPEED"):
        return
    from deepspeed.comm import torch as backend

    backend.build_shm_op = lambda: None


def _asked(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


@contextmanager
def lifted() -> Iterator[None]:
    """appo launches sharded layouts on this machine although it has no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appo.training.launch.refuse_impossible", lambda *_, **__: None)
        yield


def assert_ran(trainer: object, layout: str) -> None:
    """The policy really lies as the layout says."""
    policy = trainer._policy()
    # The largest: DeepSpeed keeps small ones whole once they were used or loaded
    # (stage3_param_persistence_threshold), adapters among them; what they adapt is partitioned too.
    candidates = [
        p for p in policy.parameters() if (hasattr(p, "ds_id") if layout == "zero3" else p.requires_grad)
    ]
    parameter = max(candidates, key=lambda p: getattr(p, "ds_numel", p.numel()))
    if layout == "fsdp2":
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(policy, FSDPModule)
        assert parameter.to_local().numel() < parameter.numel()
    elif layout.startswith("zero"):
        import deepspeed

        assert isinstance(trainer.model_wrapped, deepspeed.DeepSpeedEngine)
        assert trainer.model_wrapped.zero_optimization_stage() == int(layout[-1])
        if layout == "zero3":
            assert parameter.shape == (0,)
            assert parameter.ds_tensor.numel() < parameter.ds_numel
    else:
        assert not hasattr(parameter, "ds_id")
        assert not hasattr(parameter, "full_tensor")
