"""Records and videos of every set that a shipped recipe names, small, in their publishers' own formats.

MADE, not published: real mp4 files of 8 s with a ramp of brightness, and questions about nothing. Fields, file names,
folders, types of question and quirks are the publishers' (absolute paths of somebody's machine, images among the videos,
records without a video). Both the sets that are trained on and the benchmarks that are evaluated lie in one folder.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.evaluation.benchmarks.mvbench import TASKS
from tests.data_room.clips import write_clip

SECONDS, FRAMES, SIDE = 8, 40, 240  # above 224 x 224: a frame has as many visual tokens as in a real video
OPTIONS = ("red ball", "green cube", "blue cone", "yellow ring", "grey box")
QUESTION = "Which object moves first?"
NUMBER = "How many objects move?"


@dataclass(frozen=True)
class MadeSet:
    """What takes the place of a recipe's data: `data.annotations` and `data.root`."""

    annotations: Path
    root: Path


class Clips:
    """Videos under the publishers' names. Those that are trained on all differ; benchmarks share a few."""

    def __init__(self, folder: Path):
        self._folder, self._made = folder, 0

    def own(self, path: Path) -> None:
        """A clip that no other path has."""
        step = 1000 * SECONDS // FRAMES
        times = [step * index for index in range(FRAMES)]
        write_clip(path, num_frames=FRAMES, size=(SIDE, SIDE), times_ms=times, seed=self._made)
        self._made += 1

    def shared(self, path: Path, which: int = 0) -> None:
        source = self._folder / f"{which}.mp4"
        if not source.exists():
            self.own(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            os.link(source, path)


def make_all(folder: Path) -> tuple[dict[str, MadeSet], Path]:
    """(source -> its made set, the folder of all benchmarks)."""
    clips = Clips(folder / "clips")
    sources: dict[str, Callable[[Path, Clips], MadeSet]] = {
        "nextgqa": nextgqa,
        "perception_test": perception_test,
        "seed_bench_r1": seed_bench_r1,
        "video_r1": video_r1,
    }
    made = {name: make(folder / "trained_on" / name, clips) for name, make in sources.items()}
    benchmarks = folder / "benchmarks"
    for name, make in BENCHMARKS.items():
        make(benchmarks / name, clips)
    return made, benchmarks


def choice(index: int, count: int = 4) -> dict[str, Any]:
    """The fields of a multiple-choice question in Video-R1's format."""
    lettered = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(OPTIONS[:count])]
    answer = chr(ord("A") + index % count)
    return {
        "problem": QUESTION,
        "problem_type": "multiple choice",
        "options": lettered,
        "solution": f"<answer>{answer}</answer>",
    }


def number(index: int) -> dict[str, Any]:
    answer = f"<answer>{index % 4}</answer>"
    return {"problem": NUMBER, "problem_type": "numerical", "options": [], "solution": answer}


def prose(index: int) -> dict[str, Any]:
    answer = f"<answer>the {OPTIONS[index % 4]}</answer>"
    return {"problem": QUESTION, "problem_type": "free-form", "options": [], "solution": answer}


def video_r1(folder: Path, clips: Clips) -> MadeSet:
    """`Video-R1-260k.json`: all five sources of the 34K set with their types of question, and images among them."""
    long, short = "LLaVA-Video-178K/30_60_s_youtube_v0_1", "LLaVA-Video-178K/0_30_s_academic_v0_1"
    youtube = "LLaVA-Video-178K/academic_source/youtube_video_2024/ytb_{}.mp4"
    rows: list[tuple[str, str, dict[str, Any]]] = [
        *((youtube.format(i), long if i % 2 else short, choice(i)) for i in range(4)),
        # Only multiple choice is taken of this source.
        *((youtube.format(4 + i), long, prose(i)) for i in range(2)),
        *((f"STAR/Charades_v1_480/{i // 2:03}.mp4", "STAR", choice(i)) for i in range(4)),
        *((f"PerceptionTest/video_{i // 2}.mp4", "PerceptionTest", choice(i, 3)) for i in range(4)),
        *((f"NeXT-QA/NExTVideo/{i}.mp4", "NeXT-QA/30_60_s_nextqa", choice(i, 5)) for i in range(4)),
        *(
            (f"CLEVRER/train_video/video_{i}.mp4", "CLEVRER", choice(i) if i % 2 else number(i))
            for i in range(4)
        ),
    ]
    records: list[dict[str, Any]] = []
    for path, source, about in rows:
        if not (folder / path).exists():
            clips.own(folder / path)
        records.append(
            {"data_type": "video", **about, "process": "", "path": f"./{path}", "data_source": source}
        )
    image = {"data_type": "image", **choice(0), "process": "", "path": "./Math/1.png", "data_source": ""}
    records.insert(3, image)
    numbered = [{"problem_id": i, **record} for i, record in enumerate(records)]
    return MadeSet(_write(folder / "Video-R1-260k.json", numbered), folder)


def perception_test(folder: Path, clips: Clips) -> MadeSet:
    """The authors' `perception_test_6k.json`: Video-R1's format with the paths of their machine."""
    records = []
    for index in range(4):
        video = f"video_{3217 + index // 2}.mp4"
        if not (folder / "videos" / video).exists():
            clips.own(folder / "videos" / video)
        records.append(
            {
                "problem_id": index,
                "data_type": "video",
                **choice(index, 3),
                "path": f"/somewhere/perception-test/{video}",
                "data_source": "PerceptionTest/train",
                "duration": SECONDS,
                "dataset_name": "Perception-test",
            }
        )
    return MadeSet(_write(folder / "perception_test_6k.json", records), folder / "videos")


def seed_bench_r1(folder: Path, clips: Clips) -> MadeSet:
    """`training_6k.jsonl`: a video and an image in one prompt; one record has no progress, hence no video."""
    records = []
    for index in range(4):
        video, image = f"P22_07-{index}_{index + 680}.mp4", f"P22_07-{index}.png"
        if index:
            clips.own(folder / "videos" / "EpicKitchens" / video)
        _image(folder / "images" / "EpicKitchens" / image, index)
        progress = [{"narration_text": "move detergent", "start_frame": 0, "stop_frame": 49}]
        records.append(
            {
                "sample_id": index,
                "video_id": "P22_07",
                "task_goal": "Move the objects",
                "question": QUESTION,
                "answer": OPTIONS[index],
                "task_progress_metadata": progress if index else [],
                "negative_answers": [option for option in OPTIONS if option != OPTIONS[index]],
                "video_source": "EpicKitchens",
                "video_basename": video,
                "current_observation_basename": image,
                "duration": SECONDS if index else 0.0,
                "dataset_name": "seed_bench_r1",
            }
        )
    return MadeSet(_lines(folder / "training_6k.jsonl", records), folder)


def nextgqa(folder: Path, clips: Clips) -> MadeSet:
    """The publisher's `val.csv` with `gsub_val.json` and the map into VidOR's folders beside it."""
    _nextgqa_files(folder, "val", questions=4, put=lambda path, _: clips.own(path))
    return MadeSet(folder / "val.csv", folder)


# --- Benchmarks -------------------------------------------------------------------------------------------------


def _nextgqa_files(
    folder: Path, split: str, *, questions: int, put: Callable[[Path, int], None], given: str = "text"
) -> None:
    """CSV, spans and map of NExT-GQA; with given="index" and without spans, those of NExT-QA."""
    rows, spans, places = [], {}, {}
    for index in range(questions):
        video = str(4882821564 + index // 2)
        places[video] = f"1150/{video}"
        answer = index % 5
        rows.append(
            {
                "video_id": video,
                "frame_count": FRAMES,
                "width": SIDE,
                "height": SIDE,
                "question": QUESTION,
                "answer": OPTIONS[answer] if given == "text" else answer,
                "qid": index,
                "type": ("CW", "CH", "TN", "TC")[index % 4],
                **{f"a{i}": option for i, option in enumerate(OPTIONS)},
            }
        )
        about = spans.setdefault(video, {"duration": SECONDS, "location": {}, "fps": 5.0})
        about["location"][str(index)] = [[1.0, 3.5]] if index else [[0.5, 2.0], [5.0, SECONDS + 0.4]]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if given == "text":
        _write(folder / f"gsub_{split}.json", spans)
    _write(folder / "map_vid_vidorID.json", places)
    for number_of, place in enumerate(places.values()):
        put(folder / f"{place}.mp4", number_of)


def _nextgqa_benchmark(folder: Path, clips: Clips) -> None:
    _nextgqa_files(folder, "test", questions=3, put=clips.shared)


def _nextqa_benchmark(folder: Path, clips: Clips) -> None:
    _nextgqa_files(folder, "test", questions=3, put=clips.shared, given="index")


def _seed_bench_benchmark(folder: Path, clips: Clips) -> None:
    for level in ("L1", "L2", "L3"):
        shown = level != "L3"  # an item without progress has no video
        record = {
            "sample_id": 0,
            "question": QUESTION,
            **{f"choice_{letter}": OPTIONS[i] for i, letter in enumerate("abcd")},
            "golden_choice_idx": "B",
            "task_progress_metadata": [{"start_frame": 0}] if shown else [],
            "video_source": "EgoPlan",
            "video_basename": f"{level}.mp4",
            "current_observation_basename": f"{level}.png",
        }
        _lines(folder / "annotations" / f"validation_{level}.jsonl", [record])
        clips.shared(folder / "videos" / "EgoPlan" / f"{level}.mp4")
        _image(folder / "images" / "EgoPlan" / f"{level}.png", 0)


def _perception_test_benchmark(folder: Path, clips: Clips) -> None:
    question = {
        "id": 0,
        "question": QUESTION,
        "options": list(OPTIONS[:3]),
        "answer_id": 1,
        "area": "physics",
        "reasoning": "descriptive",
        "tag": ["motion"],
    }
    about = {"metadata": {}, "mc_question": [question, {**question, "id": 1, "answer_id": 2}]}
    _write(folder / "mc_question_valid.json", {"video_1": about})
    clips.shared(folder / "videos" / "video_1.mp4")


def _mvbench_benchmark(folder: Path, clips: Clips) -> None:
    for task, place in TASKS.items():
        answer = {"question": QUESTION, "candidates": list(OPTIONS[:4]), "answer": OPTIONS[2]}
        _write(folder / "json" / f"{task}.json", [{"video": "1.mp4", **answer}])
        clips.shared(folder / place / "1.mp4")


def _vsi_bench_benchmark(folder: Path, clips: Clips) -> None:
    scene = {"dataset": "scannet", "scene_name": "scene0001_00", "question": QUESTION}
    lettered = choice(0)["options"]
    easy = {"question_type": "object_rel_direction_easy", "options": lettered, "ground_truth": "A"}
    counted = {"question_type": "object_counting", "options": None, "ground_truth": "4"}
    _lines(folder / "test.jsonl", [{"id": 0, **scene, **easy}, {"id": 1, **scene, **counted}])
    clips.shared(folder / "scannet" / "scene0001_00.mp4")


BENCHMARKS: Mapping[str, Callable[[Path, Clips], None]] = {
    "mvbench": _mvbench_benchmark,
    "nextgqa": _nextgqa_benchmark,
    "nextqa": _nextqa_benchmark,
    "perception_test": _perception_test_benchmark,
    "seed_bench_r1": _seed_bench_benchmark,
    "vsi_bench": _vsi_bench_benchmark,
}


def _write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _image(path: Path, shade: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (456, 256), (40 * shade, 90, 120)).save(path)
