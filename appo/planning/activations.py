"""A setting and the lengths of a pass -> the bytes that autograd keeps of it, and those that come and go.

Read off transformers' Qwen layers, tensor by tensor; `benchmarks/plan_memory.py` holds it against real training steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from appo.planning.setting import Load, Setting

# TRL's fused head makes logits in tiles of so many rows and vocabulary entries (`trl.kernels.chunked_logprob`).
HEAD_ROWS, HEAD_COLUMNS = 4096, 32768
# Of float32 tiles that torch's own operations hold at once where Triton does not fuse them, forward and backward.
CPU_TILES_FORWARD, CPU_TILES_BACKWARD = 3, 6
# Numbers a row and vocabulary entry while a token is drawn: logits, their float32 copy, noise, its logarithm, their sum.
DRAWN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Pass:
    """Lengths of one forward pass. groups prompts of `prefix` tokens that stand once, each with `members` completions;
    without a shared prefix there are no groups, and `rows` sequences of `length`. scored: rows that the head sees.
    """

    groups: int
    prefix: int
    members: int
    width: int
    rows: int
    length: int
    scored: int
    videos: int

    @property
    def tokens(self) -> int:
        return self.groups * (self.prefix + self.members * self.width) + self.rows * self.length

    @property
    def segments(self) -> int:
        """Completions that attend to a shared prefix."""
        return self.groups * self.members


def scoring_pass(setting: Setting, load: Load) -> Pass:
    """Of one micro-batch, as scoring and loss run it."""
    if setting.shared_prefix:
        groups, members = load.groups_at_once, load.members_at_once
        scored = groups * members * load.completion
        return Pass(groups, load.prompt - 1, members, load.completion, 0, 0, scored, groups)
    length = load.prompt + load.completion
    return Pass(0, 0, 0, 0, load.rows, length, load.rows * load.completion, load.rows)


def looking_pass(load: Load, members: int) -> Pass:
    """Of the groups that are looked at at once, whose prompts are always shared."""
    scored = load.looked_at * members * load.completion
    return Pass(load.looked_at, load.prompt - 1, members, load.completion, 0, 0, scored, load.looked_at)


def kept(setting: Setting, run: Pass) -> float:
    """Bytes of all that autograd keeps until the backward pass, weights and logits left out."""
    text = setting.architecture.text
    layer = run.tokens * text.hidden * setting.stream if setting.checkpointing else _layer(setting, run)
    return text.layers * layer + _outside_layers(setting, run)


def of_a_layer(setting: Setting, run: Pass) -> float:
    """Most bytes beyond `kept` while one layer runs backward: what was made again of it, and gradients of its middle."""
    text, computes = setting.architecture.text, setting.computes
    gradients = run.tokens * (2 * text.intermediate * computes + 2 * text.hidden * setting.stream)
    return gradients + (_layer(setting, run) if setting.checkpointing else 0)


def without_gradient(setting: Setting, run: Pass) -> float:
    """Most bytes that a pass without gradient holds at once, in one of its layers."""
    text, computes, stream = setting.architecture.text, setting.computes, setting.stream
    residual = 2 * run.tokens * text.hidden * stream
    feed_forward = 3 * run.tokens * text.intermediate * computes
    projected = run.tokens * (text.queries + 2 * text.keys)
    attention = float(projected * (stream + computes) + run.tokens * text.queries * computes)
    if run.segments:
        spread = text.queries if setting.on_gpu else text.keys
        attention += run.segments * (run.prefix + run.width) * 2 * spread * stream
    elif run.rows:
        attention += 2 * run.tokens * text.queries * computes + _mask(setting, run)
    return residual + max(feed_forward, attention)


def head(setting: Setting, run: Pass, *, backward: bool) -> float:
    """Bytes of logits and what is made of them, the weight's gradient left out."""
    text = setting.architecture.text
    tile = min(run.scored, HEAD_ROWS) * HEAD_COLUMNS * setting.computes
    used = min(run.scored, HEAD_ROWS) * min(text.vocabulary, HEAD_COLUMNS) * 4
    cast = min(text.vocabulary, HEAD_COLUMNS) * text.hidden * 2 if setting.stream > setting.computes else 0
    tiles = CPU_TILES_BACKWARD if backward else CPU_TILES_FORWARD
    hidden = run.scored * text.hidden * 4 if backward else 0
    return tile + cast + hidden + (0 if setting.on_gpu else tiles * used)


def probe(setting: Setting, run: Pass) -> float:
    """Bytes while one layer's attention to frames is read; bounded, but for what is read."""
    text = setting.architecture.text
    keys = run.prefix + run.width if run.segments else run.length
    rows = run.scored
    return min(setting.probe_bytes, rows * keys * (4 * text.heads + 5) + 4 * rows * text.queries)


def encoder(setting: Setting, load: Load) -> float:
    """Bytes while the frozen tower encodes one video: its pixels and one layer's middle."""
    tower, computes = setting.architecture.tower, setting.computes
    patches = max(t * h * w for t, h, w in load.grids)
    pixels = patches * tower.patch_values * (4 + (computes if computes == 2 else 0))
    feed_forward = (3 if tower.gated else 2) * tower.intermediate * computes
    attention = 3 * tower.hidden * computes + 4 * tower.hidden * 4
    return pixels + patches * (2 * tower.hidden * computes + max(feed_forward, attention))


def _layer(setting: Setting, run: Pass) -> float:
    """Bytes that autograd keeps of one decoder layer."""
    text, computes, stream = setting.architecture.text, setting.computes, setting.stream
    trains = set(setting.targets) or set(_ALL)
    # Both norms: their input in float32 (the residual stream itself where that is float32), and what they scale.
    norms = 2 * 4 * text.hidden + (2 * stream * text.hidden if setting.full else 0) + 2 * 4
    before_attention = [name for name in ("q_proj", "k_proj", "v_proj") if name in trains]
    before_middle = [name for name in ("gate_proj", "up_proj") if name in trains]
    if setting.casts:  # every product rounds a copy of its own
        inputs = (len(before_attention) + len(before_middle)) * text.hidden * computes
    else:
        inputs = (bool(before_attention) + bool(before_middle)) * text.hidden * computes
    inputs += text.queries * computes if "o_proj" in trains else 0
    middle = (3 + ("down_proj" in trains)) * text.intermediate * computes
    if "down_proj" in trains and not setting.full and setting.casts:
        middle += text.intermediate * computes
    adapters = len(trains) * setting.rank * computes
    return run.tokens * (norms + inputs + middle + adapters) + _attention(setting, run)


_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _attention(setting: Setting, run: Pass) -> float:
    """Queries, keys, values and output of the attention kernel, with its log-sum-exps."""
    text, computes = setting.architecture.text, setting.computes
    statistics = 4 * text.heads * run.tokens
    if not run.segments:
        heads = text.queries  # a mask rules grouped heads out: keys are repeated
        return run.tokens * 4 * heads * computes + statistics + _mask(setting, run)
    # On a GPU the kernels for this bias take no grouped heads either.
    spread = text.queries if setting.on_gpu else text.keys
    prefix = run.groups * run.prefix * 2 * (text.queries + text.keys)
    segments = run.segments * (2 * run.width * text.queries + 2 * (run.prefix + run.width) * spread)
    mask = 0 if setting.on_gpu else run.width * (run.prefix + run.width)
    return (prefix + segments + mask) * computes + statistics


def _mask(setting: Setting, run: Pass) -> float:
    return run.rows * run.length**2 * setting.computes


def _outside_layers(setting: Setting, run: Pass) -> float:
    """The last norm, rotary factors and the rows that the head sees."""
    text, stream = setting.architecture.text, setting.stream
    norm = run.tokens * text.hidden * (4 + (stream if setting.full else 0))
    rotary = run.tokens * 2 * text.head_dim * stream
    return norm + rotary + run.scored * text.hidden * stream
