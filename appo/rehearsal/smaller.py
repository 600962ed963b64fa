"""A recipe -> the recipe that is rehearsed, and what `appo plan` counts for each phase of it on a CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from appo.config import Recipe, parse_recipe
from appo.modeling.sizes import Architecture
from appo.planning.memory import moments, standing
from appo.planning.setting import frames_of, on_cpu, settings_of

GIB = 1 << 30
COMPLETIONS, TOKENS = 2, 16
SIDE = 28  # pixels; sides of frames are multiples of it
# Phase -> the moments of the plan that lie in it. The probe and the token weights run inside the update's forward pass.
MOMENTS = {
    "look": ("look", "encode"),
    "rollout": ("rollout",),
    "scoring": ("score",),
    "probe": ("update: end of the forward pass",),
    "weights": ("update: end of the forward pass",),
    "update": ("update",),
    "optimizer": ("optimizer",),
}
# What lies there from the first step to the last is all that these hold.
STANDING = ("load", "checkpoint", "publish")


def rehearsed(recipe: Recipe, model: Path | str) -> Recipe:
    """The recipe with its frames, pixels, template and decoding; adapters, one prompt, one step, a synthetic video.

    model: the checkpoint, which need not be there yet.
    """
    frames = frames_of(recipe)
    algorithm = "appo" if "appo" in recipe.algorithms else recipe.algorithms[0]
    tokens = min(TOKENS, recipe.policy.max_completion_length)
    values = recipe.model_dump(mode="json")
    values["algorithms"] = [algorithm]
    values["data"] = {
        "source": "key_moment",
        "template": recipe.data.template,
        "workers": 1,
        "key_moment": {
            "train": 1,
            "validation": 1,
            "test": 1,
            "easy_train": 0,
            "num_frames": max(4, frames + frames % 2),
            "size": max(SIDE, int(recipe.video.max_pixels**0.5) // SIDE * SIDE),
            "distractors": 1,
        },
    }
    # Spread over the video by number: one frame a second is all that the synthetic video has.
    values["video"] |= {"num_frames": frames, "fps": None}
    values["model"] |= {"path": str(model), "dtype": "bfloat16", "warm_start": None}
    values["model"]["lora"] = values["model"]["lora"] or {}
    values["policy"] |= {
        "algorithm": algorithm,
        "num_generations": COMPLETIONS,
        "max_completion_length": tokens,
        "overlong_buffer": min(tokens, recipe.policy.overlong_buffer),
        "dynamic_sampling": False,
        "judge": {},
    }
    # Random weights answer nothing: with every completion "right" there are crucial frames to weigh tokens by.
    values["perception"] |= {"tau": -1.0}
    values["training"] |= {
        "prompts_per_step": 1,
        "gradient_accumulation_steps": 1,
        "updates_per_rollout": 1,
        "max_steps": 1,
        "save_every": 1,
        "seeds": [0],
        "rollout": "transformers",
        "distributed": "ddp",
        "feature_cache_dir": None,
    }
    values["evaluation"] |= {
        "benchmarks": ["key_moment"],
        "annotations": None,
        "videos": None,
        "max_tokens": TOKENS,
        "max_num_seqs": 1,
        "seeds": 1,
        "data_parallel": 1,
        "limit": None,
    }
    return parse_recipe(json.dumps(values))


def planned(recipe: Recipe, architecture: Architecture, prompt: Mapping[str, Any] | None) -> dict[str, float]:
    """GiB of tensors by phase, as `appo plan` counts them for one process on a CPU.

    recipe: as `rehearsed`, with a model whose sizes are known. architecture: with as many layers as are built. prompt:
    what the processor made (`stages.prompt`), in place of the plan's guess; None before it has.
    """
    (setting,), load, _ = settings_of(recipe, 1)
    (setting,) = on_cpu([replace(setting, architecture=architecture)])
    if prompt is not None:
        grids = tuple((t, h, w) for t, h, w in prompt["grids"])
        load = replace(
            load, prompt=prompt["tokens"], visual=prompt["visual"], grids=grids, frames=prompt["frames"]
        )
    # One held-out sample is all that a rehearsal looks at.
    load = replace(load, looked_at=1)
    found = moments(setting, load)
    gib = {name: sum(standing(setting, 0.0).values()) / GIB for name in STANDING}
    for phase, names in MOMENTS.items():
        if totals := [moment.total / GIB for moment in found if moment.name.startswith(names)]:
            gib[phase] = max(totals)
    return {name: round(value, 4) for name, value in gib.items()}
