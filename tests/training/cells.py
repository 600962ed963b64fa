"""One launch of the matrix: trainings of one layout and type, one after another, on fixed completions.

Run by `accelerate launch`, or alone for one process. The trainings themselves are those of `make gpu-check`.

    python -m tests.training.cells JOB      JOB: JSON, see `Job`
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu_check.cells import Cell, Trainings


@dataclass(frozen=True)
class Job:
    """layout: of `training.distributed`, or "one" for a process without a launcher."""

    layout: str
    dtype: str
    manifest: str
    model: str
    tied_model: str
    out: str
    cells: list[Cell]

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str) -> Job:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**values, "cells": [Cell(**cell) for cell in values["cells"]]})


def main(path: str) -> None:
    from appo.startup import UNUSED_BY_TRAINING, heavy_imports
    from tests.cpu_layouts import assert_ran, install

    job = Job.read(path)
    with heavy_imports(without=UNUSED_BY_TRAINING):
        if job.layout != "one":
            install()
        trainings = Trainings(
            job.layout,
            job.dtype,
            Path(job.manifest),
            placed=lambda layout, trainer: assert_ran(trainer, layout),
        )
    for cell in job.cells:
        trainings.run(cell, job.tied_model if cell.tied else job.model, Path(job.out) / cell.name)


if __name__ == "__main__":
    main(sys.argv[1])
