"""A setting, a load and the size of the data set -> seconds a step and hours a training, by counting.

What is assumed of the machine stands in `ASSUMED`; it was chosen so that the paper's own layout comes out near the
paper's figures (supplement, table F, DAPO on 16 GPUs: 0.462 samples/s at 7B with 16 frames, 0.325 at 3B with 30).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from appo.modeling import counts
from appo.modeling.counts import Group, Operations
from appo.modeling.devices import Device
from appo.planning.setting import LOOKED_AT, Load, Setting

if TYPE_CHECKING:
    from appo.config import Recipe

# Of the device's peak, in passes over thousands of tokens; of its memory's bandwidth, where an engine draws tokens.
REACHED, BANDWIDTH_REACHED = 0.3, 0.6
# transformers draws a token with some forty launches a layer: so long a layer, however small the batch.
LAYER_S = 1.8e-3
# Optimizer, communication and the wait for the slowest process, of the step.
OVERHEAD = 0.15
ASSUMED = (
    f"passes reach {REACHED:.0%} of the device's peak; transformers draws a token in {LAYER_S * 1e3:.1f} ms a layer, "
    f"vLLM at {BANDWIDTH_REACHED:.0%} of the memory's bandwidth; optimizer and communication add {OVERHEAD:.0%}"
)
# Questions of the publishers' files, by a public scan (docs/data.md); the paper's names for the rest.
ROWS_OF_SOURCE = {"nextgqa": 3358, "seed_bench_r1": 6000, "perception_test": 6000}
ROWS_OF_VIDEO_R1 = {
    "LLaVA-Video-178K": 82_676,
    "STAR": 11_455,
    "PerceptionTest": 6_348,
    "NeXT-QA": 7_549,
    "CLEVRER": 8_220,
}


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of the phases of a step; operations that one process counts in it."""

    rollout_s: float
    scoring_s: float
    update_s: float
    operations: Operations

    def of_update(self, updates_per_rollout: int) -> float:
        """Of one update, with its share of the rollout and of what is scored before the first."""
        shared = (self.rollout_s + self.scoring_s) / updates_per_rollout
        return (shared + self.update_s) * (1 + OVERHEAD)


def step_time(setting: Setting, load: Load, device: Device) -> StepTime:
    architecture = setting.architecture
    groups = [Group(load.prompt, (load.completion,) * load.members)] * load.groups
    drawn = counts.generation(architecture, groups)
    forward = _forward(setting, load)
    if setting.reads_attention:
        layers = min(3, architecture.text.layers)
        forward += counts.probe(architecture, groups, layers, load.frames)
        rows = load.groups * load.members * load.completion
        forward += counts.token_weights(architecture, rows, normalizers_known=setting.computes == 4)
    trains = "tower too" if setting.trains_tower else "all" if setting.full else "adapters"
    update = counts.update(forward, trains=trains, layers_again=setting.checkpointing, head_again=True)
    before = int(setting.scores_first) + int(setting.reference)
    reached = device.peak(setting.dtype) * REACHED
    return StepTime(
        rollout_s=_rollout_s(setting, load, device),
        scoring_s=before * forward.total / reached,
        update_s=update.total / reached,
        operations=drawn + update + forward.times(**dict.fromkeys(forward.by_part(), float(before))),
    )


def training_hours(recipe: Recipe, load: Load, step_s: float) -> tuple[float, list[str]]:
    """Hours of one training, its looks included, and what was assumed of the number of steps. step_s: of an update."""
    steps, notes = number_of_steps(recipe)
    looks = 2 * LOOKED_AT / recipe.training.prompts_per_step
    return (steps + looks) * step_s / 3600, notes


def number_of_steps(recipe: Recipe) -> tuple[int, list[str]]:
    """Updates of a training, `training.updates_per_rollout` of each rollout; and how they were counted."""
    training = recipe.training
    if training.max_steps >= 0:
        return training.max_steps, []
    prompts, notes = number_of_prompts(recipe)
    rollouts = max(1, int(prompts // training.prompts_per_step * training.epochs))
    steps = rollouts * training.updates_per_rollout
    return steps, [*notes, f"{steps} steps"]


def number_of_prompts(recipe: Recipe) -> tuple[int, list[str]]:
    """Of the train split, and where the number comes from."""
    data = recipe.data
    if data.source == "key_moment":
        return data.key_moment.train, []
    if data.quotas:
        found = sum(
            ROWS_OF_VIDEO_R1.get(source, 0) if count == "all" else int(count)
            for source, count in data.quotas.items()
        )
        notes = [f"{found:,} questions by data.quotas"]
        if unknown := [s for s, c in data.quotas.items() if c == "all" and s not in ROWS_OF_VIDEO_R1]:
            notes[0] += f", none for {', '.join(unknown)}, whose number is not known"
    else:
        found = ROWS_OF_SOURCE.get(data.source, sum(ROWS_OF_VIDEO_R1.values()))
        notes = [f"{found:,} questions in {data.source}"]
    if data.limit is not None and data.limit < found:
        found, notes = data.limit, [f"{data.limit:,} questions by data.limit"]
    return max(1, int(found * (1 - data.validation_share - data.test_share))), notes


def _forward(setting: Setting, load: Load) -> Operations:
    """One pass over all completions of a step; the tower too where its features are not kept."""
    architecture = setting.architecture
    if setting.shared_prefix:
        found = counts.packed(architecture, [load.group] * load.groups)
        videos = load.groups
    else:
        found = counts.padded(architecture, [load.group] * load.groups, load.completion)
        videos = load.groups * load.members
    if not setting.features_kept:
        found += counts.encoding(architecture, list(load.grids) * videos)
    return found


def _rollout_s(setting: Setting, load: Load, device: Device) -> float:
    """Prefill at the rate of any pass; then one token after another."""
    architecture = setting.architecture
    text = architecture.text
    prompts = counts.generation(architecture, [Group(load.prompt, ())] * load.groups, padded_rows=False)
    prefill = prompts.total / (device.peak(setting.dtype) * REACHED)
    rows, each = load.groups * load.members, 2 * text.layers * text.keys * setting.computes
    parts = 1.0
    if setting.rollout == "transformers":
        parts = max(1.0, rows * (load.prompt + load.completion) * each / setting.rollout_bytes)
    weights = (architecture.parameters.text + architecture.parameters.head) * setting.computes
    cache = rows * (load.prompt + load.completion / 2) * each
    read = (weights * parts + cache) / (device.bandwidth * BANDWIDTH_REACHED)
    if setting.rollout == "transformers":
        read = max(read, parts * text.layers * LAYER_S)
    return prefill + load.completion * read
