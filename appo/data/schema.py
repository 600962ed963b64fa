"""One question about one video, as every later step knows it.

A source turns its publisher's records into `VideoSample`s; the manifest lists them; prompts, rewards and
benchmarks read them. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from appo.errors import UserError

PROBLEM_TYPES = (
    "multiple choice",
    "numerical",
    "OCR",
    "free-form",
    "regression",
    "temporal grounding",
)
# warm_start: the easy part of a synthetic set, which supervision trains on before reinforcement
SPLITS = ("warm_start", "train", "validation", "test")


class SampleError(UserError, ValueError):
    """A record that cannot become a sample; the message names the field, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class VideoSample:
    """A question, its answer, and where its video (and image, if any) lies.

    id: unique within a manifest. answer: the option's letter for multiple choice and temporal grounding, the text
    or number as written otherwise. options: texts without letters. video, image: path relative to the data root,
    or a URI; at least one is given. key_times: (start, end) in seconds between which the answer shows.
    """

    id: str
    source: str
    problem_type: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    video: str | None = None
    image: str | None = None
    split: str = "train"
    duration_s: float | None = None
    key_times: tuple[tuple[float, float], ...] = ()
    video_sha256: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.problem_type not in PROBLEM_TYPES:
            raise SampleError(
                f"problem_type={self.problem_type!r}: must be one of {', '.join(PROBLEM_TYPES)}"
            )
        if self.split not in SPLITS:
            raise SampleError(f"split={self.split!r}: must be one of {', '.join(SPLITS)}")
        for name in ("id", "source", "question", "answer", "video", "image"):
            _check_text(name, getattr(self, name))
        for option in self.options:
            _check_text("options", option)
        if not self.question.strip():
            raise SampleError("question: is empty; every sample asks something")
        if not self.answer.strip():
            raise SampleError("answer: is empty; a sample without an answer cannot be rewarded")
        if self.video is None and self.image is None:
            raise SampleError("video: is missing, and there is no image either")
        if self.problem_type in ("multiple choice", "temporal grounding"):
            letters = [chr(ord("A") + index) for index in range(len(self.options))]
            if self.answer not in letters:
                raise SampleError(
                    f"answer={self.answer!r}: must be the letter of one of the {len(self.options)} options"
                )
        for start, end in self.key_times:
            if not 0 <= start < end:
                raise SampleError(f"key_times={[start, end]}: needs 0 <= start < end, in seconds")

    def to_json(self) -> dict[str, Any]:
        """Plain values in field order; fields at their default are left out, so that manifests stay readable."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if values[f.name] not in (None, (), {}, [])}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> VideoSample:
        """The inverse of `to_json`. Raises SampleError for an unknown or missing field."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(record) - known):
            raise SampleError(
                f"{unknown[0]}={record[unknown[0]]!r}: unknown field; known are {', '.join(sorted(known))}"
            )
        values = dict(record)
        values["options"] = tuple(values.get("options", ()))
        values["key_times"] = tuple((float(start), float(end)) for start, end in values.get("key_times", ()))
        try:
            return cls(**values)
        except TypeError as error:
            raise SampleError(f"record {record.get('id', '?')}: {error}") from error


def _check_text(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise SampleError(f"{name}={value!r}: must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may hold "\\ud83d" without its other half
        raise SampleError(f"{name}={value!r}: holds half a character; write it out whole") from error
