"""APPO's weights once more, by loops over floats from the written algorithm; and groups to try them on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# As in the package: a divergence that varies by less than this is constant.
CONSTANT_NATS = 1e-9


def slow_weights(
    attention: Tensor,
    lengths: Tensor,
    rewards: Tensor,
    logits: Tensor,
    *,
    k1: int,
    k2: int,
    k3: int,
    max_weight: float,
    tau: float = 0.5,
    strategy: str = "soft",
    fallback: str = "none",
    divergence: str = "kl",
    temperature: float = 1.0,
) -> tuple[list[list[float]], list[int]]:
    attended = attention.double().tolist()
    counts = [int(length) for length in lengths]
    group, width, num_frames = attention.shape
    psi: list[set[int]] = []
    for i in range(group):
        scores = []
        for t in range(num_frames):
            largest = sorted((attended[i][n][t] for n in range(counts[i])), reverse=True)[:k1]
            scores.append(math.fsum(largest) / len(largest) if largest else 0.0)
        order = sorted(range(num_frames), key=lambda t: (-scores[t], t))
        psi.append(set(order[:k2]) if counts[i] else set())

    right = [i for i in range(group) if float(rewards[i]) >= tau]
    wrong = [i for i in range(group) if float(rewards[i]) < tau]
    p1 = set().union(*(psi[i] for i in right))
    p2 = set().union(*(psi[i] for i in wrong))
    chosen = {"hard": p1 - p2, "soft": p1, "all": p1 | p2}[strategy]
    if fallback == "all" and not right:
        chosen = set().union(*psi)
    frames = sorted(chosen)

    given: list[list[list[float]]] = [[[] for _ in range(width)] for _ in range(group)]
    for frame in frames:
        lists = []
        for i in range(group):
            order = sorted(range(counts[i]), key=lambda n: (-attended[i][n][frame], n))
            lists.append(sorted(order[:k3]))
        ranks = max(len(positions) for positions in lists)
        raw = []
        for j in range(ranks):
            rows = [logits[i, lists[i][j]].tolist() if j < len(lists[i]) else None for i in range(group)]
            raw.append(_divergence([_log_softmax(r, temperature) for r in rows], divergence))
        low, high = min(raw), max(raw)
        scaled = [(d - low) / (high - low) if high - low > CONSTANT_NATS else 0.0 for d in raw]
        for i in range(group):
            for j, position in enumerate(lists[i]):
                given[i][position].append(scaled[j])
    weights = [[1 + (max_weight - 1) * (sum(g) / len(g) if g else 0.0) for g in row] for row in given]
    return weights, frames


def _log_softmax(row: list[float] | None, temperature: float) -> list[float] | None:
    if row is None:
        return None
    scaled = [x / temperature for x in row]
    top = max(scaled)
    total = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - total for x in scaled]


def _divergence(rows: list[list[float] | None], kind: str) -> float:
    there = [row for row in rows if row is not None]
    vocabulary = range(len(there[0]))
    if kind == "released":
        filled = [row or [-math.log(len(vocabulary))] * len(vocabulary) for row in rows]
        total = 0.0
        for v in vocabulary:
            mean = sum(row[v] for row in filled) / len(filled)
            for row in filled:
                d = min(11.0, max(-11.0, mean - row[v]))
                total += math.exp(d) - d - 1
        return total
    total = 0.0
    for v in vocabulary:
        mean = sum(math.exp(row[v]) for row in there) / len(there)
        for row in there:
            if row[v] > -math.inf:
                total += math.exp(row[v]) * (row[v] - math.log(mean))
    return total


def random_group(
    seed: int, *, completions: int, tokens: int, frames: int, vocabulary: int, ties: bool
) -> dict[str, Any]:
    """A group of random numbers. ties: attention on a lattice of four values, so that order is often decided
    by index alone, and completions that repeat one another's distributions."""
    rng = torch.Generator().manual_seed(seed)
    attention = torch.rand(completions, tokens, frames, generator=rng, dtype=torch.float64)
    logits = 2 * torch.randn(completions, tokens, vocabulary, generator=rng, dtype=torch.float64)
    if ties:
        attention = (attention * 4).floor() / 4
        logits[1:] = logits[:1]
        logits[:, ::2] += torch.randn(completions, 1, vocabulary, generator=rng, dtype=torch.float64)
    return {
        "attention": attention,
        "completion_lengths": torch.randint(1, tokens + 1, (completions,), generator=rng),
        "accuracy_rewards": torch.randint(0, 2, (completions,), generator=rng).double(),
        "logits": logits,
    }
