"""A manifest -> the data card, one HTML file: composition, lengths, samples with frames, rejects."""

from __future__ import annotations

import base64
import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from appo.config import Recipe
from appo.data.frames import FrameSource, open_frames
from appo.data.manifest import Manifest
from appo.data.schema import SPLITS, VideoSample
from appo.data.shards import encode_image
from appo.data.sources.base import Reject
from appo.data.video import VideoError, resize

SAMPLES_SHOWN, FRAMES_SHOWN, THUMB_HEIGHT = 8, 6, 84
HISTOGRAM_BINS = 20
LONG_WORD = 24  # characters; a longer one may be broken: a hash, a path

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2rem auto;padding:0 1rem;color:#1c2330}
h1{margin-bottom:0}h2{margin-top:2rem;border-bottom:1px solid #d5dae3}table{border-collapse:collapse}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right}td.long{overflow-wrap:anywhere}
tr.sum td{border-top:1px solid #d5dae3;font-weight:600}.scroll{overflow-x:auto}svg{max-width:100%;height:auto}
code{background:#f1f3f7;padding:0 .2rem;overflow-wrap:anywhere}.quiet{color:#5b6678}
.sample{margin:0 0 1.5rem;padding-bottom:1rem;border-bottom:1px solid #eceff4}.sample ol,.sample p{margin:.2rem 0}
.frames{display:flex;flex-wrap:wrap;gap:2px}.frames img{max-width:calc(33.3% - 2px);max-height:84px;height:auto}
.sample .right{font-weight:600}.sample .right::after{content:" \\2713"}
@media(max-width:600px){body{margin:1rem auto}table{font-size:.85em}td,th{padding-right:.4rem}}
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
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{title}</title>"
        f"<style>{_STYLE}</style>{''.join(sections)}</html>\n"
    )


def _composition(samples: Sequence[VideoSample]) -> str:
    splits = [split for split in SPLITS if any(sample.split == split for sample in samples)]
    table = Counter((sample.source, sample.problem_type, sample.split) for sample in samples)
    rows = []
    strata = sorted({(s, k) for s, k, _ in table})
    for (source, kind), (above, _) in zip(strata, [("", ""), *strata], strict=False):
        counts = [table[source, kind, split] for split in splits]
        rows.append(("" if source == above else source, kind, *counts, sum(counts)))
    totals = [sum(table[key] for key in table if key[2] == split) for split in splits]
    rows.append(("all", "", *totals, len(samples)))
    return _table(("source", "type of question", *splits, "total"), rows, with_sum=True)


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
        f"{''.join(bars)}<g font-size=14 fill=#1c2330><text x=0 y=138>0 s</text>"
        f'<text x=300 y=138 text-anchor="middle">{lengths[-1] / 2:.1f} s</text>'
        f'<text x=600 y=138 text-anchor="end">{lengths[-1]:.1f} s</text></g></svg>'
        f"<p class=quiet>{len(lengths):,} videos; shortest {lengths[0]:.1f} s, median {middle:.1f} s, "
        f"longest {lengths[-1]:.1f} s; the highest bar holds {tallest:,}</p>"
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
            try:
                yield _sample(sample, source)
            except VideoError as error:
                yield f"<div class=sample>{_text(error)}</div>"


def _sample(sample: VideoSample, source: FrameSource) -> str:
    """Frames, question, options with the right one marked (or the answer), where it comes from."""
    import numpy as np

    pictures, times, lines = [], [], []
    if sample.video is not None:
        loaded = source.load(sample)
        count = min(FRAMES_SHOWN, len(loaded.frames))
        for at in (round(i * (len(loaded.frames) - 1) / max(1, count - 1)) for i in range(count)):
            times.append(f"{loaded.timestamps_s[at]:.2f}")
            pictures.append(_picture(loaded.frames[at], f"{times[-1]} s"))
        lines.append(f"{count} of {len(loaded.frames)} frames, at {', '.join(times)} s")
    if (image := source.image(sample)) is not None:
        pictures.append(_picture(np.asarray(image), "image"))
        lines.append("an image")
    if sample.key_times:
        spans = ", ".join(f"{start:g} to {end:g}" for start, end in sample.key_times)
        lines.append(f"the answer shows from {spans} s")
    options = [
        f"<li{' class=right' if sample.answer == chr(ord('A') + index) else ''}>{_text(option)}</li>"
        for index, option in enumerate(sample.options)
    ]
    answer = (
        f'<ol type="A">{"".join(options)}</ol>' if options else f"<p class=right>{_text(sample.answer)}</p>"
    )
    return (
        f"<div class=sample><div class=frames>{''.join(pictures)}</div><p class=quiet>{_text('; '.join(lines))}</p>"
        f"<p><b>{_text(sample.question)}</b></p>{answer}"
        f"<p class=quiet>{_text(sample.source)}, {_text(sample.problem_type)}, {_text(sample.id)}</p></div>"
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
    stages = Counter(reject.stage for reject in rejects)
    reasons = Counter((reject.stage, _kind(reject)) for reject in rejects)
    examples = {(r.stage, _kind(r)): r.video or r.id for r in reversed(rejects)}
    rows = [(stage, kind, count, examples[stage, kind]) for (stage, kind), count in reasons.most_common(50)]
    return (
        f"<p>{_text(', '.join(f'{stage}: {count:,}' for stage, count in sorted(stages.items())))}. "
        f"Each is listed in <code>rejects.jsonl</code>.</p>"
        + _table(("stage", "reason", "count", "example"), rows)
    )


def _kind(reject: Reject) -> str:
    """The reason without what differs from one sample to the next: its path, the value, names and times."""
    head, colon, rest = reject.reason.partition(": ")
    setting = re.match(r"(\w+)=", head)
    kind = (
        f"{setting[1]}: {rest}" if setting else rest if colon and reject.stage != "record" else reject.reason
    )
    return re.sub(r"'[^']*'|\d+\.\d+", "...", kind)[:160]


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


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, with_sum: bool = False) -> str:
    """Numbers stand to the right, under a head that does too. with_sum: the last row is a sum."""

    def cell(tag: str, text: object, model: object) -> str:
        kinds = ["n"] if isinstance(model, int) else []
        kinds += ["long"] if max(map(len, str(text).split()), default=0) > LONG_WORD else []
        shown = f"{text:,}" if isinstance(text, int) else _text(text)
        return f"<{tag}{f' class={kinds[0]}' if kinds else ''}>{shown}</{tag}>"

    rows = list(rows)
    lines = ["".join(cell("td", value, value) for value in row) for row in rows]
    body = [f"<tr>{line}</tr>" for line in lines]
    if with_sum:
        body[-1] = f"<tr class=sum>{lines[-1]}</tr>"
    names = "".join(cell("th", name, value) for name, value in zip(heads, rows[0], strict=True))
    head = f"<tr>{names}</tr>" if any(heads) else ""
    return f"<div class=scroll><table>{head}{''.join(body)}</table></div>"


def _text(value: object) -> str:
    return html.escape(str(value))
