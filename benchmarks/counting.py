"""A shape -> how many multiply-adds each way of running a step needs: the model that measurements stand
beside.

Counts matrix products only (two operations a multiply-add, a backward pass twice the forward, a recomputed
forward under gradient checkpointing); rollouts and the optimizer are left out. What a machine adds to it is
bandwidth and calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import Shape


@dataclass(frozen=True, slots=True)
class Count:
    """Operations of a scoring pass and of an update (forward and backward) for one group."""

    scoring: float
    update: float

    @property
    def both(self) -> float:
        return self.scoring + self.update


def lengths(shape: Shape) -> list[int]:
    """Of the completions that `shapes.completions` makes."""
    first, last, count = shape.completion // 2, shape.completion, shape.generations
    return [int(first + (last - first) * i / max(1, count - 1)) for i in range(count)]


def count(shape: Shape, *, shared: bool) -> Count:
    """shared: one prompt and one set of cached features per group; else each completion has both."""
    prompt, each = shape.prompt, lengths(shape)
    if shared:
        tokens = prompt - 1 + sum(each)
        pairs = (prompt - 1) ** 2 / 2 + sum(n * (prompt - 1) + n * n / 2 for n in each)
        scored, vision = sum(each), 0.0
    else:
        padded = prompt + shape.completion
        tokens = padded * shape.generations
        pairs = shape.generations * padded**2 / 2
        scored, vision = shape.completion * shape.generations, shape.generations * tower(shape)
    text = tokens * 2 * body(shape) + pairs * 4 * shape.hidden * shape.layers
    head = scored * 2 * shape.hidden * shape.vocabulary
    passes = 4 if shape.checkpointing else 3
    # The tower is frozen: it runs forward only. TRL's fused head makes its gradient in the forward pass.
    return Count(text + head + vision, passes * text + 3 * head + vision)


def token_weights(shape: Shape, rows: int) -> float:
    """Operations of the head on the rows that APPO's weights are made of, in bfloat16: one pass over the vocabulary for
    their normalisers, one for the divergence. (In float32 the normalisers are known: half of it.)
    """
    return 2 * 2 * rows * shape.hidden * shape.vocabulary


def body(shape: Shape) -> float:
    """Weights of the text layers that multiply each token."""
    key_value = shape.hidden * shape.key_value_heads // shape.heads
    return shape.layers * (
        2 * shape.hidden**2 + 2 * shape.hidden * key_value + 3 * shape.hidden * shape.intermediate
    )


def tower(shape: Shape) -> float:
    """Operations that encode one video: windows of 8 x 8 patches, whole frames in the full layers."""
    width, patches = shape.vision_hidden, shape.patches
    weights = shape.vision_layers * (4 * width**2 + 3 * width * shape.vision_intermediate)
    frame = (shape.side // 14) ** 2
    seen = [
        frame if layer in shape.full_attention else min(64, frame) for layer in range(shape.vision_layers)
    ]
    merger = patches / 4 * ((4 * width) ** 2 + 4 * width * shape.hidden)
    return 2 * (patches * (weights + 3 * 2 * 14 * 14 * width) + merger) + patches * 4 * width * sum(seen)
