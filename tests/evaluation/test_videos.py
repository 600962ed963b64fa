"""Videos of publishers' benchmarks: decoded once, into the shards that training uses; cut where the publisher says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import appo.evaluation.run as run
from appo.data.frames import DecodedFrames
from appo.data.manifest import read_manifest
from appo.data.video import VideoError
from appo.evaluation.sets import open_sets
from tests.evaluation.test_run import Scripted

# The tiny models' tokenizers know the prompt; frames of a whole batch fit one shard.
SETTINGS = ("evaluation.benchmarks=[perception_test]", "data.encoding=jpeg", "evaluation.max_model_len=2048")


@pytest.fixture
def folder(small_set, tmp_path) -> Path:
    """A Perception Test of four real videos, one of them asked about twice, one ending in .MP4."""
    manifest = read_manifest(small_set.manifest)
    samples = manifest.split("test")[:4]
    place = tmp_path / "perception_test"
    (place / "videos").mkdir(parents=True)
    rows = {}
    for index, sample in enumerate(samples):
        name = f"video_{index}"
        suffix = ".MP4" if index == 2 else ".mp4"
        shutil.copy(Path(manifest.root) / sample.video, place / f"videos/{name}{suffix}")
        question = {"question": "Where?", "options": ["in", "out", "no"], "answer_id": 1, "area": "a"}
        question |= {"reasoning": "b", "tag": []}
        rows[name] = {"mc_question": [question | {"id": i} for i in range(2 if index == 1 else 1)]}
    (place / "mc_question_valid.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def evaluate(small_set, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "start_engine", Scripted)

    def evaluate(out: str, *overrides: str, model: int = 0, name: str = "a"):
        recipe = small_set.recipe(*SETTINGS, f"evaluation.annotations={folder}", *overrides)
        found = run.evaluate(
            recipe,
            checkpoints={name: str(small_set.models[model])},
            manifest_path=None,
            out=tmp_path / out,
            progress=False,
        )
        return found[name]["perception_test"], (tmp_path / out / name / "perception_test.jsonl").read_bytes()

    return evaluate


def no_videos(folder: Path) -> None:
    for video in (folder / "perception_test/videos").iterdir():
        video.unlink()


def test_a_second_evaluation_touches_no_video(evaluate, folder):
    """Another run and another checkpoint, after the videos are gone; the prompts' hashes say that frames are equal."""
    first, lines = evaluate("first")
    assert first["missing_rate"] == 0.0
    shards = list((folder / "perception_test/frames").rglob("*.parquet"))
    assert shards
    no_videos(folder)
    assert evaluate("second") == (first, lines)
    assert evaluate("third", model=1, name="b")[0]["missing_rate"] == 0.0
    assert list((folder / "perception_test/frames").rglob("*.parquet")) == shards


def test_several_processes_decode_each_video_once(evaluate, folder, monkeypatch):
    from appo.data.frames import list_rows
    from appo.evaluation import parallel
    from tests.evaluation.test_run import Here

    def stored() -> list[str]:
        (place,) = (folder / "perception_test/frames").iterdir()
        return [key for _, keys, _ in list_rows(str(place)) for key in keys]

    def start(job, log):
        assert len(stored()) == 4, (
            "before any of them starts: side by side they could not know of one another"
        )
        return Here(job, log)

    monkeypatch.setattr(parallel, "_start", start)
    found, lines = evaluate("two", "evaluation.data_parallel=2")
    assert found["missing_rate"] == 0.0
    assert len(stored()) == len(set(stored())) == 4
    no_videos(folder)
    assert evaluate("one") == (found, lines)


def test_a_changed_video_is_decoded_again(evaluate, folder):
    _, lines = evaluate("first")
    videos = folder / "perception_test/videos"
    shutil.copy(videos / "video_3.mp4", videos / "video_0.mp4")
    _, changed = evaluate("second")
    hashes = [[json.loads(x)["prompt"] for x in text.split(b"\n")[1:-1]] for text in (lines, changed)]
    assert [a == b for a, b in zip(*hashes, strict=True)] == [False, True, True, True, True]


def test_without_a_cache_videos_are_decoded_on_the_fly(evaluate, folder):
    _, lossy = evaluate("jpeg")
    _, decoded = evaluate("none", "data.cache=none")
    assert not (folder / "perception_test/frames/none").exists()
    # Lossless shards hold the very pixels; the header tells lossy from lossless, and nothing else differs.
    _, lossless = evaluate("png", "data.encoding=png")
    assert lossless == decoded
    assert json.loads(lossy.split(b"\n")[0])["frames"] == "jpeg, quality 95"
    no_videos(folder)
    with pytest.raises(VideoError, match=r"video_0\.mp4: no such file; 5 of 5 items"):
        evaluate("gone", "data.cache=none")


def test_another_folder_for_the_frames_and_one_that_cannot_be_written(
    evaluate, folder, tmp_path, monkeypatch
):
    import appo.evaluation.sets as sets

    evaluate("first", f"data.cache_dir={tmp_path / 'cache'}")
    assert list((tmp_path / "cache").rglob("*.parquet"))
    assert not (folder / "perception_test/frames").exists()
    monkeypatch.setattr(sets.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"cannot be written to.*set data\.cache_dir, or data\.cache=none"):
        evaluate("second")


def test_a_broken_video_is_counted_with_its_reason(evaluate, folder):
    (folder / "perception_test/videos/video_0.mp4").write_bytes(b"no video at all")
    found, lines = evaluate("out", "data.max_reject_rate=0.5")
    assert found["missing_rate"] == pytest.approx(1 / 5)
    (error,) = [json.loads(x)["error"] for x in lines.split(b"\n")[1:-1] if b'"error"' in x]
    assert "video_0.mp4" in error
    # A run that gives up early leaves no process and no thread behind.
    import threading

    assert not [thread for thread in threading.enumerate() if thread.name == "filling"]


def test_frames_from_shards_are_those_of_direct_decoding(small_set, folder):
    recipe = small_set.recipe(*SETTINGS, "data.encoding=png", f"evaluation.annotations={folder}")
    (opened,) = open_sets(recipe, None)
    direct = DecodedFrames(str(folder / "perception_test"), recipe.video)
    with opened.filling(opened.benchmark.items):
        for item in opened.benchmark.items:
            stored, decoded = opened.frames.load(item), direct.load(item)
            assert (stored.frames == decoded.frames).all()
            assert stored.timestamps_s.tolist() == decoded.timestamps_s.tolist()
            assert stored.fps == decoded.fps


# --- MVBench's first release: whole videos and folders of frames --------------------------------------------------


def mvbench(folder: Path, records: dict[str, dict]) -> None:
    from appo.evaluation.benchmarks.mvbench import TASKS

    for task in TASKS:
        record = {"video": "absent.mp4", "question": "?", "candidates": ["x", "y"], "answer": "y"}
        path = folder / "json" / f"{task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([record | records.get(task, {})]))


def colours(folder: Path, count: int) -> None:
    """Frame i is as red as i, named from 00001.jpg on."""
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (56, 56), (index * 4, 0, 0)).save(folder / f"{index + 1:05d}.jpg", quality=100)


def located(folder: Path, task: str, small_set):
    recipe = small_set.recipe(
        "evaluation.benchmarks=[mvbench]",
        "data.encoding=png",
        "video.num_frames=8",
        "video.max_pixels=3136",
        f"evaluation.annotations={folder}",
    )
    (opened,) = open_sets(recipe, None)
    (item,) = [item for item in opened.benchmark.items if item.extra["task"] == task]
    with opened.filling([item]):
        return item, opened.frames.load(item)


def test_mvbench_folder_of_frames_is_a_video_of_three_frames_a_second(small_set, tmp_path):
    record = {"video": "friends_s06e18_clip_18", "start": 2.0, "end": 8.0, "fps": 3}
    mvbench(tmp_path, {"episodic_reasoning": record})
    colours(tmp_path / "tvqa/frames_fps3_hq/friends_s06e18_clip_18", 60)
    item, video = located(tmp_path, "episodic_reasoning", small_set)
    assert item.video == "tvqa/frames_fps3_hq/friends_s06e18_clip_18"
    # 18 frames from the seventh on, eight of them spread from first to last.
    assert [int(frame[..., 0].mean() / 4 + 0.5) for frame in video.frames] == list(video.frame_indices)
    assert (video.frame_indices[0], video.frame_indices[-1]) == (6, 23)
    assert video.timestamps_s.tolist() == pytest.approx([(i - 6) / 3 for i in video.frame_indices])
    assert (video.duration_s, video.total_frames) == (pytest.approx(6.0), 60)


def test_mvbench_whole_video_is_cut_where_the_cut_one_is_not_there(small_set, tmp_path):
    from tests.data_room.clips import write_clip

    record = {"video": "a.mp4", "start": 1.0, "end": 3.0}
    mvbench(tmp_path, {"action_sequence": record})
    whole = tmp_path / "star/Charades_v1_480/a.mp4"
    write_clip(whole, num_frames=40, times_ms=range(0, 4000, 100))
    item, video = located(tmp_path, "action_sequence", small_set)
    assert item.extra["clip"] == [1.0, 3.0]
    assert all(10 <= index < 30 for index in video.frame_indices)
    assert video.timestamps_s[0] == 0.0
    assert video.duration_s == pytest.approx(2.0)
    # Once the clips are there they are taken, whole.
    cut = tmp_path / "star/Charades_segment/a.mp4"
    cut.parent.mkdir(parents=True)
    shutil.copy(whole, cut)
    item, video = located(tmp_path, "action_sequence", small_set)
    assert "clip" not in item.extra
    assert video.duration_s == pytest.approx(3.9, abs=0.11)


@pytest.mark.parametrize(
    ("task", "folder", "record", "complaint"),
    [
        ("action_sequence", "star/Charades_v1_480", {"video": "a.mp4"}, "has no start and end to cut it at"),
        (
            "action_sequence",
            "star/Charades_v1_480",
            {"video": "a.mp4", "start": 70.0, "end": 80.0},
            r"holds no frame from 70 to 80 s, its length is 3\.9 s",
        ),
    ],
)
def test_mvbench_videos_that_cannot_be_cut_are_refused(small_set, tmp_path, task, folder, record, complaint):
    from tests.data_room.clips import write_clip

    mvbench(tmp_path, {task: record})
    write_clip(tmp_path / folder / "a.mp4", num_frames=40, times_ms=range(0, 4000, 100))
    with pytest.raises(ValueError, match=complaint):
        located(tmp_path, task, small_set)


def test_a_folder_of_frames_without_a_rate_is_no_video(tmp_path):
    from appo.config import Video
    from appo.data.clips import Clip, decode_folder

    colours(tmp_path / "frames", 4)
    with pytest.raises(VideoError, match="nothing says how many there are a second"):
        decode_folder(tmp_path / "frames", Video(), Clip())
    (tmp_path / "frames/00002.jpg").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"00002\.jpg: cannot be read as an image"):
        decode_folder(tmp_path / "frames", Video(), Clip(fps=3.0))


# --- prompts ------------------------------------------------------------------------------------------------------


def test_questions_about_one_video_look_at_it_once_and_get_the_same_tensors(small_set, folder, monkeypatch):
    """Threads beside one another, too: every prompt equals the one that training's own function makes alone."""
    import dataclasses

    import torch

    from appo.evaluation.prefetch import Prefetch
    from appo.evaluation.prompts import PromptMaker, PromptStream, jobs, positions_model, prompt_digest
    from appo.modeling.inputs import build_inputs
    from appo.modeling.loading import load_processor

    recipe = small_set.recipe(*SETTINGS, "data.cache=none", f"evaluation.annotations={folder}")
    (opened,) = open_sets(recipe, None)
    model = str(small_set.models[0])
    processor, positions = load_processor(model), positions_model(model)
    loads = []
    load = DecodedFrames.load
    monkeypatch.setattr(DecodedFrames, "load", lambda self, s: loads.append(s.video) or load(self, s))

    alone = {}
    for item in opened.benchmark.items:
        frames = opened.frames.load(item)
        made = build_inputs(processor, positions, item, frames, None, template=opened.template)
        alone[item.id] = made
    loads.clear()
    maker = PromptMaker(processor, positions)
    for item in opened.benchmark.items:
        maker.make(item, opened.frames, opened.template)
    assert len(loads) == len(set(loads)) == 4  # of five questions

    for workers in (1, 4):
        maker = PromptMaker(processor, positions)
        work = jobs(maker, opened.benchmark.items * 4, opened.frames, opened.template)
        with Prefetch(work, workers=workers, ahead=8) as prefetch:
            stream = PromptStream(prefetch)
            while (taken := stream.take(wait=True)) is not None:
                name, prompt = taken
                for field in ("ids", "token_types", "frame_of_token", "positions", "seconds_per_grid"):
                    assert torch.equal(getattr(prompt, field), getattr(alone[name], field))
                assert torch.equal(prompt.video.pixels, alone[name].video.pixels)
                assert torch.equal(prompt.video.grid_thw, alone[name].video.grid_thw)
                assert prompt.timestamps_s == alone[name].timestamps_s
                # The digest is of what is in the prompt, whoever took the hash.
                unnamed = dataclasses.replace(prompt, video=dataclasses.replace(prompt.video, key=None))
                assert prompt_digest(prompt) == prompt_digest(unnamed) == prompt_digest(alone[name])
        assert not stream.failed
