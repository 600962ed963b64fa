"""Decoding against a second decoder (PyAV), and against files that are not what they say."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from appo.config import Video
from appo.data.mp4 import frame_size
from appo.data.sampling import choose_frames, fit_size, sampled_fps
from appo.data.video import VideoError, decode_bytes, decode_video, resize
from tests.data_room.clips import read_back, rotate, write_clip, write_nothing, write_sound

SAME_SIZE = {"max_pixels": 56 * 84, "min_pixels": 784}


def test_frames_equal_those_of_another_decoder(tmp_path: Path) -> None:
    """A size that needs no scaling: both decoders are FFmpeg's, so every pixel is the same."""
    clip = write_clip(tmp_path / "a.mp4", size=(56, 84), num_frames=20)
    video = decode_video(clip, Video(num_frames=8, **SAME_SIZE))
    assert video.frames.shape == (8, 56, 84, 3)
    assert video.frames.dtype == np.uint8
    np.testing.assert_array_equal(video.frames, read_back(clip)[list(video.frame_indices)])
    assert video.total_frames == 20
    np.testing.assert_allclose(video.timestamps_s, np.array(video.frame_indices) * 0.04, atol=1e-6)
    assert video.duration_s == pytest.approx(0.8, abs=1e-6)


def test_bytes_decode_as_files_do(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    one, two = decode_video(clip, Video()), decode_bytes(clip.read_bytes(), Video(), name="a")
    np.testing.assert_array_equal(one.frames, two.frames)
    assert one.frame_indices == two.frame_indices


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (30, 46)])  # 48 wide: decord pads such rows
def test_rotation_metadata_and_narrow_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, degrees: int, size: tuple[int, int]
) -> None:
    """Without scaling, so that every pixel can be compared with the other decoder's, turned by numpy."""
    monkeypatch.setattr("appo.data.video.fit_size", lambda height, width, **_: (height, width))
    clip = write_clip(tmp_path / "a.mp4", size=size)
    upright = read_back(clip)
    np.testing.assert_array_equal(decode_video(clip, Video(num_frames=16)).frames, upright)
    turned = decode_video(rotate(clip, degrees), Video(num_frames=16)).frames
    np.testing.assert_array_equal(turned, np.rot90(upright, -degrees // 90, axes=(1, 2)))


def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path) -> None:
    times = [0, 40, 80, 120, 160, 1000, 2000, 3000, 3040, 3080, 3120, 5000, 5040, 5080, 5120, 9000]
    video = decode_video(write_clip(tmp_path / "v.mp4", times_ms=times), Video(num_frames=4))
    # Evenly in time (0, 3, 6, 9 s), not evenly in number (0, 5, 10, 15): the nearest frame to 6 s is at 5.12
    # s.
    np.testing.assert_allclose(video.timestamps_s, [0.0, 3.0, 5.12, 9.0], atol=1e-3)
    assert video.fps == pytest.approx(3 / 9)
    assert video.second_per_grid == pytest.approx(6.0)


def test_times_start_at_the_first_frame(tmp_path: Path) -> None:
    late = write_clip(tmp_path / "l.mkv", times_ms=[2000 + 40 * i for i in range(16)])
    assert decode_video(late, Video(num_frames=4)).timestamps_s[0] == 0


def test_one_frame_is_shown_twice(tmp_path: Path) -> None:
    video = decode_video(write_clip(tmp_path / "one.mp4", num_frames=1), Video(num_frames=8))
    assert video.frame_indices == (0, 0)
    np.testing.assert_array_equal(video.frames[0], video.frames[1])
    assert math.isfinite(video.second_per_grid)


def test_short_video_gives_what_it_has_and_an_even_number(tmp_path: Path) -> None:
    video = decode_video(write_clip(tmp_path / "s.mp4", num_frames=7), Video(num_frames=16))
    assert len(video.frames) == 6
    assert video.frame_indices[0] == 0
    assert video.frame_indices[-1] == 6


def test_fps_sampling_and_its_cap(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", num_frames=100)  # 4 s
    two_a_second = decode_video(clip, Video(num_frames=None, fps=2))
    np.testing.assert_allclose(two_a_second.timestamps_s, np.arange(8) / 2, atol=0.021)
    assert two_a_second.second_per_grid == pytest.approx(1.0, abs=0.03)
    capped = decode_video(clip, Video(num_frames=None, fps=2, max_frames=4))
    assert len(capped.frames) == 4
    assert capped.timestamps_s[-1] == pytest.approx(3.96)
    # The rate that the model is told is that of the frames it gets, not the one that was asked for.
    assert capped.fps == pytest.approx(3 / 3.96)


def test_4k_clip_fits_the_budget(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "4k.mp4", num_frames=3, size=(2160, 3840))
    video = decode_video(clip, Video(num_frames=2, max_pixels=224 * 224))
    assert video.frames.shape[1:3] == fit_size(2160, 3840, max_pixels=224 * 224) == (168, 280)


def test_odd_names(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "ein Über-Clip (1) 動画.mp4")
    assert len(decode_video(clip, Video(num_frames=4)).frames) == 4


def test_content_counts_not_the_extension(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4").rename(tmp_path / "a.jpg")
    assert len(decode_video(clip, Video(num_frames=4)).frames) == 4


def picture(path: Path, kind: str) -> Path:
    Image.new("RGB", (64, 48)).save(path, kind)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f: f / "missing.mp4", "no such file"),
        (lambda f: f, "not a regular file"),
        (lambda f: ((f / "empty.mp4").write_bytes(b"") and None) or f / "empty.mp4", "empty"),
        (
            lambda f: (f / "text.mp4").write_text("no video" * 99) and f / "text.mp4",
            "cannot be opened as video",
        ),
        (lambda f: write_sound(f / "sound.mp4"), "cannot be opened as video"),
        (lambda f: write_nothing(f / "zero.mp4"), "cannot be opened as video"),
        (lambda f: write_nothing(f / "zero.mkv"), "cannot be opened as video"),
        (lambda f: picture(f / "png.mp4", "PNG"), "cannot be opened as video"),
        (lambda f: picture(f / "jpeg.mp4", "JPEG"), "cannot be opened as video"),
        (lambda f: cut(write_clip(f / "cut.mp4", num_frames=100)), "cannot be opened as video"),
        (lambda f: cut(write_clip(f / "cut.mkv", num_frames=300)), "is truncated: declares 12.0 s"),
    ],
    ids=[
        "missing",
        "folder",
        "empty",
        "text",
        "audio only",
        "no frames in mp4",
        "no frames in mkv",
        "a PNG",
        "a JPEG",
        "truncated mp4",
        "truncated mkv",
    ],
)
def test_broken_files_are_named_with_the_reason(tmp_path: Path, make, reason: str) -> None:
    path = make(tmp_path)
    with pytest.raises(VideoError, match=reason) as caught:
        decode_video(path, Video())
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n\0\1",
        "ffconcat version 1.0\nfile {other}\n",
        "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
    ids=["playlist", "playlist with bytes behind it", "concat", "network address"],
)
def test_a_list_of_other_files_is_no_video(tmp_path: Path, text: str) -> None:
    """FFmpeg would follow it, out of the data root, whatever the file is called."""
    write_clip(tmp_path / "elsewhere" / "other.mp4")
    (tmp_path / "v.mp4").write_text(text.format(other="elsewhere/other.mp4"))
    for decode in (
        lambda: decode_video(tmp_path / "v.mp4", Video()),
        lambda: decode_bytes((tmp_path / "v.mp4").read_bytes(), Video(), name="v.mp4"),
    ):
        with pytest.raises(VideoError, match="it is text"):
            decode()


def test_damaged_middle_is_refused_not_filled_in(tmp_path: Path) -> None:
    """decord's default hands out the last good frame again in place of each broken one."""
    clip = write_clip(tmp_path / "d.mp4", num_frames=120, size=(240, 320), preset="medium")
    data = bytearray(clip.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 4] = bytes(len(data) // 4)
    clip.write_bytes(data)
    with pytest.raises(VideoError, match="cannot be decoded"):
        decode_video(clip, Video(num_frames=16))


def test_transport_stream_with_unreachable_frames_is_refused(tmp_path: Path) -> None:
    """B-frames in a transport stream: decord loses most frames when it seeks, and would repeat one."""
    with pytest.raises(VideoError, match="corrupted and recovered"):
        decode_video(write_clip(tmp_path / "a.ts", preset="medium", gop=12), Video(num_frames=16))


def test_extreme_aspect_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        fit_size(2, 1000, max_pixels=784)


@given(height=st.integers(16, 2200), width=st.integers(16, 4000), budget=st.integers(784, 10**6))
def test_size_laws(height: int, width: int, budget: int) -> None:
    """Multiples of 28; within the budget unless a side is at its least; ratio kept within rounding."""
    if max(height, width) > 200 * min(height, width):
        return
    new_height, new_width = fit_size(height, width, max_pixels=budget)
    assert new_height % 28 == new_width % 28 == 0
    assert min(new_height, new_width) >= 28
    if min(new_height, new_width) > 28:
        assert new_height * new_width <= max(budget, 784)
        # Each side is rounded by less than 28 pixels.
        scale_height, scale_width = new_height / height, new_width / width
        assert scale_height - scale_width <= 28 / height + 28 / width
        assert scale_width - scale_height <= 28 / height + 28 / width


@given(
    gaps=st.lists(st.floats(0.001, 2.0), min_size=0, max_size=60),
    count=st.integers(1, 40),
)
def test_choice_laws(gaps: list[float], count: int) -> None:
    """Even number, ascending, no repeats from two frames on, first and last frame taken, nearest to even
    times.
    """
    starts = np.concatenate([[0.0], np.cumsum(gaps)])
    chosen = choose_frames(starts, float(starts[-1]) + 0.04, Video(num_frames=count))
    assert len(chosen) % 2 == 0
    if len(starts) == 1:
        assert chosen == (0, 0)
        return
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == max(2, min(count, len(starts)) // 2 * 2)
    assert chosen[0] == 0
    assert chosen[-1] == len(starts) - 1


def test_even_spacing_matches_the_usual_formula() -> None:
    """At a constant rate this is `linspace(0, total - 1, n)`, rounded, as qwen-vl-utils samples."""
    for total in (16, 31, 100, 257):
        chosen = choose_frames(np.arange(total) / 25, total / 25, Video(num_frames=16))
        exact = np.linspace(0, total - 1, 16)
        assert np.abs(np.array(chosen) - exact).max() <= 0.5 + 1e-6


def test_rate_of_one_moment() -> None:
    assert sampled_fps(np.zeros(2), 0.5) == 4.0
    assert sampled_fps(np.zeros(2), 0.0) == 2.0


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_size_is_known_from_the_header_or_the_first_frame(tmp_path: Path, suffix: str) -> None:
    """Containers with a header that is read (MP4, MOV) and without give the same frames."""
    clip = write_clip(tmp_path / f"a.{suffix}", size=(120, 200))
    with clip.open("rb") as stream:
        assert frame_size(stream) == ((120, 200) if suffix in ("mp4", "mov") else None)
    reference = decode_video(write_clip(tmp_path / "reference.mp4", size=(120, 200)), Video(num_frames=4))
    np.testing.assert_array_equal(decode_video(clip, Video(num_frames=4)).frames, reference.frames)


def test_rotated_size_from_the_header(tmp_path: Path) -> None:
    for degrees, size in ((90, (200, 120)), (180, (120, 200))):
        with rotate(write_clip(tmp_path / "a.mp4", size=(120, 200)), degrees).open("rb") as stream:
            assert frame_size(stream) == size


def test_a_header_that_lies_about_the_size(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", size=(56, 84))
    data = bytearray(clip.read_bytes())
    at = data.index(b"stsd") + 4 + 8 + 8 + 24
    data[at : at + 4] = (28).to_bytes(2, "big") * 2
    clip.write_bytes(data)
    frames = decode_video(clip, Video(num_frames=4)).frames
    assert (frames.shape[1] % 28, frames.shape[2] % 28) == (0, 0)


@given(data=st.binary(max_size=200))
def test_header_of_anything(data: bytes) -> None:
    for start in (b"", b"\x00\x00\x00\x08ftyp", b"\x00\x00\x00\x08ftyp\x00\x00\x00\xc8moov"):
        frame_size(io.BytesIO(start + data))


def test_scaling_is_that_of_a_reference(tmp_path: Path) -> None:
    """decord's scaler against Pillow's bicubic on PyAV's frames: other filters' tails, the same picture."""
    clip = write_clip(tmp_path / "a.mp4", size=(180, 320))
    video = decode_video(clip, Video(num_frames=4, max_pixels=112 * 196))
    for frame, original in zip(video.frames, read_back(clip)[list(video.frame_indices)], strict=True):
        reference = resize(original, frame.shape[:2])
        assert np.abs(frame[:80].astype(int) - reference[:80].astype(int)).mean() < 2.0  # below it lies noise
