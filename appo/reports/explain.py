"""A checkpoint and one sample -> a rolled-out group and what APPO sees in it, as one page.

For a researcher who wants to trust or doubt the method: rewards, the sets S1 and S2, the frames of each
completion, the crucial frames psi', every token with its weight, and the attention behind all of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from appo.config import Recipe
from appo.modeling.checkpoints import check_model
from appo.reports import attention, figures, page
from appo.reports.attention import Group
from appo.reports.results import ReportError
from appo.reports.tables import UNKNOWN, Table, to_terminal
from appo.storage import write_atomic


@dataclass(frozen=True, slots=True)
class Explanation:
    """html: the page. group: the same as JSON. text: what a terminal shows."""

    html: Path
    group: Path
    text: str


def explain(
    checkpoint: str, sample_id: str, *, recipe: Recipe, manifest_path: Path, out: Path, seed: int = 0
) -> Explanation:
    """Roll out one group on one sample with the recipe's sampling, and write explain.html and group.json to
    `out`.

    checkpoint: folder or hub name. sample_id: of the manifest. Raises ReportError for an unknown sample,
    CheckpointError for what is no whole checkpoint.
    """
    group = roll_out(checkpoint, sample_id, recipe=recipe, manifest_path=manifest_path, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "group.json", json.dumps(group, ensure_ascii=False) + "\n")
    pictures = figures.Pictures(manifest_path, recipe)
    write_atomic(out / "explain.html", build_page(group, recipe, pictures, checkpoint=checkpoint, seed=seed))
    text = to_terminal(completion_table(group)) + "\n" + "\n".join(findings(group, recipe)) + "\n"
    return Explanation(out / "explain.html", out / "group.json", text)


def roll_out(checkpoint: str, sample_id: str, *, recipe: Recipe, manifest_path: Path, seed: int) -> Group:
    """One group of completions with rewards, attention and weights, by the code that training itself uses."""
    from appo.data.frames import open_frames
    from appo.data.manifest import read_manifest

    manifest = read_manifest(manifest_path)
    samples = [sample for sample in manifest.samples if sample.id == sample_id]
    if not samples:
        near = ", ".join(sample.id for sample in manifest.samples[:3])
        raise ReportError(f"sample {sample_id!r}: is not in {manifest_path}; its samples are such as {near}")
    check_model(checkpoint)

    from appo.modeling.loading import load_policy, load_processor
    from appo.training.arguments import quiet
    from appo.training.diagnosis import look
    from appo.training.rewarding import task_rewards
    from appo.training.store import PromptStore

    quiet()
    processor = load_processor(checkpoint)
    model = load_policy(checkpoint, recipe.model)
    store = PromptStore(samples, open_frames(manifest, recipe), processor, recipe)
    (seen,) = look(model, processor, store, {0: sample_id}, recipe, task_rewards(recipe), seed=seed)
    return asdict(seen)


def completion_table(group: Group) -> Table:
    """One row a completion: its set, rewards, frames, and how much its tokens were weighted."""
    names = list(group["rewards"])
    psi = group.get("psi") or [[] for _ in group["completions"]]
    rows = []
    for index, _ in enumerate(group["completions"]):
        side = "S1 right" if index in group["right"] else "S2 wrong" if index in group["wrong"] else UNKNOWN
        length = len(group["tokens"][index])
        weights = group["weights"][index][:length] if group.get("weights") else []
        raised = sum(weight > 1 for weight in weights)
        rewards = (
            UNKNOWN if (value := group["rewards"][name][index]) is None else f"{value:g}" for name in names
        )
        rows.append(
            (
                str(index),
                side,
                *rewards,
                ", ".join(map(str, psi[index])) or UNKNOWN,
                f"{raised} of {length}" if weights else UNKNOWN,
                f"{max(weights):.2f}" if weights else UNKNOWN,
            )
        )
    return Table(
        key="completions",
        title="Completions of the group",
        columns=("completion", "set", *names, "its frames ψ(i)", "tokens with W > 1", "largest W"),
        rows=tuple(rows),
        notes=("S1: accuracy reward at least τ; S2: the rest. Frames are temporal patches, counted from 0.",),
    )


def findings(group: Group, recipe: Recipe) -> list[str]:
    """What APPO makes of this group, in sentences."""
    settings, right, wrong = recipe.perception, group["right"], group["wrong"]
    crucial, keys = group["crucial_frames"], group["key_frames"]
    said = []
    if not group["attention"]:
        return ["The prompt holds no video, so there are no frames to weigh: every token weight is 1."]
    if not right:
        said.append(
            "No completion is right: S1 is empty, "
            + (
                "so no frame is crucial and every weight is 1."
                if not crucial
                else "fallback takes all completions."
            )
        )
    elif not wrong:
        said.append("Every completion is right: all advantages are 0, and the weights scale nothing.")
    frames = ", ".join(map(str, crucial)) or "none"
    said.append(f"Crucial frames ψ′ ({settings.strategy}): {frames}, of {len(group['attention'][0][0])}.")
    psi = group.get("psi") or []
    if psi and right and wrong:
        first, second = ({f for i in side for f in psi[i]} for side in (right, wrong))
        shared = len(first & second) / len(first | second)
        said.append(
            f"Right completions look at {sorted(first)}, wrong ones at {sorted(second)}: "
            f"{shared:.0%} of these frames "
            "are shared" + (", so attention does not tell right from wrong here." if shared == 1 else ".")
        )
    if keys:
        hit = bool(set(keys) & set(crucial))
        said.append(
            f"The answer shows in {keys}: {'found' if hit else 'not found'} among the crucial frames."
        )
        preference = attention.key_frame_attention([group])
        if preference is not None:
            said.append(f"Attention to those frames is {preference:.2f} times the mean of all frames.")
    return said


def build_page(
    group: Group, recipe: Recipe, pictures: figures.Pictures, *, checkpoint: str, seed: int
) -> str:
    """The page as text."""
    settings = recipe.perception
    order = [*group["right"], *group["wrong"]]
    order += [i for i in range(len(group["completions"])) if i not in order]
    facts = [
        ("checkpoint", "/".join(Path(checkpoint).parts[-3:])),
        ("sample", group["sample_id"]),
        ("seed", str(seed)),
        ("K1, K2, K3", f"{settings.k1}, {settings.k2}, {settings.k3}"),
        ("layers", "last 3" if settings.layers == "last3" else ", ".join(map(str, settings.layers))),
        ("strategy", settings.strategy),
    ]
    overview = figures.question(group, pictures) + _sentences(findings(group, recipe))
    return page.render(
        title="What APPO sees in one group",
        lead=f"{len(group['completions'])} completions of one question, rolled out from one checkpoint.",
        facts=facts,
        sections=[
            page.section("group", "The group", overview, completion_table(group)),
            page.section(
                "tokens", "Tokens by weight", _token_legend(settings.max_weight), *_tokens(group, order)
            ),
            page.section("attention", "Attention", *_maps(group, recipe, pictures, order))
            if group["attention"]
            else None,
        ],
        footer=["Made by <code>appo explain</code>; the same group as data is in <code>group.json</code>."],
    )


def _sentences(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _side(group: Group, index: int) -> str:
    if index in group["right"]:
        return '<span class="pill right">right, S1</span>'
    return '<span class="pill wrong">wrong, S2</span>' if index in group["wrong"] else ""


def _token_legend(max_weight: float) -> str:
    cells = "".join(
        f'<span style="background:{_weight_colour(1 + share * (max_weight - 1), max_weight)}">'
        f" {1 + share * (max_weight - 1):.2f} </span>"
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    return f'<p class="tokens">weight W: {cells}</p>'


def _tokens(group: Group, order: Sequence[int]) -> list[str]:
    """Each completion as text, every token on a ground as strong as its weight."""
    if not group.get("weights"):
        return ['<p class="note">No token was weighted.</p>']
    highest = max(1.0 + 1e-9, max(max(row) for row in group["weights"]))
    blocks = []
    for index in order:
        spans = []
        for position, token in enumerate(group["tokens"][index]):
            weight = group["weights"][index][position]
            ground = f' style="background:{_weight_colour(weight, highest)}"' if weight > 1 else ""
            shown = escape(token).replace("\n", "⏎<br>")
            spans.append(f'<span{ground} title="token {position}, W = {weight:.3f}">{shown}</span>')
        blocks.append(
            f'<h3>Completion {index} {_side(group, index)}</h3><p class="tokens">{"".join(spans)}</p>'
        )
    return blocks


def _weight_colour(weight: float, highest: float) -> str:
    """White for 1 to a warm orange for the largest; black text on it keeps a contrast above 7."""
    share = 0.0 if highest <= 1 else min(1.0, max(0.0, (weight - 1) / (highest - 1)))
    mixed = (round(255 + (target - 255) * share) for target in (246, 165, 92))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _maps(group: Group, recipe: Recipe, pictures: figures.Pictures, order: Sequence[int]) -> list[str]:
    """A heat map for each completion on one scale; the first right and the first wrong open, the rest
    folded.
    """
    thumbs = pictures.of(group["sample_id"], len(group["attention"][0][0]))
    scale = figures.common_scale([(group, index) for index in order])
    opened = {attention.choose_completion(group, side) for side in ("right", "wrong")} - {None} or {order[0]}
    blocks = []
    for index in order:
        drawn = figures.map_of(
            group,
            index,
            f"Completion {index}: attention of its tokens to the frames",
            thumbs,
            scale=scale,
            max_weight=recipe.perception.max_weight,
        )
        state = " open" if index in opened else ""
        blocks.append(
            f"<details{state}><summary>Completion {index} {_side(group, index)}</summary>{drawn}</details>"
        )
    note = (
        "Darker: more attention, averaged over heads and the layers read. Framed: crucial frames ψ′. "
        "★: the answer "
        "truly shows there. All maps share one scale."
    )
    return [f'<p class="note">{note}</p>', *blocks]
