"""Numbers -> inline SVG: learning curves with seed bands, dots over seeds, stacked bars.

Drawn by hand rather than by a plotting library: the page stays small, its text stays text (searchable,
readable aloud, sharp in print), and colours come from the page's style. Colour is never the only sign: lines
differ in dash, dots in shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from appo.reports.statistics import Band, SeedSummary

# Okabe and Ito's colours, darkened until text in them keeps a contrast of 4.5 on white.
COLOURS = {
    "grpo": "#0a66a8",
    "dapo": "#a85400",
    "appo": "#00795a",
    "pa_grpo": "#9b4580",
    "warm_start": "#5b6270",
}
OTHERS = ("#6b4fa0", "#8a6d00", "#3b7d8c", "#a33b3b", "#4f6b2a")
_DASHES = {"grpo": "7 4", "dapo": "2 3", "appo": "", "pa_grpo": "9 3 2 3"}
_SHAPES = {"grpo": "square", "dapo": "triangle", "appo": "circle", "pa_grpo": "diamond"}
PHASE_COLOURS = ("#35608f", "#7fa8d0", "#c98a2b", "#e8c77a", "#2f8f74", "#9bd0bd", "#8a8f98", "#c4557a")


def colour(label: str, index: int = 0) -> str:
    algorithm, _, variant = label.partition(".")
    return OTHERS[index % len(OTHERS)] if variant else COLOURS.get(algorithm, OTHERS[index % len(OTHERS)])


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    if high - low <= 1e-9 * max(
        abs(high), abs(low)
    ):  # a curve that does not move still needs an axis around it
        low, high = low - 0.1 * (abs(low) or 1.0), high + 0.1 * (abs(high) or 1.0)
    span = high - low
    raw = span / max(1, count - 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw - 1e-12)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, last + 1)]


def number(value: float) -> str:
    return f"{value:g}"


def figure(width: int, height: int, title: str, description: str, body: str) -> str:
    """An SVG that says what it shows to those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" class="chart" style="max-width:{width}px">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{body}</svg>"
    )


def line_chart(
    bands: Mapping[str, Band], *, title: str, y_label: str, names: Mapping[str, str], percent: bool = False
) -> str:
    """Curves over steps, with the band of one deviation over seeds around each that has two or more."""
    width, height, left, right, top, bottom = 560, 300, 58, 16, 18, 44
    factor = 100.0 if percent else 1.0
    lows, highs = [], []
    for curve in bands.values():
        spread = [0.0 if math.isnan(s) else s for s in curve.std]
        lows += [factor * (m - s) for m, s in zip(curve.mean, spread, strict=True)]
        highs += [factor * (m + s) for m, s in zip(curve.mean, spread, strict=True)]
    y_ticks = ticks(min(lows), max(highs))
    x_ticks = ticks(0, max(float(curve.steps[-1]) for curve in bands.values()), 6)
    x_ticks = [tick for tick in x_ticks if tick == int(tick)]  # there is no half step
    x = Scale(x_ticks[0], x_ticks[-1], left, width - right)
    y = Scale(y_ticks[0], y_ticks[-1], height - bottom, top)
    body = _axes(x, y, x_ticks, y_ticks, "step", y_label, width, height, bottom)
    # The solid line of the last one is drawn first: where curves are equal, the broken ones on it stay visible.
    for index, (label, curve) in reversed(list(enumerate(bands.items()))):
        shade = colour(label, index)
        if curve.n > 1:
            known = [i for i, s in enumerate(curve.std) if not math.isnan(s)]
            upper = [
                f"{x(curve.steps[i]):.1f},{y(factor * (curve.mean[i] + curve.std[i])):.1f}" for i in known
            ]
            lower = [
                f"{x(curve.steps[i]):.1f},{y(factor * (curve.mean[i] - curve.std[i])):.1f}" for i in known
            ]
            body += f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{shade}" fill-opacity="0.15"/>'
        points = " ".join(
            f"{x(s):.1f},{y(factor * m):.1f}" for s, m in zip(curve.steps, curve.mean, strict=True)
        )
        dash = _DASHES.get(label.partition(".")[0], "")
        body += (
            f'<polyline points="{points}" fill="none" stroke="{shade}" stroke-width="2" '
            f'stroke-linejoin="round" stroke-dasharray="{dash}"/>'
        )
    said = "; ".join(
        f"{names[label]} from {number(round(factor * float(c.mean[0]), 3))} to "
        f"{number(round(factor * float(c.mean[-1]), 3))} over {int(c.steps[-1])} steps"
        for label, c in bands.items()
    )
    return legend(bands, names) + figure(width, height, title, f"{title}. {said}.", body)


def legend(labels: Sequence[str] | Mapping[str, object], names: Mapping[str, str]) -> str:
    """Names with a sample of their line."""
    parts = []
    for index, label in enumerate(labels):
        dash = _DASHES.get(label.partition(".")[0], "")
        parts.append(
            f'<span><svg viewBox="0 0 30 10" width="30" height="10" aria-hidden="true"><line x1="1" '
            f'y1="5" x2="29" '
            f'y2="5" stroke="{colour(label, index)}" stroke-width="2.5" stroke-dasharray="{dash}"/></svg>'
            f"{escape(names[label])}</span>"
        )
    return f'<p class="legend">{"".join(parts)}</p>'


def _axes(
    x: Scale,
    y: Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    width: int,
    height: int,
    bottom: int,
) -> str:
    base = height - bottom
    parts = []
    for value in y_ticks:
        at = y(value)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 7}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value in x_ticks:
        at = x(value)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{base + 17}" text-anchor="middle">{number(value)}</text>'
        )
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{base}" y2="{base}"/>')
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    turn = (y.start + y.end) / 2
    parts.append(
        f'<text class="label" transform="translate(13 {turn:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def dot_plot(
    values: Mapping[str, Sequence[float]],
    summaries: Mapping[str, SeedSummary],
    *,
    title: str,
    x_label: str,
    names: Mapping[str, str],
    reference: float | None = None,
    reference_name: str = "",
    percent: bool = True,
) -> str:
    """One row a method: a mark for each seed, a bar for mean and deviation, a line where everybody
    started.
    """
    row, left, right, top = 46, 92, 26, 30
    width, height = 560, top + row * len(values) + 46
    factor = 100.0 if percent else 1.0
    everything = [factor * v for seeds in values.values() for v in seeds]
    everything += [] if reference is None else [factor * reference]
    for summary in summaries.values():
        everything += [factor * (summary.mean + sign * (summary.std or 0.0)) for sign in (-1, 1)]
    low, high = min(everything), max(everything)
    # Without a least width a difference of nothing would fill the picture.
    pad = max(0.08 * (high - low), 2.0 if percent else 0.05 * abs(high))
    x_ticks = ticks(max(0.0, low - pad), min(100.0, high + pad) if percent else high + pad, 6)
    x = Scale(x_ticks[0], x_ticks[-1], left, width - right)
    base = height - 46
    parts = [f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>']
    for value in x_ticks:
        parts.append(
            f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top - 6}" y2="{base}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{base + 17}" '
            f'text-anchor="middle">{number(value)}</text>'
        )
    if reference is not None:
        at = x(factor * reference)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 8}" y2="{base}" stroke="{COLOURS["warm_start"]}" '
            f'stroke-width="1.5" stroke-dasharray="4 3"/><text class="tick" x="{at:.1f}" y="{top - 13}" '
            f'text-anchor="middle">{escape(reference_name)} {factor * reference:.1f}</text>'
        )
    said = []
    for index, (label, seeds) in enumerate(values.items()):
        shade, middle = colour(label, index), top + row * index + row / 2
        parts.append(
            f'<text class="name" x="{left - 12}" y="{middle + 4:.1f}" text-anchor="end" fill="{shade}">'
            f"{escape(names[label])}</text>"
        )
        summary = summaries[label]
        spread = summary.std or 0.0
        a, b = x(factor * (summary.mean - spread)), x(factor * (summary.mean + spread))
        parts.append(
            f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{middle}" y2="{middle}" stroke="{shade}" stroke-width="9" '
            f'stroke-opacity="0.22" stroke-linecap="round"/>'
            f'<line x1="{x(factor * summary.mean):.1f}" x2="{x(factor * summary.mean):.1f}" '
            f'y1="{middle - 11}" '
            f'y2="{middle + 11}" stroke="{shade}" stroke-width="2.5"/>'
        )
        for value in seeds:
            parts.append(
                _mark(_SHAPES.get(label.partition(".")[0], "circle"), x(factor * value), middle, shade)
            )
        said.append(f"{names[label]} mean {factor * summary.mean:.1f} over {summary.n} seeds")
    parts.append(
        f'<text class="label" x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return figure(width, height, title, f"{title}. {'; '.join(said)}.", "".join(parts))


def _mark(shape: str, x: float, y: float, shade: str) -> str:
    style = f'fill="#fff" stroke="{shade}" stroke-width="1.8"'
    if shape == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}/>'
    if shape == "triangle":
        return (
            f'<polygon points="{x:.1f},{y - 5:.1f} {x + 5:.1f},{y + 4:.1f} {x - 5:.1f},{y + 4:.1f}" {style}/>'
        )
    if shape == "diamond":
        return (
            f'<polygon points="{x:.1f},{y - 5.5:.1f} {x + 5.5:.1f},{y:.1f} {x:.1f},{y + 5.5:.1f} '
            f'{x - 5.5:.1f},{y:.1f}" {style}/>'
        )
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {style}/>'


def stacked_bars(
    rows: Mapping[str, Mapping[str, float]], *, title: str, x_label: str, names: Mapping[str, str]
) -> str:
    """One bar a method, cut into named parts in the order of the first row."""
    row, left, right, top = 44, 92, 60, 8
    width, height = 560, top + row * len(rows) + 46
    parts_named = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    longest = max(sum(parts.values()) for parts in rows.values())
    x_ticks = ticks(0.0, longest, 6)
    x = Scale(0.0, x_ticks[-1], left, width - right)
    base = height - 46
    body = [f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>']
    for value in x_ticks:
        body.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top}" y2="{base}"/>')
        body.append(
            f'<text class="tick" x="{x(value):.1f}" y="{base + 17}" '
            f'text-anchor="middle">{number(value)}</text>'
        )
    said = []
    for index, (label, parts) in enumerate(rows.items()):
        y, at = top + row * index + 9, 0.0
        body.append(
            f'<text class="name" x="{left - 12}" y="{y + 17}" text-anchor="end" '
            f'fill="{colour(label, index)}">'
            f"{escape(names[label])}</text>"
        )
        for part, value in parts.items():
            shade = PHASE_COLOURS[parts_named.index(part) % len(PHASE_COLOURS)]
            body.append(
                f'<rect x="{x(at):.1f}" y="{y}" width="{max(0.0, x(at + value) - x(at)):.1f}" height="26" '
                f'fill="{shade}" stroke="#fff"><title>{escape(part)}: {value:.3g}</title></rect>'
            )
            at += value
        body.append(f'<text class="tick" x="{x(at) + 6:.1f}" y="{y + 17}">{at:.3g}</text>')
        said.append(f"{names[label]}: " + ", ".join(f"{part} {value:.3g}" for part, value in parts.items()))
    body.append(
        f'<text class="label" x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    keys = "".join(
        f'<span><i style="background:{PHASE_COLOURS[i % len(PHASE_COLOURS)]}"></i>{escape(part)}</span>'
        for i, part in enumerate(parts_named)
    )
    drawn = figure(width, height, title, f"{title}. {'; '.join(said)}.", "".join(body))
    return f'<p class="legend">{keys}</p>{drawn}'
