"""One completion's frame attention -> a heat map, tokens by frames, with the frames' pictures along the axis.

As in the paper's Figures A, C and F: x are temporal patches, y are response tokens, darker is more
attention. The crucial frames psi' are framed, a true key frame is marked, and each token carries its weight
W as a bar.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

# From paper white to a deep blue-green; lightness falls evenly, so that it also prints in grey.
_STOPS = ((250, 251, 249), (214, 236, 226), (142, 204, 187), (64, 152, 150), (24, 96, 116), (14, 47, 76))
_SCALE_W = 172  # the legend under a map
_LONG = 60  # completions above so many tokens are drawn with lower rows


@dataclass(frozen=True, slots=True)
class HeatMap:
    """What one drawing needs. attention: (N, T) of the valid tokens; weights: (N,) or empty.

    crucial, key: indices of temporal patches. times_s: (T,). thumbnails: patch index -> data URI, may be
    empty. scale: the attention drawn lightest and darkest; None takes this map's own, a common one makes maps
    comparable. widest_cell: pixels of a column at most.
    """

    title: str
    tokens: Sequence[str]
    attention: Sequence[Sequence[float]]
    times_s: Sequence[float]
    crucial: Sequence[int] = ()
    key: Sequence[int] = ()
    weights: Sequence[float] = ()
    thumbnails: Mapping[int, str] | None = None
    scale: tuple[float, float] | None = None
    widest_cell: int = 64
    max_weight: float = 1.7


def shade(share: float) -> str:
    """A colour for a share in [0, 1]."""
    at = min(1.0, max(0.0, share)) * (len(_STOPS) - 1)
    index = min(int(at), len(_STOPS) - 2)
    mix = at - index
    low, high = _STOPS[index], _STOPS[index + 1]
    return "#" + "".join(f"{round(a + (b - a) * mix):02x}" for a, b in zip(low, high, strict=True))


def visible(token: str) -> str:
    """A token as one can read it: blanks and line ends shown, special tokens kept."""
    text = token.replace("Ġ", " ").replace("Ċ", "\n").replace("\n", "⏎").replace("\t", "⇥")
    return (
        text.replace(" ", "·")
        if text.strip() == ""
        else text.replace(" ", "·", 1)
        if text[0] == " "
        else text
    )


def draw(figure: HeatMap) -> str:
    """The SVG of one heat map, with a legend of its scale."""
    values = np.asarray(figure.attention, dtype=float)
    num_tokens, num_frames = values.shape
    low, high = figure.scale or (float(values.min()), float(values.max()))
    span = (high - low) or 1.0
    long = num_tokens > _LONG
    cell_h = 9 if long else 22
    cell_w = max(26, min(figure.widest_cell, 640 // num_frames))
    label_w = 40 + 7.2 * min(16, max(len(visible(t)) for t in figure.tokens))
    thumb_h = cell_w if figure.thumbnails else 0
    has_weights = bool(len(figure.weights)) and max(figure.weights) > 1.0
    top = 24 + thumb_h + 22
    width = int(max(label_w + cell_w * num_frames + (88 if has_weights else 12), label_w + _SCALE_W))
    height = int(top + cell_h * num_tokens + 64)
    parts: list[str] = []
    crucial, keys = set(figure.crucial), set(figure.key)
    for frame in range(num_frames):
        x = label_w + cell_w * frame
        parts.append(_frame_head(figure, frame, x, cell_w, thumb_h, frame in crucial, frame in keys))
    for row in range(num_tokens):
        y = top + cell_h * row
        size = 7.5 if long else 12.5
        text = visible(figure.tokens[row])
        text = text if len(text) <= 16 else text[:15] + "…"
        parts.append(
            f'<text class="token" x="{label_w - 8:.1f}" y="{y + cell_h / 2 + size / 3:.1f}" '
            f'text-anchor="end" '
            f'style="font-size:{size}px">{escape(text)}</text>'
        )
        for frame in () if long else range(num_frames):
            value = float(values[row, frame])
            parts.append(
                f'<rect x="{label_w + cell_w * frame:.1f}" y="{y}" width="{cell_w - 1}" height="{cell_h - 1}" '
                f'fill="{shade((value - low) / span)}"><title>{escape(text)} → frame {frame}: '
                f"{value:.4f}</title></rect>"
            )
        if has_weights:
            parts.append(_weight(figure, row, label_w + cell_w * num_frames + 8, y, cell_h))
    bottom = top + cell_h * num_tokens
    if long:
        extent = f'width="{cell_w * num_frames}" height="{cell_h * num_tokens}"'
        parts.append(
            f'<image href="{_raster((values - low) / span)}" x="{label_w:.1f}" y="{top}" {extent} '
            f'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
        )
    for frame in sorted(crucial):
        x = label_w + cell_w * frame - 1
        parts.append(
            f'<rect x="{x:.1f}" y="{24 if thumb_h else top - 2}" width="{cell_w + 1}" '
            f'height="{bottom - (24 if thumb_h else top - 2) + 1}" fill="none" stroke="#c2410c" '
            f'stroke-width="2"/>'
        )
    if has_weights:
        parts.append(
            f'<text class="tick" x="{label_w + cell_w * num_frames + 8:.1f}" y="{top - 7}">weight W</text>'
        )
    parts.append(_scale(label_w, bottom + 14, low, high))
    drawn = "".join(parts)
    said = _describe(figure, values)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(figure.title, quote=True)}">'
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" class="heat">'
        f"<title>{escape(figure.title)}</title><desc>{escape(said)}</desc>{drawn}</svg></div>"
    )


def _raster(shares: np.ndarray) -> str:
    """The cells as one small picture, a pixel each: hundreds of tokens would be tens of thousands of shapes."""
    from PIL import Image

    rows = [[tuple(bytes.fromhex(shade(float(v))[1:])) for v in row] for row in shares]
    buffer = io.BytesIO()
    Image.fromarray(np.array(rows, dtype=np.uint8)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _frame_head(
    figure: HeatMap, frame: int, x: float, cell_w: int, thumb_h: int, crucial: bool, key: bool
) -> str:
    """Picture, time and marks above a column."""
    parts = []
    if figure.thumbnails and frame in figure.thumbnails:
        parts.append(
            f'<image href="{figure.thumbnails[frame]}" x="{x:.1f}" y="24" width="{cell_w - 1}" '
            f'height="{thumb_h}" '
            f'preserveAspectRatio="xMidYMid slice" style="image-rendering:pixelated"/>'
        )
    if key:
        middle = x + cell_w / 2
        parts.append(
            f'<text class="keymark" x="{middle:.1f}" y="17" text-anchor="middle">★ key</text>'
            if cell_w >= 40
            else f'<text class="keymark" x="{middle:.1f}" y="17" text-anchor="middle">★</text>'
        )
    time = figure.times_s[frame] if frame < len(figure.times_s) else float(frame)
    style = ' style="font-weight:700;fill:#9a3412"' if crucial else ""
    if cell_w < 34 and frame % 2 and not crucial:  # times would run into one another
        return "".join(parts)
    parts.append(
        f'<text class="tick" x="{x + cell_w / 2:.1f}" y="{24 + thumb_h + 15}" text-anchor="middle"{style}>'
        f"{time:.1f}{'' if cell_w < 34 else 's'}</text>"
    )
    return "".join(parts)


def _weight(figure: HeatMap, row: int, x: float, y: float, cell_h: int) -> str:
    weight = float(figure.weights[row])
    length = 44 * (weight - 1) / max(1e-9, figure.max_weight - 1)
    text = f'<text class="tick" x="{x + length + 4:.1f}" y="{y + cell_h / 2 + 4:.1f}">{weight:.2f}</text>'
    return (
        f'<rect x="{x:.1f}" y="{y + 2}" width="{max(1.0, length):.1f}" height="{cell_h - 5}" fill="#c2410c" '
        f'fill-opacity="0.75"/>' + (text if cell_h > 12 and weight > 1 else "")
    )


def _scale(x: float, y: float, low: float, high: float) -> str:
    steps = 40
    cells = "".join(
        f'<rect x="{x + 4 * i:.1f}" y="{y}" width="4.3" height="9" fill="{shade(i / (steps - 1))}"/>'
        for i in range(steps)
    )
    return (
        f'{cells}<text class="tick" x="{x:.1f}" y="{y + 23}">{low:.3g}</text>'
        f'<text class="tick" x="{x + 4 * steps:.1f}" y="{y + 23}" text-anchor="end">{high:.3g}</text>'
        f'<text class="tick" x="{x + 2 * steps:.1f}" y="{y + 37}" text-anchor="middle">attention to a frame</text>'
    )


def _describe(figure: HeatMap, values: np.ndarray) -> str:
    mean = values.mean(axis=0)
    most = int(mean.argmax())
    crucial = ", ".join(str(f) for f in sorted(figure.crucial)) or "none"
    keys = ", ".join(str(f) for f in sorted(figure.key)) or "not known"
    return (
        f"{figure.title}. {values.shape[0]} tokens by {values.shape[1]} frames. Most attention on "
        f"average: frame {most} "
        f"({mean[most]:.3g}; mean of all {mean.mean():.3g}). Crucial frames: {crucial}. True key "
        f"frames: {keys}."
    )


def thumbnails(frames: np.ndarray, *, num_patches: int, side: int = 128) -> dict[int, str]:
    """Pictures of temporal patches as data URIs: the first of the raw frames that a patch merges.

    frames: (F, H, W, 3) uint8, F a multiple of num_patches. Small frames stay as they are, as PNG; larger
    ones are scaled to `side` pixels and become JPEG.
    """
    from PIL import Image

    per_patch = max(1, len(frames) // num_patches)
    pictures: dict[int, str] = {}
    for patch in range(min(num_patches, len(frames) // per_patch)):
        image = Image.fromarray(frames[patch * per_patch])
        small = max(image.size) <= side
        if not small:
            image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG" if small else "JPEG", **({} if small else {"quality": 82}))
        kind = "png" if small else "jpeg"
        pictures[patch] = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return pictures
