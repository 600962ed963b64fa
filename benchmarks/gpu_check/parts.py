"""The parts of the check: which module measures which rows, and what it is given. Standard library only.

A part is a module with `rows(place)`, the names of its rows, and `run(names, place, began, done)`, which measures those
of them that are asked for in a process of its own: `began(name)` before each, `done(row)` after.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """device: "cuda" or "cpu". folder: the part's own. threads: of each process that computes on the CPU."""

    device: str
    folder: str
    threads: int

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def path(self) -> Path:
        return Path(self.folder)


@dataclass(frozen=True, slots=True)
class Part:
    """module: below benchmarks/gpu_check, by its full name. processes: that it runs at once. alone: nothing else may run
    beside it, since it takes times.
    """

    module: str
    processes: int = 1
    alone: bool = False

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


PARTS = (
    Part("benchmarks.gpu_check.step", alone=True),
    Part("benchmarks.gpu_check.matrix", processes=2),
    Part("benchmarks.gpu_check.kernels"),
    Part("benchmarks.gpu_check.memory"),
)
