"""Queries and keys of one attention layer -> how much each completion token attends to each frame.

First step of APPO (paper section 3.2.1; step 1 of docs/algorithm.md), without eager attention: only the rows that
predict completion tokens are recomputed, in the few layers that are asked for, in chunks of bounded memory. Pure
tensor code; the attention function of `appo.modeling.attention` calls it, `frames` and `weights` read the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Where to read in an ordinary (left- or right-padded) batch.

    rows: (B, N) index of the position that predicts each completion token. key_valid: (B, L) bool, False on padding.
    frame_of_key: (B, L) frame number of each key, -1 where the token belongs to no frame.
    """

    rows: Tensor
    key_valid: Tensor
    frame_of_key: Tensor


def attention_to_frames(
    queries: Tensor,
    keys: Tensor,
    visible: Tensor,
    frame_of_key: Tensor,
    num_frames: int,
    *,
    scaling: float,
    chunk_bytes: int,
) -> Tensor:
    """Softmax attention over all visible keys, summed up per frame as its mean over the frame's tokens.

    queries: (R, heads, N, D). keys: (R, kv_heads, L, D), heads a multiple of kv_heads. visible: bool, broadcastable
    to (R, N, L). frame_of_key: (R, L) long, -1 for none. Returns (R, N, T) float32: the mean over heads of the mean
    attention to each frame's tokens. A frame without tokens in a row gets 0. Computed in float32 whatever the inputs'
    type, autocast or not. The extra memory stays near `chunk_bytes`, at least one query row.
    """
    num_rows, heads, length, dim = queries.shape
    kv_heads, num_keys = keys.shape[1:3]
    visible = visible.expand(num_rows, length, num_keys)
    found = torch.empty(num_rows, length, num_frames, device=queries.device)
    # Of each query: scores of every head, their mean over heads, the inverted mask, the scaled query. Of each row: its
    # keys in float32, its frames.
    query_bytes = num_keys * (4 * heads + 4 + 1) + 4 * heads * dim
    row_bytes = num_keys * (4 * kv_heads * dim * (keys.dtype != torch.float32) + 8 * num_frames)
    block = max(1, chunk_bytes // (length * query_bytes + row_bytes))
    step = length if block > 1 else max(1, (chunk_bytes - row_bytes) // query_bytes)
    # Autocast would round the scores, and give frame sums in its own type.
    with torch.autocast(queries.device.type, enabled=False):
        for first in range(0, num_rows, block):
            rows = slice(first, first + block)
            members = _frame_means(frame_of_key[rows], num_frames)
            float_keys = keys[rows].float()
            for start in range(0, length, step):
                chunk = slice(start, start + step)
                found[rows, chunk] = _chunk_to_frames(
                    queries[rows, :, chunk], float_keys, visible[rows, chunk], members, scaling
                )
    return found


def _frame_means(frame_of_key: Tensor, num_frames: int) -> Tensor:
    """(B, L) frame numbers -> (B, L, T) float32: column t averages over the tokens of frame t."""
    columns = torch.zeros(*frame_of_key.shape, num_frames + 1, device=frame_of_key.device)
    columns.scatter_(-1, (frame_of_key.clamp(min=-1) + 1).unsqueeze(-1), 1.0)
    return columns[..., 1:] / columns[..., 1:].sum(dim=1, keepdim=True).clamp(min=1)


def _chunk_to_frames(
    queries: Tensor, keys: Tensor, visible: Tensor, members: Tensor, scaling: float
) -> Tensor:
    """queries (B, heads, n, D), keys (B, kv_heads, L, D) float32, visible (B, n, L), members (B, L, T) -> (B, n, T)."""
    batch, heads, length, dim = queries.shape
    kv_heads, num_keys = keys.shape[1:3]
    # Query heads that share keys are rows of one product: repeating the keys would take several times the memory.
    folded = queries.float().mul(scaling).reshape(batch, kv_heads, -1, dim)
    scores = folded @ keys.transpose(-1, -2)
    by_head = scores.view(batch, kv_heads, heads // kv_heads, length, num_keys)
    by_head.masked_fill_(~visible[:, None, None], float("-inf"))
    # Softmax in place.
    scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
    scores.div_(scores.sum(dim=-1, keepdim=True))
    # Averaging over heads before the frame sums costs heads times less; both are linear.
    return by_head.mean(dim=(1, 2)) @ members


@dataclass(slots=True)
class FrameProbe:
    """Collects frame attention from chosen layers of one forward pass.

    layers: which decoder layers to read. num_frames: T, the most frames any row has. plain: where to read when the
    batch is not packed. Read layers are averaged. `close` it after the forward: gradient checkpointing runs layers
    again in the backward pass, and those must not be read twice.
    """

    layers: tuple[int, ...]
    num_frames: int
    chunk_mib: int = 64
    plain: PlainRows | None = None
    closed: bool = False
    hidden: Tensor | None = None  # last hidden states of the rows read, left here by the forward pass
    _sums: dict[int, Tensor] = field(default_factory=dict)
    _seen: dict[int, set[int]] = field(default_factory=dict)

    def wants(self, layer: int) -> bool:
        return not self.closed and layer in self.layers

    @torch.no_grad()
    def read(
        self,
        layer: int,
        part: int,
        queries: Tensor,
        keys: Tensor,
        visible: Tensor,
        frame_of_key: Tensor,
        scaling: float,
    ) -> None:
        """Add one layer's rows of one part of the batch; shapes as in `attention_to_frames`."""
        if layer in self._seen.setdefault(part, set()):
            return
        found = attention_to_frames(
            queries.detach(),
            keys.detach(),
            visible,
            frame_of_key,
            self.num_frames,
            scaling=scaling,
            chunk_bytes=self.chunk_mib * 2**20,
        )
        self._seen[part].add(layer)
        self._sums[part] = found if part not in self._sums else self._sums[part] + found

    def attention(self, part: int = 0) -> Tensor:
        """(R, N, T) mean over the layers read. Raises RuntimeError when a layer was never reached."""
        if missing := set(self.layers) - self._seen.get(part, set()):
            raise RuntimeError(
                f"frame probe: layers {sorted(missing)} were not read; does the model run appo's attention function?"
            )
        return self._sums[part] / len(self.layers)

    def close(self) -> None:
        self.closed = True
