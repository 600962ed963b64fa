"""An analysis and the kept groups -> the figures of the page, each with the sentence that goes under it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from appo.reports import attention, heatmap, svg
from appo.reports.analysis import Analysis, Method
from appo.reports.attention import Group
from appo.reports.statistics import band, summarise

log = logging.getLogger("appo.reports")
# Rewards of single steps jump; so many steps are averaged before the seeds are.
_WINDOW = 5
_OWN_CURVES = (
    ("appo/crucial_frames", "Crucial frames of a group", "frames", False),
    ("appo/perception_share", "Share of perception tokens", "percent of tokens", True),
    ("appo/overlap", "Overlap of right and wrong completions' frames", "percent", True),
    ("appo/degenerate_share", "Groups in which every weight is 1", "percent", True),
)
_CURVES = (
    ("rewards/accuracy/mean", "Accuracy of the rollouts", "percent right", True),
    ("reward", "Reward", "mean reward", False),
    ("entropy", "Entropy of the policy", "nats per token", False),
    ("completions/mean_length", "Length of the completions", "tokens", False),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """html: an SVG or more. caption: what it shows and how it was made."""

    key: str
    title: str
    html: str
    caption: str


def accuracy_figure(analysis: Analysis) -> Figure | None:
    benchmark = analysis.main_benchmark
    values = {
        m.label: list(m.by_seed[benchmark].values()) for m in analysis.methods if benchmark in m.by_seed
    }
    if not values:
        return None
    drawn = svg.dot_plot(
        values,
        {label: s for label in values if (s := summarise(values[label]))},
        title=f"Accuracy on {benchmark}",
        x_label="accuracy, percent",
        names=analysis.names,
        reference=analysis.start.get(benchmark),
        reference_name="start",
    )
    return Figure(
        "accuracy",
        f"Accuracy on {benchmark} after training",
        drawn,
        "A mark is one seed, the upright bar the mean, the shade one deviation to each side; dashed: "
        "the weights that "
        "every training started from.",
    )


def curve_figures(analysis: Analysis, *, own: bool = False) -> list[Figure]:
    """Learning curves of what every algorithm logs, or of APPO's own measures."""
    found = []
    for key, title, y_label, percent in _OWN_CURVES if own else _CURVES:
        bands = {}
        for method in analysis.methods:
            curves = [
                [(int(s["step"]), s[key]) for s in t.steps if s.get(key) is not None]
                for t in method.trainings
            ]
            if drawn := band([c for c in curves if c], window=_WINDOW):
                bands[method.label] = drawn
        if not bands:
            continue
        drawn_html = svg.line_chart(
            bands, title=title, y_label=y_label, names=analysis.names, percent=percent
        )
        n = "/".join(str(b.n) for b in bands.values())
        caption = f"Mean over seeds (n={n}) with one deviation; running mean over {_WINDOW} steps."
        found.append(Figure(key.replace("/", "-"), title, drawn_html, caption))
    return found


def phase_figure(analysis: Analysis) -> Figure | None:
    """Seconds of a step by phase; the median step of each training, averaged over seeds."""
    rows = {m.label: phases for m in analysis.methods if (phases := _phases(m))}
    if not rows:
        return None
    drawn = svg.stacked_bars(
        rows, title="Seconds of a step by phase", x_label="seconds", names=analysis.names
    )
    return Figure(
        "phases",
        "Where a step's time goes",
        drawn,
        "Mean over steps and seeds, the first two steps left out.",
    )


def _phases(method: Method) -> dict[str, float]:
    steps = [s for t in method.trainings for s in t.steps[2:]]
    names = sorted({k for s in steps for k in s if k.startswith("phase/")}, key=_phase_order)
    return {
        name.removeprefix("phase/").removesuffix("_s"): fmean(float(s.get(name) or 0.0) for s in steps)
        for name in names
    }


def _phase_order(name: str) -> tuple[int, str]:
    order = ("rollout", "scoring", "rewards", "attention", "weights", "update")
    short = name.removeprefix("phase/").removesuffix("_s")
    return (order.index(short) if short in order else len(order), short)


class Pictures:
    """Frames of samples as thumbnails, where the manifest and its videos are at hand; nothing otherwise."""

    def __init__(self, manifest_path: Path | None, recipe: Any) -> None:
        self._samples: Mapping[str, Any] = {}
        self._source: Any = None
        if manifest_path is None:
            return
        try:
            from appo.data.frames import open_frames
            from appo.data.manifest import read_manifest

            manifest = read_manifest(manifest_path)
            self._source = open_frames(manifest, recipe)
            self._samples = {sample.id: sample for sample in manifest.samples}
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            log.warning("no pictures in the heat maps: %s", error)

    def of(self, sample_id: str, num_patches: int) -> dict[int, str]:
        sample = self._samples.get(sample_id)
        if sample is None or self._source is None:
            return {}
        try:
            return heatmap.thumbnails(self._source.load(sample).frames, num_patches=num_patches)
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("no pictures of %s: %s", sample_id, error)
            return {}

    def sample(self, sample_id: str) -> Any:
        """The manifest's record, for the options and the answer; None where it is not at hand."""
        return self._samples.get(sample_id)


def map_of(group: Group, index: int, title: str, pictures: Mapping[int, str], **more: Any) -> str:
    """The heat map of one completion of a group."""
    length = max(1, len(group["tokens"][index]))
    weights = group.get("weights") or []
    return heatmap.draw(
        heatmap.HeatMap(
            title=title,
            tokens=group["tokens"][index],
            attention=group["attention"][index][:length],
            times_s=attention.patch_times_s(group),
            crucial=group.get("crucial_frames", ()),
            key=group.get("key_frames", ()),
            weights=weights[index][:length] if weights else (),
            thumbnails=pictures,
            **more,
        )
    )


def attention_figure(analysis: Analysis, pictures: Pictures) -> Figure | None:
    """A right and a wrong completion of one question, under APPO where it was trained (Figures A, C)."""
    methods = sorted(analysis.methods, key=lambda m: m.algorithm != "appo")
    for method in methods:
        groups = [g for t in method.trainings for g in attention.last_groups(t.groups)]
        group = attention.choose_group(groups)
        if group is None:
            continue
        thumbs = pictures.of(group["sample_id"], len(group["attention"][0][0]))
        chosen = [(side, attention.choose_completion(group, side)) for side in ("right", "wrong")]
        shown = [(side, index) for side, index in chosen if index is not None] or [("only", 0)]
        scale = common_scale([(group, i) for _, i in shown])
        maps = []
        for side, index in shown:
            name = {"right": "A right completion", "wrong": "A wrong completion", "only": "A completion"}[
                side
            ]
            maps.append(f"<h3>{name}</h3>{said(group['completions'][index])}")
            maps.append(
                map_of(
                    group,
                    index,
                    f"{name} of {method.name}: attention of its tokens to the frames",
                    thumbs,
                    scale=scale,
                    max_weight=analysis.recipe.perception.max_weight,
                )
            )
        head = question(group, pictures)
        caption = (
            f"{method.name}, seed {group.get('seed', '?')}, after step {group.get('step', '?')}, on "
            f"a held-out question. "
            "Darker: more attention, averaged over heads and the layers read. Framed: crucial frames "
            "ψ′. ★: the frame "
            "where the answer truly shows. Right: the token's weight W. The group is the first in "
            "the file that holds "
            "right and wrong completions; it was not picked by eye."
        )
        return Figure("attention", "What the answer looks at", head + "".join(maps), caption)
    return None


def side_by_side(analysis: Analysis, pictures: Pictures) -> Figure | None:
    """The same question answered by every method, one completion and one heat map each (Figure G, F)."""
    kept = {
        m.label: {g["sample_id"]: g for t in m.trainings[:1] for g in attention.last_groups(t.groups)}
        for m in analysis.methods
    }
    kept = {label: groups for label, groups in kept.items() if groups}
    if len(kept) < 2:
        return None
    common = set.intersection(*(set(groups) for groups in kept.values()))
    lead = kept.get("appo") or next(iter(kept.values()))
    chosen = attention.choose_group(list(lead.values()), common)
    if chosen is None:
        return None
    sample_id = chosen["sample_id"]
    thumbs = pictures.of(sample_id, len(chosen["attention"][0][0]))
    groups = {
        label: groups[sample_id] for label, groups in kept.items() if groups[sample_id].get("attention")
    }
    scale = common_scale([(g, 0) for g in groups.values()])
    columns = []
    for label, group in groups.items():
        right = [r for r in group["rewards"].get("accuracy", []) if r is not None]
        share = f"{sum(r >= 0.5 for r in right)} of {len(right)} completions right" if right else ""
        name = analysis.names[label]
        columns.append(
            f'<div class="column"><h3 style="color:{svg.colour(label)}">{escape(name)}</h3>'
            f'<p class="note">{share}</p>{said(group["completions"][0])}'
            + map_of(
                {**group, "weights": []},
                0,
                f"{name}: attention of the first completion's tokens",
                thumbs,
                scale=scale,
                widest_cell=28,
            )
            + "</div>"
        )
    return Figure(
        "side_by_side",
        "The same question under each algorithm",
        question(chosen, pictures) + f'<div class="columns">{"".join(columns)}</div>',
        "The first completion of each algorithm's first seed after training, on one scale of colour "
        "(as the paper's "
        "Figures F and G).",
    )


def common_scale(shown: Sequence[tuple[Group, int]]) -> tuple[float, float]:
    """The least and the most attention of several completions, so that their maps share one scale of
    colour.
    """
    rows = [row for group, i in shown for row in group["attention"][i][: len(group["tokens"][i]) or 1]]
    return min(map(min, rows)), max(map(max, rows))


def question(group: Group, pictures: Pictures) -> str:
    """The question with its options, the true answer marked."""
    sample = pictures.sample(group["sample_id"])
    parts = [f'<p class="question">{escape(group["question"])}</p>']
    if sample is not None and sample.options:
        options = []
        for index, option in enumerate(sample.options):
            letter = chr(ord("A") + index)
            mark = " <b>✓ answer</b>" if letter == sample.answer else ""
            options.append(f"<li>{letter}. {escape(option)}{mark}</li>")
        parts.append(f'<ul class="options">{"".join(options)}</ul>')
    return "".join(parts)


def said(text: str) -> str:
    return f'<p class="said">{escape(text.strip()) or "(empty)"}</p>'
