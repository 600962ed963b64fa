"""One process a GPU, items dealt out among them, and the exact merge of what they wrote.

Each process is the ordinary evaluation of every n-th item, into a file of its own beside the real one:
`{benchmark}.part{i}of{n}.jsonl`. Merging moves whole records into the real file and then deletes the part, so that
a run killed at any point, or continued with another number of processes, loses and doubles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appo.config import Recipe, parse_recipe
from appo.errors import one_line, said_in, status_of
from appo.evaluation.engine import EngineError
from appo.evaluation.predictions import PredictionLog

if TYPE_CHECKING:
    from appo.data.progress import ProgressLine
    from appo.evaluation.run import Task

POLL_S = 0.5


def generate_in_parallel(
    recipe: Recipe,
    tasks: Sequence[Task],
    *,
    checkpoints: Mapping[str, str],
    manifest_path: Path | None,
    out: Path,
    progress: bool,
) -> None:
    """Fill the tasks' files with `evaluation.data_parallel` processes. Raises EngineError when one fails, after the
    others have ended and all that was finished is merged, and for more processes than GPUs."""
    from appo.data.progress import progress_line

    merge(tasks)
    if not any(task.left for task in tasks):
        return
    count = recipe.evaluation.data_parallel
    check_count(count)
    alone = recipe.model_copy(
        update={"evaluation": recipe.evaluation.model_copy(update={"data_parallel": 1})}
    )
    job = {
        "recipe": alone.to_json(),
        "checkpoints": dict(checkpoints),
        "manifest": None if manifest_path is None else str(manifest_path),
        "out": str(out),
        "count": count,
    }
    left = sum(len(task.left) for task in tasks)
    with tempfile.TemporaryDirectory() as scratch, progress_line(progress) as line:
        _decode_once(tasks, line)
        logs = [Path(scratch) / f"{index}.txt" for index in range(count)]
        workers = [_start({**job, "index": index}, logs[index]) for index in range(count)]
        line.start(f"{count} processes", left)
        shown = 0
        try:
            while any(worker.poll() is None for worker in workers):
                time.sleep(POLL_S)
                done = min(left, sum(_lines(part) for task in tasks for part in _parts(task)))
                for _ in range(done - shown):
                    line.step()
                shown = max(shown, done)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
                worker.wait()
            merge(tasks)
        failed = [index for index, worker in enumerate(workers) if worker.returncode]
        if failed:
            lines = logs[failed[0]].read_text(errors="replace").split("\n")
            tail = one_line(" ".join(said_in(lines) or lines[-8:]), 600)
            raise EngineError(
                f"process {failed[0]} of {count} ended with {workers[failed[0]].returncode}: {tail}"
            )


def check_count(count: int) -> None:
    """Raise EngineError for more processes than GPUs; without any GPU, processes share the processor."""
    import torch

    if 0 < (here := torch.cuda.device_count()) < count:
        raise EngineError(
            f"evaluation.data_parallel={count}: one process takes a GPU, and this machine has {here}; "
            f"set evaluation.data_parallel={here}"
        )


def _decode_once(tasks: Sequence[Task], line: ProgressLine) -> None:
    """Fill the shards that all processes read, or each would decode the videos of its own items."""
    from appo.data.decoding import Rejected, items_of
    from appo.data.filling import FilledFrames

    for opened in {task.opened.digest: task.opened for task in tasks if task.left}.values():
        if isinstance(opened.frames, FilledFrames):
            samples = opened.benchmark.items
            files = {item for sample in samples for item in items_of(sample)}
            line.start(f"videos of {opened.benchmark.name}", len(files))
            opened.frames.fill(
                samples, on_file=lambda outcome: line.step(rejected=isinstance(outcome, Rejected))
            )


def merge(tasks: Sequence[Task]) -> None:
    """Move every part's records into its task's file. A part generated with other settings is refused there."""
    for task in tasks:
        header = {name: value for name, value in task.log.header.items() if name != "kind"}
        known = {item.id for item in task.benchmark.items}
        for part in _parts(task):
            for name, record in PredictionLog(part, header).records.items():
                if name in known and name not in task.log.records:
                    task.log.add(record)
            task.log.close()
            part.unlink()


def share_of(task: Task, index: int, count: int) -> Task:
    """Every count-th of the items that the task's file lacks, into a part file."""
    header = {name: value for name, value in task.log.header.items() if name != "kind"}
    part = task.log.path.with_name(f"{task.benchmark.name}.part{index}of{count}.jsonl")
    only = frozenset(item.id for item in task.left[index::count])
    return replace(task, log=PredictionLog(part, header), only=only)


def _parts(task: Task) -> list[Path]:
    return sorted(task.log.path.parent.glob(f"{task.benchmark.name}.part*of*.jsonl"))


def _lines(path: Path) -> int:
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def _start(job: Mapping[str, Any], log: Path) -> subprocess.Popen[bytes]:
    """A process that sees one GPU (all of them where there is none to see)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(job["count"])]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES=devices[job["index"] % len(devices)])
    with open(log, "wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "appo.evaluation.parallel"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(job).encode())
    worker.stdin.close()
    return worker


def main() -> None:
    """What one process does: its share of every task."""
    from appo.evaluation.run import generate, plan_tasks

    job = json.load(sys.stdin)
    recipe = parse_recipe(job["recipe"])
    manifest = None if job["manifest"] is None else Path(job["manifest"])
    tasks = plan_tasks(recipe, job["checkpoints"], manifest, Path(job["out"]))
    shares = [share_of(task, job["index"], job["count"]) for task in tasks]
    try:
        generate(recipe, [share for share in shares if share.left], progress=False)
    finally:
        for share in shares:
            share.log.close()


if __name__ == "__main__":
    sys.exit(status_of(main))
