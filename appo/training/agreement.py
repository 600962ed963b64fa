"""Before the first rollouts: does generation see a prompt as scoring and loss do?

Rollouts run elsewhere than the passes that train on them: on a key-value cache, or in vLLM. Other frames, seconds per
temporal patch or rotary positions there would show in no metric, only in what is learned. So one prompt is compared in
both, by its positions exactly and by the log-probabilities of a few sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from appo.errors import UserError
from appo.modeling.features import base_model
from appo.modeling.generation import placeholder_tokens
from appo.modeling.inputs import PromptInputs
from appo.training.rollouts import generate_groups
from appo.training.sampling import KeepLogps
from appo.training.scoring import Row, score

CHECK_COMPLETIONS, CHECK_TOKENS = 4, 8
# Mean distance of log-probabilities. Other frames or positions move it by tenths; float32 kernels by 1e-5,
# bfloat16 ones, in two engines, by a few hundredths.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.15}


class RolloutMismatch(UserError, RuntimeError):
    """Generation does not see a prompt as scoring and loss do."""


def check_positions(prompt: PromptInputs, positions: Tensor, where: str, *, generated: int = 0) -> None:
    """Raise RolloutMismatch unless generation ran the prompt on its own rotary positions.

    positions: (3, P + generated), of the prompt and of so many tokens of a completion, which continue from its end.
    """
    first = int(prompt.positions.max()) + 1
    more = torch.arange(first, first + generated).expand(3, -1)
    expected = torch.cat([prompt.positions, more], dim=1)
    name = f"sample {prompt.sample.id}"
    if positions.shape != expected.shape:
        raise RolloutMismatch(
            f"{name}: {where} ran {positions.shape[1]} tokens, scoring has {expected.shape[1]}"
        )
    if not torch.equal(positions, expected):
        place = int((positions != expected).any(dim=0).nonzero()[0])
        raise RolloutMismatch(
            f"{name}: from token {place} on {where} numbers (time, height, width) "
            f"{positions[:, place].tolist()}, scoring and loss {expected[:, place].tolist()}; "
            f"the seconds per temporal patch ({prompt.seconds_per_grid.tolist()}) or the grid did not "
            "arrive, or the model was loaded without appo.modeling.positions.install"
        )


@torch.no_grad()
def check_logps(
    trainer: Any,
    model: Any,
    prompt: PromptInputs,
    completions: Sequence[Sequence[int]],
    logps: Sequence[Sequence[float]],
    where: str,
) -> None:
    """Raise RolloutMismatch where scoring gives completions of the prompt other log-probabilities than generation."""
    visual = set(placeholder_tokens(model))
    rows, theirs = [], []
    for tokens, values in zip(completions, logps, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in visual), len(tokens))
        if end:
            rows.append(Row(prompt, 0, torch.tensor(tokens[:end])))
            theirs.append(torch.tensor(values[:end]))
    if not rows:
        return
    with trainer.accelerator.autocast():
        scores = score(
            model,
            rows,
            max(len(row.tokens) for row in rows),
            shared_prefix=trainer.recipe.training.shared_prefix,
            pad_token_id=trainer._tokenizer.pad_token_id,
            device=trainer.accelerator.device,
        )
    ours = torch.cat([scores.logps[i, : len(theirs[i])].float().cpu() for i in range(len(rows))])
    distance = float((ours - torch.cat(theirs)).abs().mean())
    dtype = trainer.recipe.model.dtype
    if not distance <= TOLERANCE[dtype]:
        raise RolloutMismatch(
            f"sample {prompt.sample.id}: log-probabilities of the same tokens differ by {distance:.3g} on average "
            f"between {where} and the policy ({TOLERANCE[dtype]:g} allowed for {dtype}); other frames, features or "
            f"weights reached {where}"
        )


@torch.no_grad()
def check_generation(trainer: Any, model: Any, prompt: PromptInputs) -> None:
    """Compare transformers' generation on a key-value cache with scoring. Draws nothing from torch's random state.

    model: the policy, ready to generate. Raises RolloutMismatch.
    """
    keep, where = KeepLogps(), "generation"
    with _positions_of(model) as seen:
        completions = generate_groups(
            model,
            [prompt],
            CHECK_COMPLETIONS,
            sampling=trainer.sampling.untruncated(CHECK_TOKENS),
            seeds=list(range(CHECK_COMPLETIONS)),
            device=trainer.accelerator.device,
            before_draw=keep,
        )
    longest = max(len(tokens) for tokens in completions)
    first_row = torch.cat([positions[:, 0] for positions in seen], dim=1)
    check_positions(prompt, first_row, where, generated=longest - 1)  # the last token is drawn, not run
    logps = [
        [float(keep.steps[step][row, token]) for step, token in enumerate(tokens)]
        for row, tokens in enumerate(completions)
    ]
    check_logps(trainer, model, prompt, completions, logps, where)


@contextmanager
def _positions_of(model: Any) -> Iterator[list[Tensor]]:
    """Collects the (3, B, L) rotary positions of every pass of the text layers."""
    seen: list[Tensor] = []

    def remember(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        # transformers may put plain text positions in front of the three rotary ones, or give one that stands for all.
        seen.append(kwargs["position_ids"][-3:].expand(3, -1, -1).cpu())

    handle = base_model(model).language_model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
