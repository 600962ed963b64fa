"""Resumable checkpoints: masters, moments and where the training stood, whole or not there.

The layouts `ddp` and `fsdp2` share one format, torch's distributed checkpoint: every process writes what it holds and
reads what it needs, so that sixteen processes neither gather 90 GB nor write it through one. DeepSpeed writes its own.
The published weights are something else: see `layouts.publish`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from appo.errors import UserError

MARKER = "COMPLETE"
LAYOUT = "layout.json"
STATE = "state"
SCHEDULER = "scheduler.pt"
# The frozen tower stands beside the model, and under LoRA so do the base's weights in their own folder.
_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)


class CheckpointMismatch(UserError, ValueError):
    """A checkpoint that this training cannot continue: what it was written by, what runs now, the remedy."""


def save_state(trainer: Any, folder: Path) -> None:
    """Write weights, moments and schedule; the marker that makes them count comes last (`WholeCheckpoints`)."""
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.is_deepspeed_enabled:
        # The frozen base of adapters is not written again; the masters of all else stand in DeepSpeed's optimizer.
        adapted = hasattr(trainer._policy(), "peft_config")
        trainer.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=adapted)
    else:
        model, optimizer = get_state_dict(
            trainer._policy(), trainer.optimizer.optimizer, options=_TRAINED_ONLY
        )
        state = {"model": model, "optimizer": optimizer}
        dcp.save(state, checkpoint_id=str(folder / STATE), no_dist=not _several())
    if trainer.is_world_process_zero():
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER)
        written_by = {"layout": layout_of(trainer), "processes": trainer.accelerator.num_processes}
        (folder / LAYOUT).write_text(json.dumps(written_by) + "\n", encoding="utf-8")


def load_state(trainer: Any, folder: Path) -> None:
    """The inverse of `save_state`, into a prepared trainer. DeepSpeed's part transformers has loaded by then."""
    if not trainer.is_deepspeed_enabled:
        policy, optimizer = trainer._policy(), trainer.optimizer.optimizer
        model, moments = get_state_dict(policy, optimizer, options=_TRAINED_ONLY)
        state = {"model": model, "optimizer": moments}
        dcp.load(state, checkpoint_id=str(folder / STATE), no_dist=not _several())
        set_state_dict(
            policy,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))


def layout_of(trainer: Any) -> str:
    """The layout that a trainer runs in; one process alone is `ddp` too."""
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp2" if trainer.is_fsdp_enabled else "ddp"


def check_layout(trainer: Any, folder: Path) -> None:
    """Raise CheckpointMismatch unless this training can continue from the checkpoint."""
    path = folder / LAYOUT
    if not path.is_file():
        raise CheckpointMismatch(
            f"{folder}: was written by an earlier version of appo; remove it to start again"
        )
    written_by = json.loads(path.read_text(encoding="utf-8"))
    now = {"layout": layout_of(trainer), "processes": trainer.accelerator.num_processes}
    # Torch's format is read by any number of processes; DeepSpeed's parts are one process's each.
    same = written_by == now if now["layout"].startswith("zero") else written_by["layout"] in ("ddp", "fsdp2")
    if not same:
        was = f"{written_by['processes']} processes with training.distributed={written_by['layout']}"
        raise CheckpointMismatch(
            f"{folder}: was written by {was}, and {now['processes']} with {now['layout']} run now; "
            "start as many as before, or remove it to start again"
        )
    step, updates = int(folder.name.rsplit("-", 1)[1]), trainer.num_iterations
    if step % updates:
        raise CheckpointMismatch(
            f"{folder}: lies between two updates of one rollout, whose completions are not in it "
            f"(training.updates_per_rollout={updates}); take the number it was written with, or remove it to start again"
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps; half-written ones are removed."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (path / MARKER).exists():
            whole.append((int(path.name.rsplit("-", 1)[1]), path))
        else:
            shutil.rmtree(path, ignore_errors=True)  # other processes do the same
    return max(whole)[1] if whole else None


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
