"""Groups of completions -> one packed sequence in which each prompt stands once.

`[prompt without its last token | last token, completion 1 | last token, completion 2 | ...]`, one group after the
other. The prompt's last token is repeated because its row predicts the first token of every completion; each copy
belongs to one completion, so that every predicted token has a row of its own. Positions of every completion continue
from the prompt's end. `appo.modeling.attention` makes each completion see its prompt and itself only; the rest of the
model runs on the packed tokens unchanged.

The idea of sharing the prefix is Prefix Grouper's (arXiv 2506.05433); here it carries a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """One prompt and the completions that share it.

    prompt_ids: (P,) long. positions: (3, P) rotary positions. frame_of_token: (P,) frame number, -1 for none.
    completions: one (n_i,) long tensor each, n_i >= 1. rows: the batch row of each completion.
    """

    prompt_ids: Tensor
    positions: Tensor
    frame_of_token: Tensor
    completions: tuple[Tensor, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Groups of equal prompt length and size, attended to in one call.

    prefix: (B, P-1) and segments: (B, G, S) index the packed sequence; a segment shorter than S repeats its first
    index, and those outputs are dropped. frame_of_prefix: (B, P-1). rows, lengths: (B, G).
    """

    prefix: Tensor
    segments: Tensor
    frame_of_prefix: Tensor
    rows: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """What the model is called with, and how to read its rows.

    input_ids: (1, L). position_ids: (3, 1, L). scored: (R,) index of the rows that predict a token. labels: (1, R)
    those tokens. row, column: (R,) where each belongs in a (batch, completion length) tensor. inverse: (L,) place of
    each packed token among the concatenated outputs of the buckets.
    """

    input_ids: Tensor
    position_ids: Tensor
    scored: Tensor
    labels: Tensor
    row: Tensor
    column: Tensor
    inverse: Tensor
    buckets: tuple[Bucket, ...]

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model, beside its pixels or features.

        transformers leaves a four-dimensional mask as it is, whatever its size; the attention function builds its
        own, so that no (L, L) mask exists.
        """
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids.device),
            "packed": self,
        }

    def unpack(self, values: Tensor, num_rows: int, num_columns: int) -> Tensor:
        """(1, R, ...) values of the scored rows -> (num_rows, num_columns, ...), zero where nothing was scored."""
        out = values.new_zeros(num_rows, num_columns, *values.shape[2:])
        return out.index_put((self.row, self.column), values[0])


def pack(groups: Sequence[PackedGroup], device: torch.device | str = "cpu") -> Packed:
    """Lay groups out one after the other. Raises ValueError for an empty completion or a prompt under two tokens."""
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    scored: list[Tensor] = []
    row: list[Tensor] = []
    column: list[Tensor] = []
    shapes: dict[tuple[int, int], list[tuple[PackedGroup, int, list[int]]]] = {}
    offset = 0
    for group in groups:
        prefix_length = len(group.prompt_ids) - 1
        if prefix_length < 1:
            raise ValueError("a prompt needs at least two tokens to be packed")
        starts = []
        ids.append(group.prompt_ids[:-1])
        positions.append(group.positions[:, :-1])
        cursor = offset + prefix_length
        following = int(group.positions.max()) + 1
        for completion, batch_row in zip(group.completions, group.rows, strict=True):
            length = len(completion)
            if length < 1:
                raise ValueError(f"completion in batch row {batch_row} is empty")
            # The last completion token predicts nothing that is scored, so it need not run through the model.
            ids.append(torch.cat([group.prompt_ids[-1:], completion[:-1]]))
            steps = torch.arange(following, following + length - 1).expand(3, -1)
            positions.append(torch.cat([group.positions[:, -1:], steps], dim=1))
            starts.append(cursor)
            scored.append(torch.arange(cursor, cursor + length))
            row.append(torch.full((length,), batch_row))
            column.append(torch.arange(length))
            cursor += length
        shapes.setdefault((prefix_length, len(group.completions)), []).append((group, offset, starts))
        offset = cursor

    buckets = tuple(_bucket(members, device) for members in shapes.values())
    order = torch.cat([torch.cat([b.prefix.flatten(), b.segments.flatten()]) for b in buckets])
    # Padding repeats the first index of a segment; writing in reverse lets the true place win.
    inverse = torch.empty(offset, dtype=torch.long)
    inverse[order.cpu().flip(0)] = torch.arange(len(order)).flip(0)
    labels = torch.cat([completion for group in groups for completion in group.completions])
    return Packed(
        input_ids=torch.cat(ids).unsqueeze(0).to(device),
        position_ids=torch.cat(positions, dim=1).unsqueeze(1).to(device),
        scored=torch.cat(scored).to(device),
        labels=labels.unsqueeze(0).to(device),
        row=torch.cat(row).to(device),
        column=torch.cat(column).to(device),
        inverse=inverse.to(device),
        buckets=buckets,
    )


def _bucket(members: list[tuple[PackedGroup, int, list[int]]], device: torch.device | str) -> Bucket:
    prefix_length = len(members[0][0].prompt_ids) - 1
    lengths = torch.tensor([[len(c) for c in group.completions] for group, _, _ in members])
    width = int(lengths.max())
    starts = torch.tensor([starts for _, _, starts in members])
    steps = torch.arange(width)
    inside = steps < lengths.unsqueeze(-1)
    segments = torch.where(inside, starts.unsqueeze(-1) + steps, starts.unsqueeze(-1))
    prefix = torch.tensor([offset for _, offset, _ in members]).unsqueeze(-1) + torch.arange(prefix_length)
    return Bucket(
        prefix=prefix.to(device),
        segments=segments.to(device),
        frame_of_prefix=torch.stack([group.frame_of_token[:-1] for group, _, _ in members]).to(device),
        rows=torch.tensor([group.rows for group, _, _ in members]).to(device),
        lengths=lengths.to(device),
    )
