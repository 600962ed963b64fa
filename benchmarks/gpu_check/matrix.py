"""The matrix's rows for one device: every algorithm, with and without shared prefix and LoRA, in bfloat16.

Each against the same training in float32, which a process beside this one runs on the CPU, the path that the tests hold.

    python -m benchmarks.gpu_check.matrix JOB       the trainings in float32; JOB: JSON, see `_reference`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.parts import Place
from benchmarks.gpu_check.rows import Measure, Row, failed

DTYPE = "bfloat16"
# As many updates as the law about entries that move asks for.
STEPS = 10


def rows(place: Place) -> list[str]:
    return list(_cells())


def _cells() -> dict[str, Any]:
    from benchmarks.cells import every_cell

    def name(cell: Any) -> str:
        how = ("shared" if cell.shared_prefix else "plain", "LoRA" if cell.lora else "full")
        return ", ".join((f"matrix: {cell.algorithm}", *how, *(("tied",) if cell.tied else ())))

    return {name(cell): replace(cell, steps=STEPS) for cell in every_cell()}


def run(
    names: Sequence[str], place: Place, began: Callable[[str], None], done: Callable[[Row], None]
) -> None:
    from benchmarks.cells import Trainings

    manifest, models = _prepared(place.path)
    cells = _cells()
    with _reference(place, manifest, models, [cells[name] for name in names]) as reference:
        trainings = Trainings("one", DTYPE, manifest)
        for name in names:
            began(name)
            start = time.perf_counter()
            try:
                measures = _measure(trainings, cells[name], models, place, reference)
                done(Row(name, measures, time.perf_counter() - start))
            except Exception as error:
                done(failed(name, error, time.perf_counter() - start))
                if "CUDA error" in str(error):  # nothing that follows in this process can succeed
                    raise


def _prepared(folder: Path) -> tuple[Path, dict[bool, str]]:
    """The manifest and the models, by whether embeddings are tied; made once in the folder."""
    from appo.config import load_recipe
    from benchmarks.cells import OVERRIDES, tied
    from benchmarks.gpu_check import small_set

    place = folder / "set"
    manifest, model, one = place / "data" / "manifest.jsonl", place / "model", place / "tied"
    if not (place / "whole").exists():
        small_set.write(load_recipe("demo", list(OVERRIDES)), place)
        tied(model, one)
        (place / "whole").touch()
    return manifest, {False: str(model), True: str(one)}


def _check_place(trainer: Any, place: Place) -> None:
    """The policy lies where the check is about, whole."""
    import torch

    found = {parameter.device.type for parameter in trainer._policy().parameters()}
    if found != {place.device}:
        raise RuntimeError(f"the policy lies on {', '.join(sorted(found))}, not on {place.device}")
    if isinstance(trainer.model_wrapped, torch.nn.DataParallel):
        raise RuntimeError("several GPUs are seen, and transformers splits batches over them; show it one")


def _measure(
    trainings: Any, cell: Any, models: dict[bool, str], place: Place, reference: Callable[[Any], Path]
) -> tuple[Measure, ...]:
    from benchmarks import cell_distances as bounds
    from benchmarks.cells import read

    out = place.path / DTYPE / cell.name
    _check_place(trainings.run(cell, models[cell.tied], out), place)
    found = read(out)
    if found["types"] != (wanted := bounds.wanted_types("one", DTYPE, cell.lora)):
        raise RuntimeError(f"parameters are {found['types']}, not {wanted}")
    judge = bounds.wanted_reference(DTYPE, cell.algorithm, cell.lora)
    if found["reference"] != judge:
        raise RuntimeError(f"the reference model's parameters are {found['reference']}, not {judge}")
    apart = bounds.distances(found, read(reference(cell)))
    if not apart.finite:
        raise RuntimeError("a loss is not finite")
    return (
        Measure("log-probabilities off by", apart.logps, bounds.LOGPS[DTYPE]),
        Measure("gradient", apart.gradient, bounds.GRADIENT[DTYPE]),
        Measure("entries moved", apart.changed, bounds.CHANGED, at_most=False),
        Measure("move", apart.moved, bounds.MOVED),
    )


@contextmanager
def _reference(
    place: Place, manifest: Path, models: dict[bool, str], cells: Sequence[Any]
) -> Iterator[Callable[[Any], Path]]:
    """Starts the trainings in float32 on the CPU; gives a function that waits for one and returns its folder."""
    out = place.path / "float32"
    out.mkdir(parents=True, exist_ok=True)
    job = {
        "manifest": str(manifest),
        "models": [models[False], models[True]],
        "out": str(out),
        "cells": [asdict(cell) for cell in cells],
    }
    path = out / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(place.threads)}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_check.matrix", str(path)], env=env)

    def wait(cell: Any) -> Path:
        folder = out / cell.name
        while not (folder / "cell.pt").exists():
            ended = process.poll() is not None
            if (folder / "error.txt").exists():
                text = (folder / "error.txt").read_text(encoding="utf-8")
                raise RuntimeError(f"the float32 training on the CPU: {text}")
            if ended and not (folder / "cell.pt").exists():
                raise RuntimeError(f"the float32 trainings on the CPU ended with status {process.returncode}")
            time.sleep(0.05)
        return folder

    try:
        yield wait
    finally:
        process.kill()
        process.wait()


def main(path: str) -> None:
    from benchmarks.cells import Cell, Trainings

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    trainings = Trainings("one", "float32", Path(job["manifest"]))
    for values in job["cells"]:
        cell = Cell(**values)
        folder = Path(job["out"]) / cell.name
        if (folder / "cell.pt").exists():
            continue
        try:
            trainings.run(cell, job["models"][cell.tied], folder)
        except Exception as error:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(failed(cell.name, error).reason, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
