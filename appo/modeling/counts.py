"""Sizes and lengths -> how many operations a pass needs, by part: the one count behind plans, records and benchmarks.

Counted as torch's `FlopCounterMode` counts: matrix products only, two operations a multiply-add, attention over whole
rectangles of queries and keys (kernels that skip what a causal mask hides do up to half of it), padding as it is run.
Free of torch. What a machine adds to arithmetic is bandwidth and calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from appo.errors import SettingError
from appo.modeling.sizes import Architecture, Text, Tower

Grid = tuple[int, int, int]  # temporal patches, rows and columns of patches, before merging


@dataclass(frozen=True, slots=True)
class Operations:
    """text: the layers' products with weights; attention: of queries with keys and of what they weigh, the part that is
    quadratic in length; head: over the vocabulary; tower: all of the vision tower; probe: APPO's reading of attention;
    weights: APPO's pass over the vocabulary.
    """

    text: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    tower: float = 0.0
    probe: float = 0.0
    weights: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, float]:
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, **factors: float) -> Operations:
        """Parts multiplied by their factor; those without one are left out."""
        return Operations(**{part: getattr(self, part) * factor for part, factor in factors.items()})


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt of `prompt` tokens and the lengths of its completions."""

    prompt: int
    completions: tuple[int, ...]


def packed(architecture: Architecture, groups: Iterable[Group]) -> Operations:
    """A forward pass over groups whose prompt stands once (`appo.modeling.packing`), features at hand."""
    tokens = scored = pairs = 0
    buckets: dict[tuple[int, int], list[Group]] = {}
    for group in groups:
        buckets.setdefault((group.prompt - 1, len(group.completions)), []).append(group)
        tokens += group.prompt - 1 + sum(group.completions)
        scored += sum(group.completions)
    for (prefix, size), members in buckets.items():
        width = max(max(group.completions) for group in members)  # segments are padded to the longest
        pairs += len(members) * (prefix**2 + size * width * (prefix + width))
    return _text_pass(architecture.text, tokens, pairs, scored)


def padded(
    architecture: Architecture, groups: Iterable[Group], num_tokens: int, *, scored: int | None = None
) -> Operations:
    """A forward pass over completions that each carry their prompt, padded to `num_tokens`; features at hand.

    scored: rows that the head sees, where those of padding are left out.
    """
    groups = list(groups)
    rows = sum(len(group.completions) for group in groups)
    length = max(group.prompt for group in groups) + num_tokens
    seen = rows * num_tokens if scored is None else scored
    return _text_pass(architecture.text, rows * length, rows * length**2, seen)


def generation(
    architecture: Architecture, groups: Sequence[Group], *, padded_rows: bool = True
) -> Operations:
    """Completions drawn on a key-value cache, each prompt run once for its group; features at hand.

    padded_rows: every row goes on until the longest has ended (transformers); else each ends by itself (vLLM).
    """
    if padded_rows:
        width, steps = max(g.prompt for g in groups), max(max(g.completions) for g in groups)
        rows = sum(len(group.completions) for group in groups)
        groups = [Group(width, (steps,) * rows)] + [Group(width, ())] * (len(groups) - 1)
    tokens = pairs = scored = 0
    for group in groups:
        before = group.prompt - 1  # the prompt's last token is the first that runs on the cache
        tokens += before
        pairs += before**2
        scored += 1
        for length in group.completions:
            tokens += length
            scored += length
            pairs += length * group.prompt + length * (length - 1) // 2
    return _text_pass(architecture.text, tokens, pairs, scored)


def encoding(architecture: Architecture, grids: Iterable[Grid]) -> Operations:
    """A forward pass of the vision tower over videos or images."""
    tower = architecture.tower
    total = 0.0
    for frames, rows, columns in grids:
        patches = frames * rows * columns
        total += 2 * patches * _tower_weights(tower)
        full = tower.layers if tower.full_layers is None else len(tower.full_layers)
        seen = full * (rows * columns) ** 2
        if full < tower.layers:
            seen += (tower.layers - full) * _windows(tower, rows, columns)
        total += 4 * frames * seen * tower.hidden
    return Operations(tower=total)


def probe(architecture: Architecture, groups: Iterable[Group], layers: int, frames: int) -> Operations:
    """Frame attention of packed groups: scores of `layers` layers over all keys, summed up by `frames`."""
    text, total = architecture.text, 0.0
    for group in groups:
        width = max(group.completions)
        rows, keys = width * len(group.completions), group.prompt - 1 + width
        total += 2 * layers * rows * keys * (text.queries + frames)
    return Operations(probe=total)


def token_weights(architecture: Architecture, rows: int, *, normalizers_known: bool) -> Operations:
    """The head on the rows that APPO's weights are made of: once for the divergence, once more for the normalisers where
    the scoring pass does not give them (in bfloat16).
    """
    text = architecture.text
    passes = 1 if normalizers_known else 2
    return Operations(weights=float(2 * passes * rows * text.hidden * text.vocabulary))


def update(
    forward: Operations, *, trains: str = "all", layers_again: bool = False, head_again: bool = False
) -> Operations:
    """A forward pass with its backward pass.

    trains: "all" parameters of text and head, twice the forward's products backward; "adapters", whose base passes
    gradients on once; "tower too", which else is frozen and runs forward only. What is computed a second time is no part
    of what an update needs; to estimate time, add it: layers_again under gradient checkpointing, head_again for TRL's
    fused head, which keeps no logits.
    """
    backward = 1.0 if trains == "adapters" else 2.0
    again = float(layers_again)
    return forward.times(
        text=1 + backward + again,
        attention=3 + again,
        head=1 + backward + float(head_again),
        tower=3 + again if trains == "tower too" else 1,
        probe=1,
        weights=1,
    )


def adapters(architecture: Architecture, targets: Sequence[str], rank: int) -> int:
    """Parameters that LoRA adds. Raises SettingError for a module that the text layers do not have."""
    shapes = adapted(architecture.text)
    if unknown := sorted(set(targets) - set(shapes)):
        raise SettingError(
            f"model.lora.target_modules: {unknown[0]!r} is none of the text layers' ({', '.join(shapes)})"
        )
    return architecture.text.layers * sum(rank * sum(shapes[name]) for name in targets)


def adapted(text: Text) -> Mapping[str, tuple[int, int]]:
    """Products of a layer that LoRA may stand beside: width in, width out."""
    return {
        "q_proj": (text.hidden, text.queries),
        "k_proj": (text.hidden, text.keys),
        "v_proj": (text.hidden, text.keys),
        "o_proj": (text.queries, text.hidden),
        "gate_proj": (text.hidden, text.intermediate),
        "up_proj": (text.hidden, text.intermediate),
        "down_proj": (text.intermediate, text.hidden),
    }


def _text_pass(text: Text, tokens: float, pairs: float, scored: float) -> Operations:
    """pairs: of a query and a key, of all sequences."""
    return Operations(
        text=2.0 * tokens * text.layers * text.layer_products,
        attention=4.0 * pairs * text.layers * text.queries,
        head=2.0 * scored * text.hidden * text.vocabulary,
    )


def _tower_weights(tower: Tower) -> float:
    """Weights that multiply each patch; the merging's are shared by the patches of a visual token."""
    block = 4 * tower.hidden**2 + (3 if tower.gated else 2) * tower.hidden * tower.intermediate
    merging = (1 + tower.deepstack) * tower.merged * (tower.merged + tower.out) / tower.merge**2
    return tower.patch_values * tower.hidden + tower.layers * block + merging


def _windows(tower: Tower, rows: int, columns: int) -> int:
    """Pairs of patches of one frame that see one another within windows, those at the edges being smaller."""
    side = tower.window // tower.side  # in visual tokens

    def parts(length: int) -> list[int]:
        whole, rest = divmod(length // tower.merge, side)
        return [side] * whole + ([rest] if rest else [])

    return sum((a * b * tower.merge**2) ** 2 for a in parts(rows) for b in parts(columns))
