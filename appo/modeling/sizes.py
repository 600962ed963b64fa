"""The sizes of a Qwen vision-language model, and the parameters that they make, by part. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Text:
    """The decoder. head_norms: queries and keys are normalised a head at a time (Qwen3)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    biases: bool
    head_norms: bool

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; values are as wide."""
        return self.key_value_heads * self.head_dim

    @property
    def layer_products(self) -> int:
        """Weights of one layer that multiply each token."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        biases = self.queries + 2 * self.keys if self.biases else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        return self.layer_products + biases + norms

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden


@dataclass(frozen=True, slots=True)
class Tower:
    """The vision tower. full_layers: those that see whole frames; the others see windows of `window` pixels, None where
    all layers see all. gated: three products in the feed-forward part instead of two. deepstack: layers whose features
    go to early decoder layers beside the last one's.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    out: int
    patch: int
    temporal: int
    merge: int
    channels: int
    gated: bool
    centred_norms: bool
    patch_bias: bool
    full_layers: tuple[int, ...] | None
    window: int
    positions: int
    deepstack: int

    @property
    def patch_values(self) -> int:
        """Numbers of one patch as it enters the tower."""
        return self.channels * self.temporal * self.patch**2

    @property
    def side(self) -> int:
        """Pixels of a frame's side that one visual token stands for."""
        return self.patch * self.merge

    @property
    def merged(self) -> int:
        """Width of the patches that make one visual token, side by side."""
        return self.hidden * self.merge**2

    @property
    def width(self) -> int:
        """Numbers of one visual token's features."""
        return self.out * (1 + self.deepstack)

    @property
    def parameters(self) -> int:
        norm = self.hidden * (2 if self.centred_norms else 1)
        feed_forward = (2 * self.intermediate if self.gated else self.intermediate) * (self.hidden + 1)
        feed_forward += self.hidden * (self.intermediate + 1)
        block = 2 * norm + 4 * self.hidden * (self.hidden + 1) + feed_forward
        merging = self.merged * (self.merged + 1) + self.out * (self.merged + 1)
        deep = self.deepstack * (2 * self.merged + merging)
        embedding = self.patch_values * self.hidden + (self.hidden if self.patch_bias else 0)
        return embedding + self.positions * self.hidden + self.layers * block + norm + merging + deep


@dataclass(frozen=True, slots=True)
class Parameters:
    """text: embeddings, layers and last norm; head: 0 where it is the embeddings again."""

    text: int
    head: int
    tower: int

    @property
    def total(self) -> int:
        return self.text + self.head + self.tower


@dataclass(frozen=True, slots=True)
class Architecture:
    """config: as published, for transformers. processor: the published settings, empty where none were found.
    unverified: keys of either that could not be compared with a second copy.
    """

    model: str
    model_type: str
    text: Text
    tower: Tower
    config: Mapping[str, Any] = field(repr=False)
    processor: Mapping[str, Any] = field(repr=False)
    source: str
    unverified: tuple[str, ...] = ()

    @property
    def parameters(self) -> Parameters:
        text = self.text.embedding + self.text.layers * self.text.layer + self.text.hidden
        return Parameters(text, 0 if self.text.tied else self.text.embedding, self.tower.parameters)
