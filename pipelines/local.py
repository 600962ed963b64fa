"""A compiled graph -> run on this machine by kfp.local, step by step in processes of their own.

Finished steps are kept in a cache beside the run's files: the same command again continues. kfp.local
streams all that its steps print, interleaved; the four functions of kfp that do so are replaced while a
graph runs (kfp is pinned below 2.18 for that reason, and a test runs a graph through the replacements).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from appo.errors import PREFIX, UserError
from pipelines.console import Story

DOING = {
    "validate": "check the recipe",
    "plan_trainings": "list the trainings",
    "assemble": "questions and videos -> checked manifest, decoded frames",
    "base_model": "the weights that every training starts from",
    "features": "vision features of every video, once for all trainings",
    "train": "reinforcement learning",
    "evaluate": "generate and score with one engine for all checkpoints",
    "gate": "is there new data?",
    "evaluate_challenger": "challenger and champion on the same questions",
    "promote": "who is used from now on",
    "compare": "means over seeds, ratios, report, MLflow",
}
# Printed by the command itself, after everything else.
SAID_LAST = ("compare",)
# kfp.local runs at most two iterations of a loop at a time.
PARALLEL = 2


class PipelineFailed(UserError, RuntimeError):
    """A step failed by an expected mistake, which its lines have said; what finished is kept."""


class StepFailed(PipelineFailed):
    """A step failed by a defect, whose traceback its lines have shown; what finished is kept."""

    status = 1


def run_graph(graph: Any, arguments: Mapping[str, Any], *, folder: Path, story: Story) -> None:
    """Run `graph` (a pipeline function) with `arguments`; its files and cache lie in `folder`.

    Raises PipelineFailed (StepFailed for a defect) naming the failed steps. Ctrl-C and SIGTERM reach the running steps.
    """
    from kfp import local

    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), _told_by(story, folder) as failed:
        warnings.simplefilter("ignore")
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(folder / "kfp"),
            enable_caching=True,
            cache_root=str(folder / "kfp" / "cache"),
        )
        try:
            graph(**arguments)
        except RuntimeError as error:
            if "finished with status" not in str(error):
                raise
            kind = PipelineFailed if failed and all(failed.values()) else StepFailed
            names = ", ".join(failed) or "a step"
            reasons = [line.removeprefix(PREFIX) for lines in failed.values() for line in lines]
            said = [f"{names} failed; fix the reason and give the same command again", *reasons]
            raise kind("\n".join(said)) from error
    _forget_old_runs(folder / "kfp")


@contextlib.contextmanager
def _told_by(story: Story, folder: Path) -> Iterator[dict[str, list[str]]]:
    """Inside, steps are run and told here. Gives the failed ones with the lines of their expected mistakes."""
    logs, failed = folder / "logs", dict[str, list[str]]()
    running: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()

    def run_step(full_command: list[str], env_vars: Mapping[str, str] | None = None) -> int:
        if stopping.is_set():  # kfp's threads go on with the loop's other iterations
            return 1
        name, inputs = _called(full_command)
        label = f"{inputs['algorithm']} seed {inputs['seed']}" if name == "train" else name.replace("_", " ")
        step = story.step(label, DOING.get(name, name), logs / f"{label.replace(' ', '-')}.log")
        read_stdout = step.read_stderr if name in SAID_LAST else step.read_stdout
        process = subprocess.Popen(
            full_command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                **_environment(name),
                **_run_name(full_command, folder / "kfp"),
                **(env_vars or {}),
            },
            start_new_session=True,  # Ctrl-C is passed on once, below
        )
        running.add(process)
        readers = [
            threading.Thread(target=read_stdout, args=(process.stdout,)),
            threading.Thread(target=step.read_stderr, args=(process.stderr,)),
        ]
        for reader in readers:
            reader.start()
        code = process.wait()
        if code == 0:
            _make_missing_outputs(full_command)
        for reader in readers:
            reader.join()
        running.discard(process)
        mistake = step.end(failed=code != 0)
        if code:
            failed[label] = mistake
        return code

    def interrupt(number: int, frame: Any) -> None:
        stopping.set()
        for process in list(running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        for target, replacement in {
            "kfp.local.subprocess_task_handler.run_local_subprocess": run_step,
            "kfp.local.logging_utils.local_logger_context": contextlib.nullcontext,
            "kfp.local.logging_utils.indented_print": contextlib.nullcontext,
            "kfp.local.logging_utils.print_horizontal_line": lambda: None,
        }.items():
            stack.enter_context(mock.patch(target, replacement))
        stack.enter_context(_kept_steps(story))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, interrupt))
        yield failed


@contextlib.contextmanager
def _kept_steps(story: Story) -> Iterator[None]:
    """Say which steps the cache answers; kfp tells it to the root logger only."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words = record.getMessage().split()
            if "cache hit" in record.getMessage():
                story.say(f"[bold green]✓[/] [bold]{words[1].replace('-', ' '):<20}[/] finished before, kept")

    root, handler = logging.getLogger(), Handler()
    level, handlers = root.level, root.handlers[:]
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers = handlers


def _called(command: list[str]) -> tuple[str, dict[str, Any]]:
    """The component's name and parameters, out of the command line that KFP made."""
    name = command[command.index("--function_to_execute") + 1]
    given = json.loads(command[command.index("--executor_input") + 1])
    return name, given.get("inputs", {}).get("parameterValues", {})


def _run_name(command: list[str], root: Path) -> dict[str, str]:
    """kfp's name of this run, which MLflow's runs carry as a tag; on a cluster pods read it from their labels."""
    given = json.loads(command[command.index("--executor_input") + 1])
    return {"KFP_RUN_NAME": Path(given["outputs"]["outputFile"]).relative_to(root).parts[0]}


def _make_missing_outputs(command: list[str]) -> None:
    """An empty file where an output has none: Metrics live in metadata alone, and kfp's cache takes an output
    without a file for one that was lost.
    """
    given = json.loads(command[command.index("--executor_input") + 1])
    for output in given.get("outputs", {}).get("artifacts", {}).values():
        for artifact in output.get("artifacts", []):
            path = Path(artifact["uri"])
            if "://" not in artifact["uri"] and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


def _environment(name: str) -> dict[str, str]:
    """Threads for what runs at the same time; progress bars that come through a pipe."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    threads = max(1, cores // PARALLEL) if name == "train" else cores
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONUNBUFFERED": "1",
        "FORCE_COLOR": "1",
        "COLUMNS": "110",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _forget_old_runs(root: Path, keep: int = 5) -> None:
    """kfp makes a folder a run and the cache points into any of them: drop only those without files in
    use.
    """
    used = {
        path for entry in (root / "cache").glob("*.json") for path in _paths(json.loads(entry.read_text()))
    }
    runs = sorted((run for run in root.iterdir() if run.is_dir() and run.name != "cache"), reverse=True)
    for run in runs[keep:]:
        if not any(path.startswith(f"{run}{os.sep}") for path in used):
            shutil.rmtree(run)


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, str):
        yield value
