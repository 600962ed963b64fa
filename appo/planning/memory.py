"""A process's setting and load -> what its GPU holds at each moment of a run, line by line.

A line is one of `LINES`. Moments follow one another, so that not all peaks meet: the key-value cache is gone when the
update's activations come. The total is the largest sum of any moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from appo.planning import activations
from appo.planning.setting import Load, Setting

LINES = (
    "parameters",
    "gradients",
    "masters",
    "moments",
    "reference",
    "activations",
    "logits",
    "kv_cache",
    "vision_features",
    "engine",
)
# DeepSpeed's defaults, in numbers: one bucket of gradients, and parameters that ZeRO-3 keeps gathered.
ZERO_BUCKET, ZERO_LIVE = 500_000_000, 1_000_000_000
# Of `appo.perception.weights`: working memory of a group's token weights.
WEIGHTS_BYTES = 24 * 2**20


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes by line at one moment of a run."""

    name: str
    lines: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.lines.values())


def moments(setting: Setting, load: Load, gpu_bytes: float = 0.0) -> list[Moment]:
    """What a process holds at the moments that can be its largest. gpu_bytes: of its GPU; an engine takes a share."""
    always = standing(setting, gpu_bytes)
    gathered, layer_gathered = _gathered_whole(setting), _gathered_by_layer(setting)
    encoding = _features(setting, load, 1) + activations.encoder(setting, load)
    found = [Moment("encode", _sum(always, vision_features=encoding))]
    if setting.rollout == "transformers":
        found += _rollout(setting, load, always, gathered, load.groups, load.members, "rollout")
    found += _rollout(setting, load, always, gathered, load.looked_at, load.group_size, "look")
    looking = activations.looking_pass(load, load.group_size)
    found.append(_no_gradient(setting, load, always, gathered, looking, "look: score", reads=True))
    run = activations.scoring_pass(setting, load)
    if setting.scores_first:
        found.append(
            _no_gradient(setting, load, always, layer_gathered, run, "score", reads=setting.reads_attention)
        )
    if setting.reference:  # which lies in the type that it computes in
        sharded = layer_gathered if setting.parameters_sharded else 0.0
        found.append(_no_gradient(setting, load, always, sharded, run, "score: reference", reads=False))
    return found + _update(setting, load, always, layer_gathered, run)


def lines(found: Iterable[Moment]) -> dict[str, float]:
    """Each line's own peak, and the largest sum of one moment as "total"."""
    kept = list(found)
    peaks = {line: max(moment.lines.get(line, 0.0) for moment in kept) for line in LINES}
    return {**peaks, "total": max(moment.total for moment in kept)}


def standing(setting: Setting, gpu_bytes: float) -> dict[str, float]:
    """What lies there from the first step to the last."""
    computes, base, trained = setting.computes, setting.base, setting.trained
    tower = 0 if setting.trains_tower else setting.architecture.parameters.tower * computes
    sharded = setting.shards if setting.parameters_sharded else 1
    zero = setting.layout.startswith("zero")
    found = {"parameters": float(tower), "moments": 8 * trained / setting.shards}
    if setting.full:
        if computes == 2 or zero:
            found["masters"] = 4 * trained / setting.shards
        if zero or computes == 4:
            found["parameters"] += computes * base / sharded
    else:
        adapters = 4 if not zero else computes
        found["parameters"] += (computes * base + adapters * trained) / sharded
        if zero:
            found["masters"] = 4 * trained / setting.shards
    if setting.reference:
        found["reference"] = computes * base / sharded
    if setting.layout == "ddp" and setting.processes > 1:
        found["gradients"] = 4.0 * trained  # DistributedDataParallel's buckets lie beside the gradients
    if setting.engine_share:
        found["engine"] = setting.engine_share * gpu_bytes
    return found


def _rollout(
    setting: Setting,
    load: Load,
    standing: dict[str, float],
    gathered: float,
    groups: int,
    members: int,
    name: str,
) -> list[Moment]:
    """Prefill, and the last token drawn."""
    text, vocabulary = setting.architecture.text, setting.architecture.text.vocabulary
    each = text.layers * text.keys * (max(setting.stream, setting.computes) + setting.computes)
    length = load.prompt + load.completion
    rows = groups * members
    rows = max(1, min(rows, int(setting.rollout_bytes // (length * each))))
    groups = min(groups, -(-rows // members))
    features = _features(setting, load, groups)
    prefill = activations.Pass(0, 0, 0, 0, groups, load.prompt - 1, groups, groups)
    cache = rows * length * each
    more = rows * length * each / text.layers  # a layer's cache is copied as it grows
    start = _sum(
        standing,
        parameters=gathered,
        activations=activations.without_gradient(setting, prefill),
        kv_cache=groups * load.prompt * each,
        vision_features=features,
    )
    end = _sum(
        standing,
        parameters=gathered,
        kv_cache=cache + more,
        logits=rows * vocabulary * (activations.DRAWN_BYTES + setting.computes),
    )
    return [Moment(f"{name}: prefill", start), Moment(f"{name}: last token", end)]


def _no_gradient(
    setting: Setting,
    load: Load,
    standing: dict[str, float],
    gathered: float,
    run: activations.Pass,
    name: str,
    *,
    reads: bool,
) -> Moment:
    text = setting.architecture.text
    inside = activations.without_gradient(setting, run)
    if reads:
        inside += activations.probe(setting, run) + run.scored * (
            4 * load.frames + text.hidden * setting.stream
        )
    lines = _sum(standing, parameters=gathered, vision_features=_features(setting, load, run.videos))
    after = activations.head(setting, run, backward=False)
    if inside >= after:
        return Moment(name, _sum(lines, activations=inside))
    return Moment(name, _sum(lines, logits=after, activations=2 * run.tokens * text.hidden * setting.stream))


def _update(
    setting: Setting, load: Load, standing: dict[str, float], gathered: float, run: activations.Pass
) -> list[Moment]:
    text = setting.architecture.text
    kept = activations.kept(setting, run)
    features = _features(setting, load, run.videos)
    gradients, buffers = _gradients(setting)
    before = gradients if load.micro_batches > 1 else 0.0
    head = text.embedding * 4.0 if setting.full else 0.0
    if setting.layout == "fsdp2" and setting.full:
        head += text.embedding * setting.computes
    if setting.masters_are_parameters and setting.checkpointing:
        # Rounded weights live as long as autocast, through the forward pass; without checkpointing autograd keeps them.
        released = gathered
    else:
        released = 0.0
    read = 0.0
    if setting.reads_attention and not setting.scores_first:
        read = activations.probe(setting, run) + run.scored * (
            4 * load.frames + 2 * text.hidden * setting.stream
        )
    base = _sum(standing, vision_features=features, gradients=before)
    forward = _sum(
        base,
        parameters=gathered,
        activations=kept + read,
        logits=activations.head(setting, run, backward=False),
    )
    at_head = _sum(
        base,
        parameters=gathered - released,
        activations=kept,
        logits=activations.head(setting, run, backward=True),
        gradients=head,
    )
    at_last_layer = _sum(
        base,
        parameters=gathered - released,
        activations=kept + activations.of_a_layer(setting, run),
        gradients=max(0.0, head - (before if text.tied else 0.0)) + buffers,
    )
    # The gradients of the first layer's weights, and of the embeddings below it, are still to come.
    to_come = (text.layer + text.embedding) / setting.base if setting.full else 1 / text.layers
    held = head if text.tied else 0.0  # the head's, until the embeddings' joins it
    at_first_layer = _sum(
        base,
        parameters=gathered - released,
        activations=kept / text.layers + activations.of_a_layer(setting, run),
        gradients=held + (0.0 if before else gradients * (1 - to_come)) + buffers,
    )
    at_embedding = _sum(
        base,
        parameters=gathered - released,
        gradients=held + buffers + (head if before or text.tied else 0.0) + (0.0 if before else gradients),
    )
    if text.tied and not before:
        at_embedding["gradients"] -= head  # its place in `gradients` is not taken yet
    stepping = _sum(standing, gradients=gradients + _step_copies(setting))
    if setting.reads_attention:
        weighing = WEIGHTS_BYTES + run.scored * text.hidden * setting.computes * 2
        forward["activations"] = max(
            forward["activations"], kept + weighing - activations.head(setting, run, backward=False)
        )
    return [
        Moment("update: end of the forward pass", forward),
        Moment("update: head backward", at_head),
        Moment("update: last layer backward", at_last_layer),
        Moment("update: first layer backward", at_first_layer),
        Moment("update: embeddings backward", at_embedding),
        Moment("optimizer", stepping),
    ]


def _gradients(setting: Setting) -> tuple[float, float]:
    """Bytes of all gradients that a process keeps, and of buffers while they are summed up over processes."""
    trained, text = setting.trained, setting.architecture.text
    if setting.layout == "ddp":
        return 4.0 * trained, 0.0
    if setting.layout == "fsdp2":
        if not setting.full:
            return 4.0 * trained / setting.processes, 4.0 * trained / text.layers
        # Of a layer: in the type that was gathered, and in float32 to be summed up; embeddings and head are larger.
        largest = max(text.layer, text.embedding)
        return 4.0 * trained / setting.processes, largest * (4.0 + setting.computes)
    buckets = ZERO_BUCKET * (2 * setting.computes + (4 if setting.computes == 2 else 0))
    return setting.computes * trained / setting.processes, float(buckets)


def _step_copies(setting: Setting) -> float:
    """DeepSpeed's gradients in float32, for the parameters that this process updates."""
    return 4.0 * setting.trained / setting.processes if setting.layout.startswith("zero") else 0.0


def _gathered_whole(setting: Setting) -> float:
    """Bytes of a copy to compute with of every parameter, for rollouts and looks."""
    if setting.masters_are_parameters:
        return setting.computes * float(setting.base)  # rounded by autocast, kept while it lasts
    if not setting.parameters_sharded:
        return 0.0
    own = setting.base / setting.processes if setting.layout == "zero3" else 0.0
    return setting.computes * (setting.base - own)


def _gathered_by_layer(setting: Setting) -> float:
    """The same for scoring and updates, where sharded layers come one after another."""
    if setting.masters_are_parameters:
        return setting.computes * float(setting.base)
    if not setting.parameters_sharded:
        return 0.0
    text = setting.architecture.text
    if setting.layout == "zero3":
        return setting.computes * float(min(setting.base, ZERO_LIVE))
    embeddings = text.embedding * (1 if text.tied else 2)
    return setting.computes * float(embeddings + 2 * text.layer)


def _features(setting: Setting, load: Load, videos: int) -> float:
    """Visual input of a pass over so many prompts: features, or pixels where the tower runs in every pass."""
    tower = setting.architecture.tower
    if setting.features_kept:
        return videos * load.visual * tower.width * setting.computes
    patches = sum(t * h * w for t, h, w in load.grids)
    return videos * (patches * tower.patch_values * 4 + load.visual * tower.width * setting.computes)


def _sum(lines: dict[str, float], **more: float) -> dict[str, float]:
    return {line: lines.get(line, 0.0) + more.get(line, 0.0) for line in {*lines, *more}}


def largest(found: Sequence[Moment]) -> Moment:
    return max(found, key=lambda moment: moment.total)
