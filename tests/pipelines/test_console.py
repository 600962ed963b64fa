"""What steps print -> what a person sees: progress recognised from real bars, everything kept in the logs."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.console import Story, pieces

TQDM = "from tqdm import tqdm\nfor _ in tqdm(range(3), desc='steps', mininterval=0): pass\n"
RICH = "from rich.progress import track\nimport time\nfor _ in track(range(3), 'clips'): time.sleep(0.15)\n"


def produced(code: str) -> tuple[bytes, bytes]:
    environment = {"FORCE_COLOR": "1", "COLUMNS": "80", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize(("code", "stream", "words"), [(TQDM, 1, "3/3"), (RICH, 0, "100%")])
def test_progress_bars_are_recognised(code: str, stream: int, words: str) -> None:
    """Of a real bar every state but the closing line counts as progress, and control codes are gone."""
    parts = list(pieces(io.BytesIO(produced(code)[stream])))
    assert any(overwritten and words in text for text, overwritten in parts)
    assert not any("\x1b" in text for text, _ in parts)


def test_plain_lines_are_not_progress() -> None:
    assert list(pieces(io.BytesIO("one\ntwo\r\nthrée\n".encode()))) == [
        ("one", False),
        ("two", False),
        ("thrée", False),
    ]


def test_lines_split_over_reads_are_joined() -> None:
    class Slow(io.RawIOBase):
        """Gives one byte at a time, as a pipe may."""

        def __init__(self, data: bytes) -> None:
            self.data = data

        def read(self, size: int = -1) -> bytes:
            piece, self.data = self.data[:1], self.data[1:]
            return piece

    assert list(pieces(Slow(b"first\r\nsecond\n"))) == [("first", False), ("second", False)]


def test_story_shows_output_keeps_noise_in_the_log_and_explains_a_failure(tmp_path: Path) -> None:
    screen = io.StringIO()
    story = Story(Console(file=screen, width=120))
    step = story.step("train", "reinforcement", tmp_path / "train.log")
    header = b'[KFP Executor 2026 INFO]: Got executor_input:\n{\n    "inputs": {\n    }\n}\n'
    step.read_stdout(io.BytesIO(header + b"resumed from step [40]\n"))
    traceback = (
        b"Traceback (most recent call last):\n"
        b'  File "kfp/executor.py", line 1, in execute\n'
        b'  File "/tmp/tmp.x/ephemeral_component.py", line 20, in train\n'
        b"    done = steps.train(\n"
        b"ValueError: no manifest\n"
    )
    step.read_stderr(io.BytesIO(b"library: a warning\n" + traceback))
    step.end(failed=True)
    shown = screen.getvalue()
    assert "resumed from step [40]" in shown
    assert "ValueError: no manifest" in shown
    assert str(tmp_path / "train.log") in shown
    for noise in ("executor_input", '"inputs"', "library: a warning", "kfp/executor.py"):
        assert noise not in shown
        assert noise in (tmp_path / "train.log").read_text()
