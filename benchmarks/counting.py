"""A shape -> how many operations each way of running a step needs: the count that measurements stand beside.

`appo.modeling.counts` for the lengths that the benchmarks run; rollouts and the optimizer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from appo.modeling import counts
from appo.modeling.sizes import Architecture, Text, Tower
from benchmarks.shapes import MERGE, PATCH, Shape


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
    sizes, group = architecture(shape), counts.Group(shape.prompt, tuple(lengths(shape)))
    if shared:
        forward = counts.packed(sizes, [group])
    else:
        forward = counts.padded(sizes, [group], shape.completion)
        forward += counts.encoding(sizes, [shape.grid] * shape.generations)
    update = counts.update(forward, layers_again=shape.checkpointing, head_again=True)
    return Count(forward.total, update.total)


def token_weights(shape: Shape, rows: int) -> float:
    """Operations of the head on the rows that APPO's weights are made of, in bfloat16."""
    return counts.token_weights(architecture(shape), rows, normalizers_known=False).total


def architecture(shape: Shape) -> Architecture:
    """The sizes of the model that `shapes.build_model` makes."""
    text = Text(
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        key_value_heads=shape.key_value_heads,
        head_dim=shape.hidden // shape.heads,
        vocabulary=shape.vocabulary,
        tied=shape.tied,
        biases=True,
        head_norms=False,
    )
    tower = Tower(
        hidden=shape.vision_hidden,
        intermediate=shape.vision_intermediate,
        layers=shape.vision_layers,
        heads=shape.vision_heads,
        out=shape.hidden,
        patch=PATCH,
        temporal=2,
        merge=MERGE,
        channels=3,
        gated=True,
        centred_norms=False,
        patch_bias=False,
        full_layers=shape.full_attention,
        window=112,
        positions=0,
        deepstack=0,
    )
    return Architecture(shape.name, "qwen2_5_vl", text, tower, config={}, processor={}, source=__name__)
