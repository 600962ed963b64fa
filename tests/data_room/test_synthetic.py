"""The key-moment set: what its records say can be measured in its files, by means other than those that drew them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from appo.config import KeyMoment, Video
from appo.data.schema import VideoSample
from appo.data.synthetic import COLOURS, make_key_moment
from appo.data.video import decode_video

# Of the 28 pixels, those beside the arms of the cross and still on the disc.
CORNERS = (slice(6, 9), slice(19, 22))
SMALL = KeyMoment(train=24, validation=4, test=8, easy_train=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[VideoSample]]:
    folder = tmp_path_factory.mktemp("key_moment")
    return folder, make_key_moment(SMALL, seed=3, folder=folder)


def frames_of(folder: Path, sample: VideoSample) -> np.ndarray:
    assert sample.video is not None
    return decode_video(folder / sample.video, Video(num_frames=16, max_pixels=784)).frames


def whiteness(frames: np.ndarray) -> np.ndarray:
    """(patches,) mean of the darkest channel at the centre: high where it is white, low on any of the colours."""
    patches = frames.reshape(-1, 2, *frames.shape[1:]).astype(float)
    return patches[:, :, 12:16, 12:16].min(-1).mean((1, 2, 3))


def test_files_repeat_and_splits_do_not_depend_on_one_another(made, tmp_path: Path) -> None:
    folder, samples = made
    more = SMALL.model_copy(update={"easy_train": 2, "train": 30})
    again = {s.id: s for s in make_key_moment(more, seed=3, folder=tmp_path)}
    shared = [s for s in samples if s.id in again]
    assert len(shared) == 24 + 4 + 8 + 2
    for sample in shared:
        assert again[sample.id] == sample
        assert (tmp_path / sample.video).read_bytes() == (folder / sample.video).read_bytes()
    other = make_key_moment(SMALL, seed=4, folder=tmp_path / "other")
    assert {s.video_sha256 for s in other}.isdisjoint(s.video_sha256 for s in samples)


def test_splits_have_the_asked_sizes_and_strengths(made) -> None:
    _, samples = made
    assert Counter(s.split for s in samples) == {"train": 24, "validation": 4, "test": 8, "warm_start": 8}
    for sample in samples:
        expected = SMALL.easy_faint if sample.split == "warm_start" else SMALL.faint
        assert sample.extra["faint"] == expected
        assert len(sample.extra["distractors"]) == SMALL.distractors
        assert sample.extra["key_patch"] not in sample.extra["distractors"]


def test_colours_are_balanced_and_answers_spread(made) -> None:
    _, samples = made
    for sample in samples:
        assert Counter(sample.extra["colours"]) == dict.fromkeys(COLOURS, 2)
    assert {s.answer for s in samples} == set("ABCD")
    assert len({s.extra["key_patch"] for s in samples}) == 8


def test_key_times_hold_exactly_the_frames_of_the_key_patch(made) -> None:
    folder, samples = made
    sample = samples[0]
    decoded = decode_video(folder / sample.video, Video(num_frames=16, max_pixels=784))
    ((start, end),) = sample.key_times
    inside = np.flatnonzero((decoded.timestamps_s >= start) & (decoded.timestamps_s < end))
    key = sample.extra["key_patch"]
    assert inside.tolist() == [2 * key, 2 * key + 1]
    assert decoded.duration_s == pytest.approx(sample.duration_s, abs=1e-6)
    # Whole seconds a temporal patch: transformers truncates them when it makes positions.
    assert decoded.second_per_grid == pytest.approx(2.0, abs=1e-9)


def test_the_answer_is_the_colour_under_the_whitest_cross(made) -> None:
    """Read back from the compressed files by thresholds alone, so the question can be answered from the pixels."""
    folder, samples = made
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    right = 0
    for sample in samples:
        frames = frames_of(folder, sample)
        patch = int(whiteness(frames).argmax())
        both = frames[2 * patch : 2 * patch + 2].astype(float) / 255
        # A diagonal spot of the disc, beside the arms of the cross.
        seen = np.mean([both[:, y, x].mean((0, 1, 2)) for y in CORNERS for x in CORNERS], axis=0)
        name = names[int(((values - seen) ** 2).sum(-1).argmin())]
        right += patch == sample.extra["key_patch"] and "ABCD"[names.index(name)] == sample.answer
    # Noise may hide a few; guessing would give one in 32.
    assert right >= 0.9 * len(samples)


def test_strengths_survive_compression(tmp_path: Path) -> None:
    """Without noise, a distractor's cross is `faint` of the way from none to the key moment's, within 10 %.

    Colour is stored at half resolution, so a little of the disc bleeds into a cross four pixels wide.
    """
    config = SMALL.model_copy(update={"noise": 0.0, "train": 1, "easy_train": 0, "validation": 1, "test": 6})
    for sample in make_key_moment(config, seed=0, folder=tmp_path):
        white = whiteness(frames_of(tmp_path, sample))
        colours = np.array([COLOURS[c] for c in sample.extra["colours"]]).min(-1) * 255
        shares = (white - colours) / (255 - colours)
        assert shares[sample.extra["key_patch"]] == pytest.approx(1.0, abs=0.1)
        assert shares[sample.extra["distractors"]] == pytest.approx(config.faint, abs=0.1)
        plain = set(range(8)) - {sample.extra["key_patch"], *sample.extra["distractors"]}
        assert shares[sorted(plain)] == pytest.approx(0.0, abs=0.1)


def test_a_short_video_has_fewer_distractors(tmp_path: Path) -> None:
    config = KeyMoment(train=2, validation=1, test=1, easy_train=0, num_frames=4)
    for sample in make_key_moment(config, seed=0, folder=tmp_path):
        assert len(sample.extra["colours"]) == 2
        assert len(sample.extra["distractors"]) == 1
