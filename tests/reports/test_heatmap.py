"""Heat maps: colours in order, marks where they belong, long completions small, pictures as they are."""

from __future__ import annotations

import base64
import io
import re
from itertools import pairwise

import numpy as np
import pytest

from appo.reports.heatmap import HeatMap, draw, shade, thumbnails, visible


def lightness(colour: str) -> float:
    return float(np.dot([int(colour[i : i + 2], 16) for i in (1, 3, 5)], [0.2126, 0.7152, 0.0722]))


def test_more_attention_is_always_darker() -> None:
    shades = [lightness(shade(share)) for share in np.linspace(0, 1, 101)]
    assert all(a > b for a, b in pairwise(shades))
    assert shade(-1) == shade(0)
    assert shade(2) == shade(1)


def made(num_tokens: int, frames: int = 4, **more: object) -> str:
    attention = np.arange(num_tokens * frames, dtype=float).reshape(num_tokens, frames)
    tokens = [f"t{i}" for i in range(num_tokens)]
    return draw(HeatMap("A map", tokens, attention.tolist(), [2.0 * t for t in range(frames)], **more))  # type: ignore[arg-type]


def test_every_cell_is_drawn_with_its_value() -> None:
    page = made(3)
    assert len(re.findall("<title>t", page)) == 12
    fills = re.findall(r'fill="(#[0-9a-f]{6})"><title>', page)
    assert fills[0] == shade(0)
    assert fills[-1] == shade(1)
    assert [lightness(f) for f in fills] == sorted((lightness(f) for f in fills), reverse=True)


def test_crucial_and_key_frames_are_marked_and_described() -> None:
    page = made(3, crucial=[1, 3], key=[2], weights=[1.0, 1.7, 1.0])
    assert page.count('fill="none" stroke="#c2410c"') == 2
    assert page.count("★") == 1
    assert "Crucial frames: 1, 3. True key frames: 2." in page
    assert "weight W" in page
    assert "1.70" in page
    assert "weight W" not in made(3, weights=[1.0, 1.0, 1.0])  # nothing was weighted


def test_a_long_completion_is_one_picture_with_a_pixel_a_cell() -> None:
    from PIL import Image

    page = made(512, frames=15)
    assert len(page) < 150_000
    (data,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (15, 512)
    assert "#" + bytes(image.getpixel((14, 511))).hex() == shade(1)  # type: ignore[arg-type]
    assert page.count('class="token"') == 512


def test_small_frames_stay_exact_and_large_ones_become_small() -> None:
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 255, (8, 28, 28, 3), dtype=np.uint8)
    pictures = thumbnails(frames, num_patches=4)
    assert sorted(pictures) == [0, 1, 2, 3]
    first = Image.open(io.BytesIO(base64.b64decode(pictures[1].partition(",")[2])))
    assert np.array_equal(np.asarray(first), frames[2])  # the first of the two frames of a patch
    large = thumbnails(np.zeros((2, 360, 640, 3), dtype=np.uint8), num_patches=1)[0]
    assert large.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))).size == (128, 72)


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" red", "·red"), ("\n", "⏎"), ("  ", "··"), ("</answer>", "</answer>"), ("Ġthe", "·the")],
)
def test_tokens_show_their_blanks(token: str, shown: str) -> None:
    assert visible(token) == shown
