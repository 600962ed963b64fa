"""SEED-Bench-R1: egocentric planning, a video and an image; three levels of transfer, reported apart.

Publisher: TencentARC/SEED-Bench-R1 (`src/open_r1_egoplan/grpo.py`). Its parser compares first characters, so that
`Because ...` counts as B and `Answer: B` as wrong; the variant `paper` reads letters as training does.
"""

from __future__ import annotations

from pathlib import Path

from appo.data.schema import VideoSample
from appo.evaluation.benchmarks.base import OFFICIAL, PAPER, Benchmark, answer_of, lenient_choice
from appo.evaluation.benchmarks.files import Record, find_file, read_lines, require_items, samples_from
from appo.evaluation.predictions import Prediction

LEVELS = ("L1", "L2", "L3")
_LONGEST_FORMULA = 200


class SEEDBenchR1(Benchmark):
    """The split `test` is every level whose file is there; ids are `{level}_{sample_id}` in it."""

    name, title = "seed_bench_r1", "SEED-Bench-R1"
    splits = ("test", *LEVELS)
    official_parser = "math_verify, then first character"

    @classmethod
    def load(cls, folder: Path, split: str) -> Benchmark:
        items: list[VideoSample] = []
        wanted = LEVELS if split == "test" else (split,)
        names = {level: f"validation_{level}.jsonl" for level in wanted}
        find_file(folder, list(names.values()), benchmark=cls.title)
        for level, name in names.items():
            if folder.is_dir() and not any((p / name).is_file() for p in (folder, folder / "annotations")):
                continue
            path = find_file(folder, [name], benchmark=cls.title)
            prefix = f"{level}_" if split == "test" else ""

            def to_sample(record: Record, level: str = level, prefix: str = prefix) -> VideoSample:
                return _sample(record, level, prefix)

            items += samples_from(read_lines(path), to_sample, benchmark=cls.title)
            if folder.is_file():
                break
        return cls(require_items(items, folder, cls.title), split)

    def measure(
        self, sample: VideoSample, prediction: Prediction
    ) -> tuple[str | None, dict[str, dict[str, float]]]:
        answer = answer_of(prediction)
        letter = lenient_choice(sample, answer)
        official = answer is not None and (answer[0] == sample.answer or same_formula(answer, sample.answer))
        values = {
            OFFICIAL: {"accuracy": float(official)},
            PAPER: {"accuracy": float(letter == sample.answer)},
        }
        return letter or answer, values

    def groups(self, sample: VideoSample) -> dict[str, str]:
        return {"level": str(sample.extra["level"])}


def same_formula(answer: str, truth: str) -> bool:
    r"""What math_verify adds to comparing first characters: an answer typeset as `$B$` or `\boxed{B}`."""
    if len(answer) > _LONGEST_FORMULA or not ("$" in answer or "\\" in answer):
        return False
    from math_verify import parse, verify

    # No timeouts: they are signals, which only a main thread may set; the text is short.
    said, right = (parse(text, parsing_timeout=None) for text in (answer, f"${truth}$"))
    return bool(verify(right, said, timeout_seconds=None))


def _sample(record: Record, level: str, prefix: str) -> VideoSample:
    source = str(record["video_source"])
    shown = bool(record["task_progress_metadata"])  # without progress there is only the image
    return VideoSample(
        id=f"{prefix}{record['sample_id']}",
        source="SEED-Bench-R1",
        problem_type="multiple choice",
        question=str(record["question"]),
        answer=str(record["golden_choice_idx"]).strip(),
        options=tuple(str(record[f"choice_{letter}"]) for letter in "abcd"),
        video=f"videos/{source}/{record['video_basename']}" if shown else None,
        image=f"images/{source}/{record['current_observation_basename']}",
        split="test",
        extra={"level": level},
    )
