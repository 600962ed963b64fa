"""Every layout and type trains every algorithm: equal log-probabilities, gradients and updates, and it resumes.

The path that a lab runs: bfloat16 over float32 masters, sharded, with and without adapters. The reference is one process
in float32 on the same fixed completions. `make test` runs a cut that meets every value at least twice; the whole matrix
runs with APPO_TEST_LONG=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from appo.modeling.architecture import TinyShape
from benchmarks.cell_distances import distances, wanted_reference, wanted_types
from benchmarks.cells import ALGORITHMS, Cell, Job, every_cell, read, recipe_of, tied
from benchmarks.cells import small_set as make_small_set
from tests.cpu_layouts import lifted
from tests.tiers import LONG, long, short
from tests.training.conftest import said

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAYOUTS, TYPES = ("one", "ddp", "fsdp2", "zero2", "zero3"), ("float32", "bfloat16")
TIED = Cell("appo", True, False, tied=True)
WHOLE = every_cell()
# (layout, type) -> cells of `make test`. Values that are met less than twice fail a test below.
CUT = {
    ("one", "bfloat16"): (Cell("appo", True, False), Cell("dapo", False, True)),
    ("ddp", "float32"): (Cell("grpo", False, True), Cell("pa_grpo", True, False)),
    ("fsdp2", "bfloat16"): (Cell("grpo", True, False), Cell("appo", False, True), TIED),
    ("zero2", "bfloat16"): (Cell("dapo", True, True), Cell("pa_grpo", False, False)),
    ("zero3", "float32"): (Cell("appo", False, False), Cell("dapo", True, False)),
}
# A third of the demo's time: what differs between layouts does not depend on sizes.
SHAPE = TinyShape(
    hidden=64, layers=3, feed_forward=128, vision_hidden=32, vision_layers=1, vision_feed_forward=64
)
# Updates of a cell: as many as the law asks for, and in the cut as many as show the same.
STEPS = 10 if LONG else 3
RESUMED_IN_CUT = ("fsdp2", "bfloat16")


def trained(lora: bool, name: str, **how: int) -> Cell:
    return Cell(
        "appo", True, lora, steps=6, save_every=3, folder=f"{name}-{'lora' if lora else 'full'}", **how
    )


def straight(lora: bool) -> Cell:
    """A training that nothing disturbs."""
    return trained(lora, "straight")


def killed(lora: bool) -> Cell:
    """The same one, killed in its fourth step; its launch ends there."""
    return trained(lora, "resumed", killed_after=3)


def abandoned(lora: bool) -> Cell:
    """The same one, ended in its fourth step by an exception; its launch goes on."""
    return trained(lora, "resumed", abandoned_after=3)


def resumed(lora: bool) -> Cell:
    """What goes on from where that one was killed."""
    return trained(lora, "resumed")


def followed_by(layout: str, dtype: str) -> tuple[Cell, ...]:
    """Trainings at the end of a launch of the matrix, the last of them killed, for the tests of going on."""
    if LONG:
        return straight(False), straight(True), abandoned(True), killed(False)
    return (straight(False), killed(False)) if (layout, dtype) == RESUMED_IN_CUT else ()


class Matrix:
    """Launches what is asked for once, and reads what it left. `launched` has what is there already."""

    def __init__(self, small_set: tuple[Path, Path], folder: Path):
        self.manifest, self.model = small_set
        self.folder, self.tied_model = folder, tied(self.model, folder / "tied")
        self.launched: set[tuple] = set()

    def cells(self, layout: str, dtype: str, cells: tuple[Cell, ...]) -> dict[str, dict]:
        counted = (replace(cell, steps=STEPS) for cell in cells)
        out = self.once(layout, dtype, (*counted, *followed_by(layout, dtype)))
        return {cell.name: read(out / cell.name) for cell in cells}

    def once(self, layout: str, dtype: str, cells: tuple[Cell, ...]) -> Path:
        out = self.folder / f"{layout}-{dtype}"
        if (layout, dtype, cells) not in self.launched:
            self.launched.add((layout, dtype, cells))
            self.launch(layout, dtype, cells, out, fails=cells[-1].killed_after is not None)
        return out

    def launch(
        self, layout: str, dtype: str, cells: tuple[Cell, ...], out: Path, *, fails: bool = False
    ) -> str:
        """Run one launch to its end; returns what it printed to standard error."""
        job = Job(
            layout, dtype, str(self.manifest), str(self.model), str(self.tied_model), str(out), list(cells)
        )
        path = job.write(out / "job.json")
        module = ["-m", "benchmarks.cells", str(path)]
        if layout == "one":
            command = [sys.executable, *module]
        else:
            from appo.training.launch import launch_command

            with lifted():
                command = launch_command(recipe_of(layout, dtype, cells[0]), path, processes=2)
            command[command.index("-m", 3) :] = module
        root = Path(__file__).parents[2]
        env = {**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == fails, said(done)
        for cell in cells[:-1] if fails else cells:
            assert (cell.abandoned_after is not None) != (out / cell.name / "cell.pt").exists(), (
                f"{layout} {dtype} {cell.name} did not end:\n{said(done)}"
            )
        return done.stderr


@pytest.fixture(scope="session")
def matrix(small_set: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("matrix")
    return Matrix(make_small_set(folder / "small", small_set[0], SHAPE), folder)


def check_all(matrix: Matrix, layout: str, dtype: str, cells: tuple[Cell, ...], reference: dict) -> None:
    found = matrix.cells(layout, dtype, cells)
    for cell in cells:
        ours = found[cell.name]
        problems = distances(ours, reference[cell.name]).problems(dtype)
        assert problems == [], f"{layout} {dtype} {cell.name}"
        assert ours["types"] == wanted_types(layout, dtype, cell.lora), cell.name
        assert ours["reference"] == wanted_reference(dtype, cell.algorithm, cell.lora), cell.name


@short
@pytest.mark.parametrize(("layout", "dtype"), CUT, ids=lambda value: value)
def test_a_cut_of_the_matrix(matrix: Matrix, layout: str, dtype: str):
    every = tuple(dict.fromkeys(cell for cells in CUT.values() for cell in cells))
    check_all(matrix, layout, dtype, CUT[layout, dtype], matrix.cells("one", "float32", every))


def test_the_cut_meets_every_value_twice():
    met = Counter()
    for (layout, dtype), cells in CUT.items():
        for cell in cells:
            met.update([layout, dtype, cell.algorithm, ("shared", cell.shared_prefix), ("lora", cell.lora)])
    values = {*LAYOUTS, *TYPES, *ALGORITHMS, *product(("shared", "lora"), (True, False))}
    assert {value for value, count in met.items() if count >= 2} == values


@long
@pytest.mark.parametrize(
    ("layout", "dtype"), [pair for pair in product(LAYOUTS, TYPES) if pair != ("one", "float32")]
)
def test_the_whole_matrix(matrix: Matrix, layout: str, dtype: str):
    check_all(matrix, layout, dtype, WHOLE, matrix.cells("one", "float32", WHOLE))


def check_resumed(out: Path, dtype: str, *, lora: bool) -> None:
    """Bit for bit what the undisturbed training left: metrics' steps, masters, what is published."""
    ours, theirs = out / resumed(lora).name, out / straight(lora).name
    assert json.loads((ours / "summary.json").read_text())["resumed_from"] == 3
    found, expected = read(ours), read(theirs)
    assert [step["step"] for step in found["steps"]] == [1, 2, 3, 4, 5, 6]
    for name, master in expected["after"].items():
        assert torch.equal(found["after"][name], master), name
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    published = [load_file(folder / "checkpoint" / file) for folder in (ours, theirs)]
    assert published[0].keys() == published[1].keys()
    for name, weight in published[0].items():
        assert torch.equal(weight, published[1][name]), name
        assert weight.dtype == getattr(torch, dtype), name


@short
def test_resumed_equals_uninterrupted(matrix: Matrix):
    layout, dtype = RESUMED_IN_CUT
    matrix.cells(layout, dtype, CUT[layout, dtype])
    check_resumed(matrix.once(layout, dtype, (resumed(False),)), dtype, lora=False)


@long
@pytest.mark.parametrize(("layout", "dtype"), product(LAYOUTS, TYPES))
def test_resumed_equals_uninterrupted_in_every_layout(matrix: Matrix, layout: str, dtype: str):
    matrix.cells(layout, dtype, WHOLE)
    out = matrix.once(layout, dtype, (resumed(False), resumed(True)))
    for lora in (False, True):
        check_resumed(out, dtype, lora=lora)


@long
def test_another_number_of_processes_goes_on_equally(matrix: Matrix):
    """Torch's checkpoints are read by any number of processes; sums of other parts round otherwise."""
    matrix.cells("fsdp2", "float32", WHOLE)
    theirs = read(matrix.folder / "fsdp2-float32" / straight(False).name)
    out = matrix.folder / "from-two-to-one"
    matrix.launch("fsdp2", "float32", (killed(False),), out, fails=True)
    matrix.launch("one", "float32", (resumed(False),), out)
    ours = read(out / resumed(False).name)
    for name, master in theirs["after"].items():
        moved = (master - theirs["before"][name]).abs().max()
        assert float((ours["after"][name] - master).abs().max()) <= 0.2 * moved, name
    for step, expected in zip(ours["steps"], theirs["steps"], strict=True):
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@long
def test_another_number_of_processes_is_refused_by_name_under_deepspeed(matrix: Matrix):
    out = matrix.folder / "from-zero-to-one"
    matrix.launch("zero2", "float32", (killed(False),), out, fails=True)
    printed = matrix.launch("one", "float32", (resumed(False),), out, fails=True)
    assert "was written by 2 processes with training.distributed=zero2" in printed
    assert "1 with ddp run now; start as many as before" in printed
