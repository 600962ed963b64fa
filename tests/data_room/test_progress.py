"""What people see while records are read and videos decoded: how far, how fast, how long, how many rejects."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from appo.data import progress
from appo.data.progress import Lines, progress_line


def work(bar: progress.ProgressLine) -> None:
    assert list(bar.over(range(3), "reading records")) == [0, 1, 2]
    bar.start("decoding videos", 4)
    for index in range(4):
        bar.step(rejected=index == 2)


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by 20 s a look: a line every 30 s means one for each second video."""
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    lines: list[str] = []
    bar = Lines(lines.append)
    bar.start("decoding videos", 6)
    for index in range(6):
        bar.step(rejected=index == 1)
    assert lines[0] == "decoding videos: 2 of 6, 0.033/s, 0:02:00 left, 1 rejected"
    assert re.fullmatch(r"decoding videos: 6 of 6, .*/s, 0:00:00 left, 1 rejected", lines[-1])
    assert len(lines) == 3


def test_output_that_is_no_terminal_gets_the_last_line_of_each_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with progress_line(True) as bar:
        work(bar)
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"reading records: 3, [\d,.e+]+/s", first)
    assert re.fullmatch(r"decoding videos: 4 of 4, [\d,.e+]+/s, 0:00:00 left, 1 rejected", second)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "FORCE_COLOR", "1")
    monkeypatch.setitem(os.environ, "COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_line(True) as bar:
        work(bar)
    screen = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", sys.stderr.getvalue())
    assert re.search(r"decoding videos .*4/4 .*/s .*1 rejected", screen)


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_line(False) as bar:
        work(bar)
    assert capsys.readouterr() == ("", "")
