"""A setting -> the size of its checkpoints, and of all that a training leaves on a disk and in a bucket."""

from __future__ import annotations

from dataclasses import dataclass

from appo.planning.setting import Setting

# Resumable checkpoints that lie on a training's disk: two are kept, and a third is written before the oldest goes.
KEPT = 3


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Bytes. published: what evaluation, vLLM and the registry load, in `model.dtype`; adapters alone under LoRA.
    resumable: masters and moments. disk, bucket: the most that one training has of both; nothing removes resumable ones
    from a bucket.
    """

    published: float
    resumable: float
    disk: float
    bucket: float


def checkpoints(setting: Setting, *, saves: int) -> Checkpoints:
    """saves: resumable checkpoints over the whole training."""
    parameters = setting.architecture.parameters
    whole = parameters.total if setting.full else setting.trained
    published = float(whole * setting.computes)
    if setting.layout.startswith(
        "zero"
    ):  # DeepSpeed writes the weights that are computed with beside their masters
        resumable = setting.trained * (setting.computes + 12.0)
    else:
        resumable = setting.trained * 12.0
    return Checkpoints(
        published,
        resumable,
        disk=published + min(KEPT, saves) * resumable,
        bucket=published + saves * resumable,
    )
