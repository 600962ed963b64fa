"""Soak: packed groups of any number, length and size are scored as padded ones, in every supported family."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.modeling import models
from tests.modeling.test_attention import CLOSE, packed_batch, plain_logits
from tests.soak.drawn import drawn
from tests.tiers import soak


@soak
@pytest.mark.slow
@pytest.mark.timeout(0)
def test_packings() -> None:
    made: dict[tuple[str, int | None], Any] = {}
    for draw in drawn("test_packings"):
        family = draw.choice(models.FAMILIES)
        window = None if family == "qwen3_vl" else draw.choice((None, None, 1, 12, 40))
        if (family, window) not in made:
            made[family, window] = models.build(family, sliding_window=window)
        model = made[family, window]
        prompts, completions = batch(draw, family)
        sizes = [[len(one) for one in group] for group in completions]
        print(
            f"  {family}, window {window}, prompts {[len(p.ids) for p in prompts]}, completions {sizes}",
            flush=True,
        )
        with torch.no_grad():
            reference, padded = plain_logits(model, prompts, completions)
            found, inputs = packed_batch(model, prompts, completions)
            rows = sum(map(len, completions))
            logits = found.unpack(model(**inputs).logits[:, found.scored], rows, padded["tail"])
        for row, completion in enumerate(one for group in completions for one in group):
            torch.testing.assert_close(
                logits[row, : len(completion)], reference[row, : len(completion)], **CLOSE
            )


def batch(draw: random.Random, family: str) -> tuple[list[models.Prompt], list[list[torch.Tensor]]]:
    """Groups of one size, as a training's, or of many, as dynamic sampling and a cut leave them."""
    image = draw.random() < 0.5  # in all prompts of a batch, or in none
    prompts = [
        models.prompt(
            family, frames=draw.randint(1, 8), text=draw.randint(1, 12), image=image, seed=draw.randrange(99)
        )
        for _ in range(draw.randint(1, 4))
    ]
    size, ragged = draw.randint(1, 5), draw.random() < 0.4
    return prompts, [
        [
            torch.tensor([draw.randint(1, 49) for _ in range(draw.randint(1, 12))])
            for _ in range(draw.randint(1, 5) if ragged else size)
        ]
        for _ in prompts
    ]
