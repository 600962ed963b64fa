"""A small set and a whole model folder, both without weights worth loading: nothing here gets that far."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appo import cli
from appo.errors import DEBUG, LINES
from tests.data_room.conftest import s3, weed

__all__ = ["s3", "weed"]


@dataclass(frozen=True)
class Answer:
    """What the command said. status: of the process; lines: of stderr."""

    status: int
    lines: list[str]
    output: str
    error: BaseException | None

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def answer(*words: str) -> Answer:
    """`appo words` in this process, ended as in a shell (`appo.cli_ending`)."""
    result = CliRunner().invoke(cli.app, list(words))
    error = None if isinstance(result.exception, SystemExit) else result.exception
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return Answer(result.exit_code, lines, result.stdout, error)


def is_a_mistake(found: Answer, *said: str) -> None:
    """Status 2 and at most six lines, the first marked, no traceback, all of `said` in them."""
    assert found.error is None, found.error
    assert found.status == 2, found
    assert found.text.startswith("error: ")
    assert "Traceback" not in found.text
    assert len(found.lines) <= LINES
    for words in said:
        assert words in found.text, f"{words!r} is not in:\n{found.text}"


def safetensors(path: Path, size: int = 8) -> None:
    """A file with one tensor of `size` bytes, in the format's own layout."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def make_model(folder: Path, *, shards: int = 0) -> Path:
    """A folder with every file of a checkpoint."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    names = [f"model-{number}.safetensors" for number in range(shards)]
    for name in names or ["model.safetensors"]:
        safetensors(folder / name)
    if names:
        index = {"metadata": {"total_size": 8 * shards}, "weight_map": {name: name for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with nothing set that commands read from the environment."""
    for name in (DEBUG, "MLFLOW_TRACKING_URI", "KF_PIPELINES_ENDPOINT", "KFP_RUN_ID", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def files(place: Path) -> Path:
    """`place` with a manifest, a model, and things that are not what a command expects."""
    from appo.data.manifest import write_manifest
    from appo.data.schema import VideoSample

    about = {"source": "mine", "problem_type": "free-form", "question": "?", "answer": "a", "video": "a.mp4"}
    samples = [VideoSample(id="one", **about), VideoSample(id="last", split="test", **about)]
    write_manifest(place / "manifest.jsonl", samples, root=".")
    make_model(place / "model")
    (place / "bytes.bin").write_bytes(b"\xff\xfe\x00no text")
    (place / "cut.yaml").write_text("a: [1")
    (place / "cut.json").write_text('{"a":')
    (place / "folder").mkdir()
    (place / "sound.yaml").write_text("name: mine\nmodel: {path: model}\n")
    (place / "records.jsonl").write_text('{"question": "?", "answer": "a", "video": "a.mp4"}\n')
    return place
