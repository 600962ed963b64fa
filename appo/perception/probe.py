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
    num_rows, _, length, _ = queries.shape
    visible = visible.expand(num_rows, length, keys.shape[2])
    found = torch.empty(num_rows, length, num_frames, device=queries.device)
    # Autocast would round the scores, and give frame sums in its own type.
    with torch.autocast(queries.device.type, enabled=False):
        for row in range(num_rows):
            members = _frame_means(frame_of_key[row], num_frames)
            _row_to_frames(queries[row], keys[row], visible[row], members, found[row], scaling, chunk_bytes)
    return found


def _frame_means(frame_of_key: Tensor, num_frames: int) -> Tensor:
    """(L,) frame numbers -> (L, T) float32: column t averages over the tokens of frame t."""
    columns = torch.zeros(len(frame_of_key), num_frames + 1, device=frame_of_key.device)
    columns.scatter_(1, (frame_of_key.clamp(min=-1) + 1).unsqueeze(1), 1.0)
    return columns[:, 1:] / columns[:, 1:].sum(dim=0).clamp(min=1)


def _row_to_frames(
    queries: Tensor,
    keys: Tensor,
    visible: Tensor,
    members: Tensor,
    out: Tensor,
    scaling: float,
    chunk_bytes: int,
) -> None:
    """One batch row: queries (heads, N, D), keys (kv_heads, L, D), visible (N, L), members (L, T), out (N, T)."""
    heads, length, dim = queries.shape
    kv_heads, num_keys, _ = keys.shape
    shared = heads // kv_heads
    keys = keys.float()
    # Scores of every head, their mean over heads, the inverted mask, and the scaled queries.
    row_bytes = num_keys * (4 * heads + 4 + 1) + 4 * heads * dim
    held = 0 if keys.dtype == queries.dtype else keys.nbytes
    step = max(1, (chunk_bytes - held) // row_bytes)
    for start in range(0, length, step):
        chunk = slice(start, min(start + step, length))
        # Query heads that share keys are rows of one product: repeated keys would take `shared` times their memory.
        folded = queries[:, chunk].float().mul(scaling).reshape(kv_heads, -1, dim)
        scores = folded @ keys.transpose(-1, -2)
        by_head = scores.view(kv_heads, shared, -1, num_keys)
        by_head.masked_fill_(~visible[chunk], float("-inf"))
        # Softmax in place.
        scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
        scores.div_(scores.sum(dim=-1, keepdim=True))
        # Averaging over heads before the frame sums costs heads times less; both are linear.
        torch.matmul(by_head.mean(dim=(0, 1)), members, out=out[chunk])
        del scores, by_head  # or they would live until the next chunk's are made


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
