"""A checkpoint folder -> the policy as every pass runs it: our attention, released positions, rows on demand.

Also the one place that says which parts of a model train (vision tower frozen, LoRA).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from appo.modeling import attention, checkpoints, cpu_bfloat16, features, positions, windows

if TYPE_CHECKING:
    from appo.config import Model


def load_processor(path: str) -> Any:
    """The checkpoint's processor, padding on the left as generation wants it. Raises CheckpointError."""
    from transformers import AutoProcessor

    checkpoints.reach(path)
    with checkpoints.loading(path):
        processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    return processor


def load_policy(
    path: str, settings: Model, *, masters: bool = False, implementation: str = attention.NAME
) -> nn.Module:
    """Load, refuse what is not supported, and prepare.

    masters: parameters in float32 rather than in `model.dtype`, for full fine-tuning under autocast or FSDP2: at the
    learning rates of this field a bfloat16 weight is too coarse to move. implementation: "eager" only for comparison.
    Raises UnsupportedModel for an architecture that is not checked, CheckpointError for what cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    cpu_bfloat16.install(settings.dtype)
    dtype = torch.float32 if masters else getattr(torch, settings.dtype)
    checkpoints.reach(path)
    with checkpoints.loading(path):
        attention.check_supported(AutoConfig.from_pretrained(path))  # before gigabytes are read
        attention.register()
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=implementation
        )
    return prepare(model, freeze_vision=settings.freeze_vision)


def prepare(model: Any, *, freeze_vision: bool = True) -> Any:
    """Install what the passes rely on; safe to call twice (the reference model goes through it too)."""
    attention.check_supported(model.config)
    positions.install(model)
    features.install(model)
    windows.install(model)
    install_row_choice(model)
    if freeze_vision:
        features.base_model(model).visual.requires_grad_(False)
    return model


def install_row_choice(model: Any) -> None:
    """Let `model(..., scored=rows)` return hidden states of these rows only, so that the head sees no others.

    rows: (R,) for a packed batch of one, (B, R) otherwise. The frame probe, when given, keeps them too: a token's
    next-token distribution is made from the very row that predicts it.
    """
    base = features.base_model(model)
    if getattr(base, "_chooses_rows", False):
        return

    def choose(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        rows = kwargs.get("scored")
        if rows is None:
            return output
        hidden = output.last_hidden_state
        if rows.dim() == 1:
            hidden = hidden[:, rows]
        else:
            hidden = hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        probe = kwargs.get("frame_probe")
        if probe is not None and not probe.closed:
            probe.hidden = hidden.detach()
        output.last_hidden_state = hidden
        return output

    base.register_forward_hook(choose, with_kwargs=True)
    base._chooses_rows = True
