"""The paper's run from the demo's recipe, so that its shape stands still while shipped recipes may change."""

from __future__ import annotations

from appo.config import load_recipe

SEVEN = "model.path=Qwen/Qwen2.5-VL-7B-Instruct"
THREE = ("model.path=Qwen/Qwen2.5-VL-3B-Instruct", "video.num_frames=30")


def paper(*overrides):
    return load_recipe(
        "demo",
        [
            *(
                "data.source=nextgqa",
                "data.template=reasoning",
                "video.num_frames=16",
                "video.max_pixels=50176",
            ),
            *(SEVEN, "model.dtype=bfloat16", "model.warm_start=null", "training.gradient_checkpointing=true"),
            *("policy.max_completion_length=512", "training.distributed=fsdp2", "training.max_steps=-1"),
            *overrides,
        ],
    )


def changed(recipe, overrides):
    """As the command line does it: a recipe's text, and `--set`."""
    from appo.plan import resolve

    return resolve(recipe.to_json(), overrides)
