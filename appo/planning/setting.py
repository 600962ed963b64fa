"""A recipe and a number of GPUs -> how one process is set up, and how much of a step's work it has.

Every process has the same share. Where a recipe does not say how long things are, the longest that it allows is taken,
and the notes of `settings_of` say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from appo.errors import SettingError
from appo.modeling import counts
from appo.modeling.architecture import TinyShape, architecture_of, read_config, tiny_config
from appo.modeling.sizes import Architecture
from appo.policy import settings_for

if TYPE_CHECKING:
    from appo.config import Recipe

# Of a prompt: a question with its options and the chat template's own tokens; measured on the sources' records it is 60
# to 150. The templates' instructions come on top.
QUESTION_TOKENS = 120
CHARACTERS_PER_TOKEN = 4
# Qwen3-VL writes every temporal patch as a block of its own, with its time in text.
TOKENS_OF_A_TIME = 10
# The demo's model spells with at most so many tokens (`appo.training.tiny`).
TINY_VOCABULARY = 1039
# The groups that are looked at before the first step and after the last (`appo.training.run`, `.diagnosis`).
LOOKED_AT, LOOKED_AT_ONCE = 32, 16
SOURCES_WITH_IMAGES = ("seed_bench_r1",)


class PlanError(SettingError):
    """A run that cannot be planned: the setting, its value, the remedy."""


class Undivided(PlanError):
    """A step whose completions cannot be divided evenly over the GPUs."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One process. dtype: what passes compute in. layout: of `training.distributed`. targets: modules with adapters,
    empty for full fine-tuning. reference: a frozen copy of the policy. scores_first: a pass before the update. on_gpu:
    kernels are CUDA's; a CPU's keep other things.
    """

    architecture: Architecture
    dtype: str
    layout: str
    processes: int
    rank: int
    targets: tuple[str, ...]
    checkpointing: bool
    shared_prefix: bool
    trains_tower: bool
    features_kept: bool
    rollout: str
    rollout_bytes: float
    reference: bool
    reads_attention: bool
    scores_first: bool
    probe_bytes: float
    engine_share: float
    on_gpu: bool = True

    @property
    def full(self) -> bool:
        return not self.targets

    @property
    def computes(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def masters_are_parameters(self) -> bool:
        """float32 parameters that autocast rounds for each product, in place of a copy that is computed with."""
        return self.computes == 2 and self.full and self.layout == "ddp"

    @property
    def stream(self) -> int:
        """Bytes of a number in the residual stream: embeddings under autocast stay as they are stored."""
        return 4 if self.masters_are_parameters else self.computes

    @property
    def casts(self) -> bool:
        """Whether each product rounds its own copy of its input: autocast keeps copies of weights only."""
        return self.computes == 2 and (self.masters_are_parameters or not self.full)

    @property
    def shards(self) -> int:
        """Parts that masters and moments lie in."""
        return 1 if self.layout == "ddp" else self.processes

    @property
    def parameters_sharded(self) -> bool:
        return self.layout in ("fsdp2", "zero3")

    @property
    def base(self) -> int:
        """Parameters of text and head, and of the tower where it trains."""
        parameters = self.architecture.parameters
        return parameters.text + parameters.head + (parameters.tower if self.trains_tower else 0)

    @property
    def trained(self) -> int:
        if self.full:
            return self.base
        return counts.adapters(self.architecture, self.targets, self.rank)


@dataclass(frozen=True, slots=True)
class Load:
    """What one process works on in a step, every completion at its longest.

    groups: prompts that it draws completions of; members: completions of each, all `group_size` of a group or a part;
    rows: completions of one micro-batch; micro_batches: passes whose gradients are added up. prompt, visual: tokens, the
    latter of its videos and images. grids: patches of a prompt's videos and images, before merging.
    """

    groups: int
    members: int
    group_size: int
    rows: int
    micro_batches: int
    prompt: int
    visual: int
    grids: tuple[counts.Grid, ...]
    completion: int
    frames: int
    looked_at: int

    @property
    def group(self) -> counts.Group:
        return counts.Group(self.prompt, (self.completion,) * self.members)

    @property
    def groups_at_once(self) -> int:
        """Groups that one micro-batch takes from, at least in part."""
        return max(1, self.rows // self.members)

    @property
    def members_at_once(self) -> int:
        return min(self.members, self.rows)


def settings_of(recipe: Recipe, gpus: int) -> tuple[list[Setting], Load, list[str]]:
    """How a process of each of the recipe's algorithms is set up, its share of a step, and what was assumed of lengths.

    Raises Undivided for a step that does not divide, PlanError for adapters of modules that are not there,
    UnknownArchitecture for a model whose sizes cannot be told.
    """
    architecture, assumed = _architecture(recipe)
    load, more = _load(recipe, architecture, gpus)
    if alone(recipe, gpus):
        more.append(
            f"training.distributed=ddp: there is one GPU, and {recipe.training.distributed} shards over several"
        )
    return (
        [_setting(recipe, architecture, load, gpus, name) for name in recipe.algorithms],
        load,
        assumed + more,
    )


def alone(recipe: Recipe, gpus: int) -> bool:
    """Whether a layout that shards is asked of one GPU, where a run refuses it; planned is one process without any."""
    return gpus == 1 and recipe.training.distributed != "ddp"


def _setting(recipe: Recipe, architecture: Architecture, load: Load, gpus: int, algorithm: str) -> Setting:
    policy = settings_for(recipe.policy.model_copy(update={"algorithm": algorithm}))
    model, training = recipe.model, recipe.training
    lora = model.lora
    if lora is not None and (odd := set(lora.target_modules) - set(counts.adapted(architecture.text))):
        raise PlanError(
            f"model.lora.target_modules: {min(odd)!r} is none of the text layers' products "
            f"({', '.join(counts.adapted(architecture.text))})"
        )
    depth = architecture.text.layers
    if recipe.perception.layers != "last3" and (
        deep := [layer for layer in recipe.perception.layers if not -depth <= layer < depth]
    ):
        raise PlanError(
            f"perception.layers={list(recipe.perception.layers)}: {deep[0]} is none of the model's {depth} layers; "
            f"choose from 0 to {depth - 1} (or -1 for the last), or last3"
        )
    whole_groups = load.rows % recipe.policy.num_generations == 0
    reads = policy.uses_perception_weights
    return Setting(
        architecture=architecture,
        dtype=model.dtype,
        layout="ddp" if gpus == 1 else training.distributed,
        processes=gpus,
        rank=0 if lora is None else lora.rank,
        targets=() if lora is None else tuple(lora.target_modules),
        checkpointing=training.gradient_checkpointing,
        shared_prefix=training.shared_prefix,
        trains_tower=not model.freeze_vision,
        features_kept=model.freeze_vision and training.feature_cache,
        rollout=training.rollout,
        rollout_bytes=training.rollout_memory_gib * 2**30,
        reference=policy.beta > 0 and lora is None,
        reads_attention=reads,
        scores_first=training.rollout != "transformers"
        or training.updates_per_rollout > 1
        or (reads and not whole_groups),
        probe_bytes=recipe.perception.probe_chunk_mib * 2**20,
        engine_share=training.vllm_gpu_memory_utilization if training.rollout == "vllm_colocate" else 0.0,
    )


def _architecture(recipe: Recipe) -> tuple[Architecture, list[str]]:
    if recipe.model.path is None:
        sizes = tiny_config(TinyShape(), TINY_VOCABULARY, max_positions=32768)
        return read_config(sizes, "the warm start's tiny model", source="appo.training.tiny"), [
            f"a vocabulary of {TINY_VOCABULARY}, the most that the tiny model's tokenizer may have"
        ]
    found = architecture_of(recipe.model.path)
    notes = [f"sizes of {found.model} as in {found.source}"]
    if found.unverified:
        notes.append(f"not compared with a second copy: {', '.join(found.unverified)}")
    return found, notes


def _load(recipe: Recipe, architecture: Architecture, gpus: int) -> tuple[Load, list[str]]:
    policy, training = recipe.policy, recipe.training
    total, parts = (
        training.prompts_per_step * policy.num_generations,
        gpus * training.gradient_accumulation_steps,
    )
    if gpus < 1:
        raise PlanError(f"--gpus {gpus}: must be at least 1")
    if total % parts:
        raise Undivided(
            f"training.prompts_per_step={training.prompts_per_step} x policy.num_generations={policy.num_generations} "
            f"completions: must divide evenly over {gpus} GPUs x {training.gradient_accumulation_steps} accumulation "
            "steps; change one of them"
        )
    rows = total // parts
    here = rows * training.gradient_accumulation_steps
    members = min(here, policy.num_generations)
    grids, visual, notes = _vision(recipe, architecture)
    text, more = _text_tokens(recipe, architecture, grids[0][0])
    load = Load(
        groups=max(1, here // members),
        members=members,
        group_size=policy.num_generations,
        rows=rows,
        micro_batches=training.gradient_accumulation_steps,
        prompt=visual + text,
        visual=visual,
        grids=grids,
        completion=policy.max_completion_length,
        frames=grids[0][0],
        looked_at=min(LOOKED_AT_ONCE, -(-LOOKED_AT // gpus)),
    )
    return load, [*notes, *more, f"every completion as long as allowed, {load.completion} tokens"]


def _vision(recipe: Recipe, architecture: Architecture) -> tuple[tuple[counts.Grid, ...], int, list[str]]:
    """Grids of a prompt's video and image, their tokens, and what was assumed."""
    video, tower = recipe.video, architecture.tower
    notes = []
    frames = frames_of(recipe)
    if video.num_frames is None:
        notes.append(f"videos so long that video.fps gives video.max_frames={frames} frames")
    patches = max(1, frames // tower.temporal)
    pixels = video.max_pixels
    if recipe.data.source == "key_moment":
        pixels = min(pixels, recipe.data.key_moment.size**2)
    # The squarest frame of that many pixels; every other ratio gives no more visual tokens.
    tokens = max(1, pixels // tower.side**2)
    rows = int(tokens**0.5)
    grid = (patches, rows * tower.merge, tokens // rows * tower.merge)
    per_frame = grid[1] * grid[2] // tower.merge**2
    grids: tuple[counts.Grid, ...] = (grid,)
    notes.append(f"frames that fill video.max_pixels, {per_frame} visual tokens a pair of frames")
    if recipe.data.source in SOURCES_WITH_IMAGES:
        grids += ((1, grid[1], grid[2]),)
        notes.append("an image beside every video, as large as a frame")
    return grids, sum(t for t, _, _ in grids) * per_frame, notes


def frames_of(recipe: Recipe) -> int:
    """Of a video as long as the recipe reckons with."""
    video = recipe.video
    return video.max_frames if video.num_frames is None else min(video.num_frames, video.max_frames)


def _text_tokens(recipe: Recipe, architecture: Architecture, patches: int) -> tuple[int, list[str]]:
    from appo.prompts import TEMPLATES

    if recipe.data.source == "key_moment":
        return 44, ["prompts of 44 tokens beside the video, as the synthetic questions have"]
    template = len(TEMPLATES[recipe.data.template]) // CHARACTERS_PER_TOKEN
    times = patches * TOKENS_OF_A_TIME if architecture.model_type == "qwen3_vl" else 0
    found = QUESTION_TOKENS + template + times
    return found, [
        f"prompts of {found} tokens beside the video: {QUESTION_TOKENS} of question and chat, {template} of the template"
    ]


def on_cpu(settings: Sequence[Setting]) -> list[Setting]:
    """The same settings with a CPU's kernels."""
    return [replace(setting, on_gpu=False) for setting in settings]
