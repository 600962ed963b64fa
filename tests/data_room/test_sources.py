"""Publishers' records, as they are on disk, and what becomes of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from appo.config import RecipeError
from appo.data.schema import SampleError, VideoSample
from appo.data.sources import SOURCES, read_source
from appo.data.sources.base import Reject, Row, between_tags, iter_json, without_letter
from appo.data.sources.seed_bench_r1 import draw_options
from appo.data.sources.video_r1 import fold
from tests.data_room.recipes import recipe_of, write_jsonl

NEXTGQA = Path(__file__).parent.parent / "data" / "nextgqa"


def rows_of(
    tmp_path: Path, source: str, annotations: Path, *more: str
) -> tuple[list[Row], str, dict[str, str]]:
    recipe = recipe_of(tmp_path, f"data.source={source}", f"data.annotations={annotations}", *more)
    data = read_source(recipe, tmp_path / "folder")
    rows = list(data.rows)
    return rows, data.root, dict(data.files)


def only_sample(rows: list[Row]) -> VideoSample:
    (row,) = rows
    assert isinstance(row, VideoSample), row
    return row


VIDEO_R1 = {
    "problem_id": 2,
    "problem": "What is shown?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. a cat", "B. a dog"],
    "process": "",
    "solution": "<answer>B</answer>",
    "path": "./LLaVA-Video-178K/academic_source/youtube_video_2024/ytb_7nRmsEw7nsE.mp4",
    "data_source": "LLaVA-Video-178K/30_60_s_youtube_v0_1",
}


def test_video_r1_record(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    image = {**VIDEO_R1, "problem_id": 1, "data_type": "image", "path": "./Chart/1.png"}
    (tmp_path / "d" / "r1.json").write_text(json.dumps([image, VIDEO_R1], indent=1))
    rows, root, files = rows_of(tmp_path, "video_r1", tmp_path / "d" / "r1.json")
    sample = only_sample(rows)
    assert sample == VideoSample(
        id="2",
        source="LLaVA-Video-178K",
        problem_type="multiple choice",
        question="What is shown?",
        answer="B",
        options=("a cat", "a dog"),
        video="LLaVA-Video-178K/academic_source/youtube_video_2024/ytb_7nRmsEw7nsE.mp4",
        extra={"data_source": "LLaVA-Video-178K/30_60_s_youtube_v0_1"},
    )
    assert root == str(tmp_path / "d")
    assert set(files) == {"r1.json"}


def test_video_r1_root_is_the_parent_when_paths_start_with_the_folder(tmp_path: Path) -> None:
    record = {**VIDEO_R1, "path": "./clips/a.mp4", "data_source": "clips"}
    annotations = write_jsonl(tmp_path / "clips" / "clips.json", [])
    annotations.write_text(json.dumps([record]))
    _, root, _ = rows_of(tmp_path, "video_r1", annotations)
    assert root == str(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"solution": "<answer>E</answer>"}, "letter of one of the 2 options"),
        ({"solution": "<answer>a dog</answer>"}, "must be the letter of an option"),
        ({"problem_type": "riddle"}, "problem_type='riddle'"),
        ({"problem": ""}, "question: is empty"),
        ({"path": None}, None),
    ],
)
def test_video_r1_bad_records(tmp_path: Path, change: dict[str, Any], reason: str | None) -> None:
    record = {**VIDEO_R1, **change}
    if reason is None:
        del record["path"]
    rows, _, _ = rows_of(tmp_path, "video_r1", write_jsonl(tmp_path / "r.jsonl", [record]))
    (reject,) = rows
    assert isinstance(reject, Reject)
    assert reject.id == "2"
    assert (reason or "path: is missing") in reject.reason


def test_aliases_fold_to_one_name() -> None:
    for alias in (
        "NExT-QA",
        "NeXT-QA",
        "NextQA",
        "nextqa",
        "Next_QA",
        "NeXT-QA/30_60_s_nextqa",
        "./NeXT-QA/x.mp4",
    ):
        assert fold(alias) == "NeXT-QA", alias
    for alias in ("PerceptionTest", "Perception Test", "perception-test", "PerceptionTest/train"):
        assert fold(alias) == "PerceptionTest", alias
    assert fold("./STAR/Charades/1.mp4") == "STAR"
    assert fold("my own videos") == "my own videos"


def test_empty_data_source_takes_the_first_folder(tmp_path: Path) -> None:
    record = {**VIDEO_R1, "data_source": "", "path": "./CLEVRER/video_1.mp4"}
    rows, _, _ = rows_of(tmp_path, "video_r1", write_jsonl(tmp_path / "r.jsonl", [record]))
    assert only_sample(rows).source == "CLEVRER"


def test_perception_test_list_is_rerooted(tmp_path: Path) -> None:
    record = {
        "problem_id": 29,
        "problem": "Where is the person?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. Indoors in the living room or bedroom", "B. Outdoors", "C. I don't know"],
        "solution": "<answer>C</answer>",
        "path": "/mnt/theirs/perception-test/video_3217.mp4",
        "data_source": "PerceptionTest/train",
        "duration": 19,
        "dataset_name": "Perception-test",
    }
    (tmp_path / "pt.json").write_text(json.dumps([record]))
    rows, _, _ = rows_of(tmp_path, "perception_test", tmp_path / "pt.json")
    sample = only_sample(rows)
    assert (sample.video, sample.answer, sample.duration_s) == ("video_3217.mp4", "C", 19.0)
    assert sample.source == "PerceptionTest"
    assert sample.options[2] == "I don't know"


def test_perception_test_publishers_file(tmp_path: Path) -> None:
    question = {
        "id": 0, "question": "Where?", "options": ["in", "out", "I don't know"], "answer_id": 1,
        "area": "semantics", "reasoning": "descriptive", "tag": ["place"],
    }  # fmt: skip
    content = {
        "video_1": {"metadata": {}, "mc_question": [question, {**question, "id": 1, "answer_id": 3}]},
        "video_2": {"metadata": {}},
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    good, bad = rows_of(tmp_path, "perception_test", tmp_path / "all.json")[0]
    assert isinstance(good, VideoSample)
    assert (good.id, good.video, good.answer) == ("video_1:0", "video_1.mp4", "B")
    assert good.extra["area"] == "semantics"
    assert isinstance(bad, Reject)
    assert "answer_id=3" in bad.reason


def test_nextgqa_publishers_files(tmp_path: Path) -> None:
    """Real rows: an answer given as text, several spans, and three spans that end after their video."""
    rows, _, files = rows_of(tmp_path, "nextgqa", NEXTGQA / "val.csv")
    assert set(files) == {"val.csv", "gsub_val.json"}
    table = list(csv.DictReader((NEXTGQA / "val.csv").open(newline="")))
    spans = json.loads((NEXTGQA / "gsub_val.json").read_text())
    assert len(rows) == len(table)
    clipped = several = 0
    for record, sample in zip(table, rows, strict=True):
        assert isinstance(sample, VideoSample)
        assert sample.problem_type == "temporal grounding"
        assert sample.options[ord(sample.answer) - ord("A")] == record["answer"]
        about = spans[record["video_id"]]
        published = about["location"][record["qid"]]
        assert len(sample.key_times) == len(published)
        assert all(0 <= start < end <= about["duration"] for start, end in sample.key_times)
        clipped += any(end > about["duration"] for _, end in published)
        several += len(published) > 1
    assert clipped == 3
    assert several >= 3


def test_nextgqa_map_and_missing_times(tmp_path: Path) -> None:
    for name in ("val.csv", "gsub_val.json"):
        (tmp_path / name).write_text((NEXTGQA / name).read_text())
    spans = json.loads((NEXTGQA / "gsub_val.json").read_text())
    first = next(iter(csv.DictReader((NEXTGQA / "val.csv").open(newline=""))))
    del spans[first["video_id"]]["location"][first["qid"]]
    (tmp_path / "gsub_val.json").write_text(json.dumps(spans))
    places = {video: f"1150/{video}" for video in spans}
    (tmp_path / "map_vid_vidorID.json").write_text(json.dumps(places))
    rows, _, _ = rows_of(tmp_path, "nextgqa", tmp_path / "val.csv")
    assert isinstance(rows[0], Reject)
    assert "no times" in rows[0].reason
    assert all(str(row.video).startswith("1150/") for row in rows[1:])


@pytest.mark.parametrize(
    ("source", "name", "content"),
    [
        ("perception_test", "all.json", b'{"video_1": {"mc_question": ['),
        ("nextgqa", "gsub_val.json", b"<html>not found</html>"),
        ("nextgqa", "map_vid_vidorID.json", b"[]"),
        ("nextgqa", "val.csv", b"video_id,question\n1,\xff\xfe\n"),
    ],
)
def test_publishers_files_that_are_broken_are_named(
    tmp_path: Path, source: str, name: str, content: bytes
) -> None:
    for good in ("val.csv", "gsub_val.json"):
        (tmp_path / good).write_bytes((NEXTGQA / good).read_bytes())
    (tmp_path / name).write_bytes(content)
    annotations = tmp_path / ("val.csv" if source == "nextgqa" else name)
    with pytest.raises(SampleError, match=rf"{name}: (is not|must hold)"):
        rows_of(tmp_path, source, annotations)


def test_nextgqa_list_gives_an_index(tmp_path: Path) -> None:
    record = {
        "qid": "1", "question": "why?", "video_path": "/theirs/NExTVideo/4882821564.mp4",
        "options": ["2", "approach", "unwrap it", "play", "gesture"], "answer": "2", "qtype": "CW",
        "duration": 90, "time_clues": [[13.8, 29.8]],
    }  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps([record]))
    sample = only_sample(rows_of(tmp_path, "nextgqa", tmp_path / "list.json")[0])
    assert (sample.id, sample.video, sample.answer) == ("4882821564_1", "4882821564.mp4", "C")
    assert sample.key_times == ((13.8, 29.8),)


SEED = {
    "sample_id": 0,
    "video_id": "P22_07",
    "task_goal": "Move detergent",
    "question": "what action should I take next?",
    "answer": "clean microwave",
    "task_progress_metadata": [{"narration_text": "move detergent", "start_frame": 0, "stop_frame": 49}],
    "negative_answers": ["move detergent", "spray detergent", "turn tap off", "open drawer"],
    "video_source": "EpicKitchens",
    "video_basename": "P22_07-0000093925_0000094605.mp4",
    "current_observation_basename": "P22_07-0000094605.png",
    "duration": 22.7,
}


def test_seed_bench_training_record(tmp_path: Path) -> None:
    (tmp_path / "seed.json").write_text(
        json.dumps([SEED, {**SEED, "sample_id": 1, "task_progress_metadata": []}])
    )
    with_video, image_only = rows_of(tmp_path, "seed_bench_r1", tmp_path / "seed.json")[0]
    assert isinstance(with_video, VideoSample)
    assert isinstance(image_only, VideoSample)
    assert with_video.video == "videos/EpicKitchens/P22_07-0000093925_0000094605.mp4"
    assert with_video.image == "images/EpicKitchens/P22_07-0000094605.png"
    assert (image_only.video, image_only.duration_s) == (None, None)
    assert len(with_video.options) == 4
    assert with_video.options[ord(with_video.answer) - ord("A")] == "clean microwave"


def test_seed_bench_options_are_seeded_per_sample() -> None:
    wrong = [f"wrong {index}" for index in range(8)]
    draws = {
        (seed, ident): draw_options("right", wrong, seed=seed, ident=ident)
        for seed in (0, 1)
        for ident in "abc"
    }
    assert draws[0, "a"] == draw_options("right", list(reversed(wrong)), seed=0, ident="a")
    assert len({tuple(options) for options, _ in draws.values()}) > 1
    letters = [draw_options("right", wrong, seed=0, ident=str(index))[1] for index in range(2000)]
    # 2000 draws of 4 letters: 500 expected each, standard deviation 19; five of those are never reached by
    # chance.
    assert all(abs(letters.count(letter) - 500) < 97 for letter in "ABCD")
    assert len(draw_options("right", ["one", "two", "right"], seed=0, ident="x")[0]) == 3


def test_seed_bench_test_record(tmp_path: Path) -> None:
    record = {key: value for key, value in SEED.items() if key not in ("answer", "negative_answers")}
    record |= {f"choice_{letter}": f"do {letter}" for letter in "abcd"} | {"golden_choice_idx": "B"}
    sample = only_sample(rows_of(tmp_path, "seed_bench_r1", write_jsonl(tmp_path / "v.jsonl", [record]))[0])
    assert (sample.answer, sample.options) == ("B", ("do a", "do b", "do c", "do d"))


def test_generic_record(tmp_path: Path) -> None:
    record = {"video": "a.mp4", "question": "Which?", "options": ["red", "blue"], "answer": "blue"}
    sample = only_sample(rows_of(tmp_path, "jsonl", write_jsonl(tmp_path / "my.jsonl", [record]))[0])
    assert (sample.answer, sample.problem_type, sample.split) == ("B", "multiple choice", "train")
    free = {"video": "a.mp4", "question": "How many?", "answer": "7", "problem_type": "numerical"}
    assert (
        only_sample(rows_of(tmp_path, "jsonl", write_jsonl(tmp_path / "my.jsonl", [free]))[0]).answer == "7"
    )


def test_every_source_has_a_reader_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    from importlib import import_module

    for module in SOURCES.values():
        assert callable(import_module(f"appo.data.sources.{module}").read)
    with pytest.raises(RecipeError, match=r"data\.source='nothing': unknown; known are jsonl"):
        read_source(recipe_of(tmp_path, "data.source=nothing"), tmp_path)


@pytest.mark.parametrize("piece", [3, 17, 1 << 20])
def test_streamed_json_equals_loaded_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Pieces end inside numbers, strings and multi-byte characters."""
    records = [
        {"a": index, "b": [1.5, -2e3, None, True], "ü": 'quote " [ ] { } 動画 \u2028'} for index in range(50)
    ]
    monkeypatch.setattr("appo.data.sources.base._READ_CHARS", piece)
    for name, text in {
        "list.json": json.dumps(records, ensure_ascii=False),
        "pretty.json": json.dumps(records, indent=2),
        "lines.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in records),
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        files: dict[str, str] = {}
        assert list(iter_json(str(tmp_path / name), files)) == records
        import hashlib

        assert files[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_numbers_that_are_none_are_rejected(tmp_path: Path) -> None:
    """Python's JSON reads NaN, and would write it into the manifest, which others could not read."""
    (tmp_path / "r.json").write_text(json.dumps([{**VIDEO_R1, "duration": float("nan")}]))
    (row,), _, _ = rows_of(tmp_path, "video_r1", tmp_path / "r.json")
    assert isinstance(row, Reject)
    assert "nan: must be a finite number" in row.reason


def test_truncated_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(json.dumps([VIDEO_R1, VIDEO_R1])[:-40])
    with pytest.raises(ValueError, match=r"cut\.json: is not a complete JSON list"):
        rows_of(tmp_path, "video_r1", tmp_path / "cut.json")


def test_letters_and_tags() -> None:
    assert without_letter("B. a dog", 1) == "a dog"
    assert without_letter("(B) a dog", 1) == "a dog"
    assert without_letter("A. Smith", 1) == "A. Smith"  # a name, not the letter of the second option
    assert between_tags("<answer> B </answer>") == "B"
    assert between_tags("3.5") == "3.5"
