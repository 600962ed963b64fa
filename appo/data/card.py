"""A manifest -> the data card, one HTML file: composition, lengths, samples with frames, rejects."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from appo.config import Recipe
from appo.data.frames import open_frames
from appo.data.manifest import Manifest
from appo.data.schema import VideoSample
from appo.data.shards import encode_image
from appo.data.sources.base import Reject
from appo.data.video import VideoError, resize

SAMPLES_SHOWN, FRAMES_SHOWN, THUMB_HEIGHT = 8, 6, 84
HISTOGRAM_BINS = 20

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2rem auto;padding:0 1rem;color:#1c2330}
h1{margin-bottom:0}h2{margin-top:2rem;border-bottom:1px solid #d5dae3}table{border-collapse:collapse}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}td.n,th.n{text-align:right}
code{background:#f1f3f7;padding:0 .2rem;overflow-wrap:anywhere}.sample{margin:1rem 0}
.sample img{height:84px;margin-right:2px}.answer{font-weight:600}.quiet{color:#5b6678}
"""


def data_card(
    manifest: Manifest, recipe: Recipe, rejects: Sequence[Reject], leakage: Mapping[str, Any]
) -> str:
    """The card as a self-contained page: no script, nothing loaded from elsewhere."""
    header = manifest.header
    facts = {
        "rule": header["rule"],
        "seed": str(header["seed"]),
        "manifest SHA-256": manifest.digest,
        **{f"SHA-256 of {name}": digest for name, digest in header["annotations_sha256"].items()},
        "sampling": ", ".join(f"{k}={v}" for k, v in header["video"].items() if v is not None),
        "frames": f"{header['frames'] or 'decoded on the fly'} ({header['encoding']})",
    }
    sections = [
        f"<h1>Data card: {_text(header['name'])}</h1>",
        f"<p class=quiet>{len(manifest.samples):,} samples, {header['counts']['videos']['total']:,} videos, "
        f"{len(rejects):,} rejected</p>",
        _table(("", ""), facts.items()),
        "<h2>Composition</h2>",
        _composition(manifest.samples),
        "<h2>Lengths of the videos</h2>",
        _histogram(manifest.samples),
        "<h2>Samples</h2>",
        *_samples(manifest, recipe),
        "<h2>Rejected</h2>",
        _rejects(rejects),
        "<h2>Videos shared with benchmarks' test sets</h2>",
        _leaks(leakage),
    ]
    title = f"Data card: {_text(header['name'])}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{_STYLE}</style>{''.join(sections)}</html>\n"
    )


def _composition(samples: Sequence[VideoSample]) -> str:
    splits = sorted({sample.split for sample in samples})
    table = Counter((sample.source, sample.problem_type, sample.split) for sample in samples)
    rows = []
    for source, kind in sorted({(s, k) for s, k, _ in table}):
        counts = [table[source, kind, split] for split in splits]
        rows.append((source, kind, *counts, sum(counts)))
    totals = [sum(table[key] for key in table if key[2] == split) for split in splits]
    rows.append(("all", "", *totals, len(samples)))
    return _table(("source", "type of question", *splits, "total"), rows)


def _histogram(samples: Sequence[VideoSample]) -> str:
    lengths = sorted(
        {s.video_sha256 or s.id: s.duration_s for s in samples if s.duration_s is not None}.values()
    )
    if not lengths:
        return "<p>No sample has a video.</p>"
    width = max(lengths[-1] / HISTOGRAM_BINS, 1e-9)
    counts = Counter(min(int(length / width), HISTOGRAM_BINS - 1) for length in lengths)
    tallest = max(counts.values())
    bars = []
    for index in range(HISTOGRAM_BINS):
        tall = 120 * counts[index] / tallest
        bars.append(
            f'<rect x="{index * 30}" y="{120 - tall:.1f}" width="28" height="{tall:.1f}" fill="#4a6fa5">'
            f"<title>{index * width:.1f} to {(index + 1) * width:.1f} s: {counts[index]}</title></rect>"
        )
    middle = lengths[len(lengths) // 2]
    return (
        '<svg viewBox="0 0 600 140" width="600" role="img" aria-label="Histogram of video lengths">'
        f"{''.join(bars)}"
        '<text x="0" y="136" font-size="12">0 s</text>'
        f'<text x="600" y="136" font-size="12" text-anchor="end">{lengths[-1]:.1f} s</text></svg>'
        f"<p class=quiet>{len(lengths):,} videos; shortest {lengths[0]:.1f} s, median {middle:.1f} s, "
        f"longest {lengths[-1]:.1f} s</p>"
    )


def _samples(manifest: Manifest, recipe: Recipe) -> Iterable[str]:
    source = open_frames(manifest, recipe)
    # Some of each source, rather than the first few of whichever comes first.
    by_source: dict[str, list[VideoSample]] = {}
    for sample in manifest.samples:
        by_source.setdefault(sample.source, []).append(sample)
    each = max(1, SAMPLES_SHOWN // max(1, len(by_source)))
    for _, members in sorted(by_source.items()):
        for sample in members[:each]:
            pictures = []
            if sample.video is not None:
                try:
                    loaded = source.load(sample)
                except VideoError as error:
                    yield f"<div class=sample>{_text(str(error))}</div>"
                    continue
                count = min(FRAMES_SHOWN, len(loaded.frames))
                for at in (round(i * (len(loaded.frames) - 1) / max(1, count - 1)) for i in range(count)):
                    label = f"{loaded.timestamps_s[at]:.2f} s"
                    pictures.append(_picture(loaded.frames[at], label))
            image = source.image(sample)
            if image is not None:
                import numpy as np

                pictures.append(_picture(np.asarray(image), "image"))
            options = "".join(f"<li>{_text(option)}</li>" for option in sample.options)
            yield (
                f"<div class=sample>{''.join(pictures)}<br><b>{_text(sample.question)}</b> "
                f"<span class=quiet>{_text(sample.source)} {_text(sample.id)}</span>"
                f'<ol type="A">{options}</ol><span class=answer>{_text(sample.answer)}</span></div>'
            )


def _picture(frame: object, label: str) -> str:
    import numpy as np

    pixels = np.asarray(frame)
    height, width = pixels.shape[:2]
    if height > THUMB_HEIGHT:
        pixels = resize(pixels, (THUMB_HEIGHT, max(1, round(width * THUMB_HEIGHT / height))))
    data = base64.b64encode(encode_image(pixels, "jpeg", 80)).decode()
    return f'<img src="data:image/jpeg;base64,{data}" title="{_text(label)}" alt="{_text(label)}">'


def _rejects(rejects: Sequence[Reject]) -> str:
    if not rejects:
        return "<p>None.</p>"
    reasons = Counter((reject.stage, reject.reason.rpartition(": ")[2][:160]) for reject in rejects)
    examples: Mapping[tuple[str, str], str] = {
        (r.stage, r.reason.rpartition(": ")[2][:160]): r.video or r.id for r in reversed(rejects)
    }
    rows = [
        (stage, reason, count, examples[stage, reason]) for (stage, reason), count in reasons.most_common(50)
    ]
    return _table(("stage", "reason", "count", "example"), rows)


def _leaks(leakage: Mapping[str, Any]) -> str:
    if not leakage["compared"]:
        return "<p>Not compared: no benchmark is named in <code>data.leakage</code>.</p>"
    compared = ", ".join(
        f"{n} ({c['videos']:,} videos, by {c['by']})" for n, c in leakage["compared"].items()
    )
    leaks = leakage["leaks"]
    if not leaks:
        return f"<p>None. Compared with {_text(compared)}.</p>"
    rows = [(k["benchmark"], k["by"], k["video"], k["benchmark_video"], k["samples"]) for k in leaks[:200]]
    heads = ("benchmark", "same", "video here", "video there", "samples")
    return f"<p>{len(leaks):,} of them; compared with {_text(compared)}.</p>{_table(heads, rows)}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cell(tag: str, value: object) -> str:
        number = isinstance(value, int) and not isinstance(value, bool)
        return (
            f"<{tag}{' class=n' if number else ''}>{value:,}</{tag}>"
            if number
            else f"<{tag}>{_text(value)}</{tag}>"
        )

    head = "".join(cell("th", name) for name in heads) if any(heads) else ""
    body = "".join(f"<tr>{''.join(cell('td', value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>" if head else f"<table>{body}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
