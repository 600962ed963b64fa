"""All rows, for real, on a Python that has what a GPU machine has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_check import bundle, packages
from tests.gpu_check import machine
from tests.tiers import long

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@long
def test_every_row_has_a_number_with_what_travels_as_wheels(tmp_path: Path):
    """As on a GPU machine, from packed wheels; their size with the sources is what may be handed to it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in packages.CARRIED:
        machine.wheel_of(name, folder)
    assert bundle.check_size(folder) == 0
    python = machine.make(tmp_path / "machine", machine.of_the_machine())
    out = tmp_path / "found.json"
    done = machine.check(python, "--cpu", "--wheels", str(folder), "--out", str(out), timeout_s=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert all(isinstance(row["value"], float | int) for row in found["rows"])
    (row,) = (row for row in found["rows"] if row["name"] == "matrix: dapo, shared, LoRA")
    names = ["log-probabilities off by", "gradient", "entries moved", "move"]
    assert [measure["name"] for measure in row["measures"]] == names
    assert row["measures"][0]["value"] > 0  # bfloat16 against float32: two trainings, not one
    assert any(note.startswith("carried as wheels: ") and "trl" in note for note in found["notes"])
