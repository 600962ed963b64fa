"""The passes of a training step -> operations counted by phase, and from them how near a device came to its peak.

The trainer says which passes ran; `appo.modeling.counts` says what they need. MFU (model FLOPs utilisation, PaLM,
appendix B) is those operations over seconds and peak: what is computed a second time, under gradient checkpointing and
in the fused head, does not count, since no step needs it. Of each process its own; the first one's is recorded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from appo.modeling import counts, devices
from appo.modeling.architecture import read_config
from appo.modeling.counts import Group, Operations

if TYPE_CHECKING:
    from appo.config import Recipe
    from appo.modeling.inputs import PromptInputs

TERA = 1e12
# The same in every record: phases whose operations are counted.
PHASES = ("rollout", "scoring", "attention", "weights", "update")


class Work:
    """Adds up operations by phase, as `Phases` adds up seconds.

    peak: operations a second of this process's device; peak_source: where the figure comes from.
    """

    def __init__(self, config: Any, recipe: Recipe):
        """config: the policy's, of transformers."""
        self._architecture = read_config(config.to_dict(), "the policy")
        self._recipe = recipe
        lora = recipe.model.lora is not None
        self._trains = "adapters" if lora else "all" if recipe.model.freeze_vision else "tower too"
        self._here = recipe.training.rollout != "vllm_server"  # whose rollouts another device makes
        self._padded = recipe.training.rollout == "transformers"
        self._leaves_padding_out = torch.cuda.is_available()  # of TRL's fused head
        self._done: dict[str, Operations] = defaultdict(Operations)
        self.peak, self.peak_source = _peak(recipe.model.dtype)

    def drew(self, prompts: Sequence[PromptInputs], groups: Sequence[int], lengths: Sequence[int]) -> None:
        """Completions of these lengths, each beside its prompt and its group's number."""
        if self._here:
            found = counts.generation(
                self._architecture, self._groups(prompts, groups, lengths), padded_rows=self._padded
            )
            self._done["rollout"] += found + self._encoding(prompts, groups, shared=True)

    def passed(
        self,
        phase: str,
        prompts: Sequence[PromptInputs],
        groups: Sequence[int],
        lengths: Sequence[int],
        num_tokens: int,
        *,
        layers_read: int,
    ) -> None:
        """A pass of scoring or of the loss; in phase "update" with its backward pass. num_tokens: rows are padded to."""
        shared = self._recipe.training.shared_prefix
        found = self._groups(prompts, groups, lengths)
        if shared:
            done = counts.packed(self._architecture, found)
        else:
            scored = sum(lengths) if self._leaves_padding_out else None
            done = counts.padded(self._architecture, found, num_tokens, scored=scored)
        done += self._encoding(prompts, groups, shared=shared)
        if layers_read:
            frames = max(prompt.num_frames for prompt in prompts)
            done += counts.probe(self._architecture, found, layers_read, frames)
        self._done[phase] += counts.update(done, trains=self._trains) if phase == "update" else done

    def weighed(self, rows: int, *, normalizers_known: bool) -> None:
        """Token weights made from so many rows."""
        self._done["weights"] += counts.token_weights(
            self._architecture, rows, normalizers_known=normalizers_known
        )

    def take(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Metrics since the last call; starts again from zero. seconds: by phase (`Phases.take`).

        `tflop/PHASE` and `tflop_of/PART` are counts, `mfu/PHASE` the part of the peak that a phase reached.
        """
        done, self._done = dict(self._done), defaultdict(Operations)
        found = {f"tflop/{phase}": operations.total / TERA for phase, operations in done.items()}
        parts = sum(done.values(), Operations()).by_part()
        found |= {f"tflop_of/{part}": value / TERA for part, value in parts.items() if value}
        for phase, operations in done.items():
            if seconds.get(phase):
                found[f"mfu/{phase}"] = operations.total / (seconds[phase] * self.peak)
        return found

    @staticmethod
    def _groups(
        prompts: Sequence[PromptInputs], groups: Sequence[int], lengths: Sequence[int]
    ) -> list[Group]:
        members: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            members.setdefault(group, []).append(place)
        return [
            Group(len(prompts[places[0]].ids), tuple(lengths[place] for place in places))
            for places in members.values()
        ]

    def _encoding(
        self, prompts: Sequence[PromptInputs], groups: Sequence[int], *, shared: bool
    ) -> Operations:
        """The tower, where a pass starts from pixels. Features that are made once and kept belong to no phase."""
        seen: set[int] = set()
        grids: list[counts.Grid] = []
        for prompt, group in zip(prompts, groups, strict=True):
            if shared and group in seen:
                continue
            seen.add(group)
            grids += _grids(prompt)
        return counts.encoding(self._architecture, grids)


def step_metrics(
    logged: Mapping[str, float], *, prompts: int, tokens: float | None, processes: int, step_s: float
) -> dict[str, float]:
    """What a step's record says of speed beside seconds: `samples_per_second`, `tokens_per_second_per_device` and `mfu`,
    of the step and under `NAME/PHASE` of its phases.

    logged: with `phase/NAME_s`, `tflop/NAME` and `device_peak_tflops`. tokens: of all completions of the step.
    """
    found: dict[str, float] = {}
    for phase in PHASES:
        seconds = logged.get(f"phase/{phase}_s")
        if seconds:
            found[f"samples_per_second/{phase}"] = prompts / seconds
            if tokens is not None:
                found[f"tokens_per_second_per_device/{phase}"] = tokens / seconds / processes
    if tokens is not None:
        found["tokens_per_second_per_device"] = tokens / step_s / processes
    counted = [logged[f"tflop/{phase}"] for phase in PHASES if f"tflop/{phase}" in logged]
    if counted and logged.get("device_peak_tflops"):
        found["mfu"] = sum(counted) / (step_s * logged["device_peak_tflops"])
    return found


def _grids(prompt: PromptInputs) -> Iterable[counts.Grid]:
    for vision in (prompt.video, prompt.image):
        if vision is not None and vision.features is None:
            yield from (tuple(grid) for grid in vision.grid_thw.tolist())


_peak = cache(devices.peak_here)
