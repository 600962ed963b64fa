"""The matrix's rows of one process in bfloat16, against float32 on the same device and completions."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.cell_distances import CHANGED, GRADIENT, LOGPS, MOVED, distances
from benchmarks.cells import Cell, Job, every_cell, read, small_set, tied
from benchmarks.gpu_check.needs import ROOT, SETS
from benchmarks.gpu_check.rows import Row

# Updates of a cell: as many as the law of masters asks for, and on a CPU as many as show the same.
STEPS = {"cuda": 10, "cpu": 3}
DTYPE = "bfloat16"
SECONDS = 240.0


def carried_set(folder: Path) -> tuple[Path, Path]:
    """The small set, carried or made here, which needs a video decoder; and its model."""
    carried = SETS / "small_set" / "manifest.jsonl"
    return small_set(folder / "small_set", carried if carried.exists() else None)


def rows(device: str, cells: tuple[Cell, ...] | None = None) -> Iterator[Row]:
    """One row a cell. Raises RuntimeError with the last lines of a launch that failed."""
    cells = tuple(replace(cell, steps=STEPS[device]) for cell in cells or every_cell())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, model = carried_set(folder)
        one = tied(model, folder / "tied")
        for dtype in ("float32", DTYPE):
            _launch(
                Job("one", dtype, str(manifest), str(model), str(one), str(folder / dtype), list(cells)),
                device,
            )
        for cell in cells:
            found = distances(read(folder / DTYPE / cell.name), read(folder / "float32" / cell.name))
            row = Row(f"matrix: {cell.name}")
            row.bounded("log-probabilities off by", found.logps, most=LOGPS[DTYPE])
            row.bounded("gradient's norm off by", found.gradient, most=GRADIENT[DTYPE])
            row.bounded("entries moved", found.changed, least=CHANGED)
            row.bounded("move off by", found.moved, most=MOVED)
            if not found.finite:
                row.problems.append("a loss is not finite")
            yield row


def _launch(job: Job, device: str) -> None:
    path = job.write(Path(job.out) / "job.json")
    command = [sys.executable, "-m", "benchmarks.cells", str(path)]
    if device == "cpu":
        command = ["env", "CUDA_VISIBLE_DEVICES=", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS * 2)
    if done.returncode:
        raise RuntimeError(f"{job.dtype}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
