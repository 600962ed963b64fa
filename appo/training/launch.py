"""A training on one process or on many: `accelerate launch` of the same `train` function, with shipped configurations.

`launch` is what steps and pods call. With one process it trains right here; with more it starts this module under
`accelerate launch`, streams what the processes print, and hands back their end: a failed training raises with the last
lines, one that was stopped and has saved raises Interrupted.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from appo.config import Recipe, parse_recipe
from appo.errors import UserError, debugging, expected, tell
from appo.storage import write_atomic

# Told apart from failures: a saved, unfinished training is to be started again (BSD's EX_TEMPFAIL).
EXIT_INTERRUPTED = 75
LINES_OF_REASON = 30
# Beside the job, one file a process: the message of an expected mistake, for the process that started them all.
MISTAKE = "mistake-{rank}.txt"


class TrainingFailed(RuntimeError):
    """The processes of a training ended with an error; the message holds their last lines."""


class LayoutError(UserError, ValueError):
    """A layout that this machine cannot run: the setting, its value, the remedy."""


def refuse_impossible(recipe: Recipe, processes: int, *, here: bool = True) -> None:
    """Raise LayoutError for a layout that cannot run: accelerate would replace it by another, in silence.

    processes: of one training. here: whether they will be on this machine, which is then looked at too.
    """
    layout = recipe.training.distributed
    if layout == "ddp":
        return
    name = f"training.distributed={layout}"
    if processes == 1:
        raise LayoutError(f"{name}: shards over processes, and there is one; set training.distributed=ddp")
    if not here:
        return
    if layout.startswith("zero") and not _installed("deepspeed"):
        raise LayoutError(
            f"{name}: needs the package deepspeed; install it, or set training.distributed=fsdp2"
        )
    if not _has_gpu():
        raise LayoutError(f"{name}: needs GPUs, and this machine has none; set training.distributed=ddp")


def launch_command(
    recipe: Recipe, job: Path, *, processes: int, machines: int = 1, rank: int = 0, address: str | None = None
) -> list[str]:
    """The `accelerate launch` command line. processes: over all machines; job: the file `write_job` made.

    Raises LayoutError.
    """
    refuse_impossible(recipe, processes)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(_configuration(recipe, job.with_name("accelerate.yaml")))]
    command += ["--num_processes", str(processes), "--num_machines", str(machines)]
    if machines > 1:
        command += [
            "--machine_rank",
            str(rank),
            "--main_process_ip",
            str(address),
            "--main_process_port",
            "29500",
        ]
    else:
        command += ["--main_process_port", "0"]
    if recipe.training.distributed.startswith("zero"):
        # DeepSpeed's own launcher reaches other machines over SSH; torch's needs no more than the address.
        command += ["--deepspeed_multinode_launcher", "standard"] if machines > 1 else []
    if importlib.util.find_spec("appo.training.launch") is None:
        raise TrainingFailed("appo is not importable here; install the package before launching")
    return [*command, "-m", "appo.training.launch", str(job)]


def _configuration(recipe: Recipe, path: Path) -> Path:
    """Write accelerate's configuration: the shipped one of the layout, with this run's precision and device."""
    layout = recipe.training.distributed
    shipped = resources.files("appo.recipes") / "accelerate"
    values = yaml.safe_load((shipped / f"{layout}.yaml").read_text(encoding="utf-8"))
    values["mixed_precision"] = "bf16" if recipe.model.dtype == "bfloat16" else "no"
    # accelerate starts several local CPU processes for MULTI_GPU only (MULTI_CPU wants MPI); they meet over gloo.
    values["use_cpu"] = not _has_gpu()
    if layout.startswith("zero"):
        values["deepspeed_config"] = {"deepspeed_config_file": str(shipped / f"{layout}.json")}
        values.pop("mixed_precision")  # said in that file: the trainer fills in every "auto"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def write_job(path: Path, recipe: Recipe, **arguments: Any) -> Path:
    """What every process reads: the resolved recipe and `train`'s other arguments."""
    values = {name: str(v) if isinstance(v, Path) else v for name, v in arguments.items()}
    write_atomic(path, json.dumps({"recipe": recipe.to_json(), **values}))
    return path


def launch(
    recipe: Recipe,
    *,
    processes: int,
    machines: int = 1,
    rank: int = 0,
    address: str | None = None,
    tracking: dict[str, str] | None = None,
    **arguments: Any,
) -> None:
    """Train on `processes` processes (of all machines); arguments as `appo.training.run.train` takes them.

    rank, address: this machine's number, and where number 0 is found. tracking: arguments of
    `appo.tracking.start_training` that its first process opens its tracker with.
    Raises Interrupted after a SIGTERM was passed on and a checkpoint saved, UserError with the message of a process
    that ended with one, TrainingFailed otherwise.
    """
    from appo.training.run import Interrupted

    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder) / "job.json", recipe, tracking=tracking, **arguments)
        command = launch_command(
            recipe, job, processes=processes, machines=machines, rank=rank, address=address
        )
        last: collections.deque[str] = collections.deque(maxlen=LINES_OF_REASON)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_env()
        )
        previous = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last.append(line)
                # What follows a mistake is torchrun's report of it: thirty lines without the reason.
                if debugging() or not mistake(job):
                    print(line, end="", flush=True)
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)
        if said := mistake(job):  # first: the other processes were stopped for it, and may have saved
            raise UserError(said)
    if code == EXIT_INTERRUPTED or (Path(arguments["out"]) / "INTERRUPTED").exists():
        raise Interrupted(f"{arguments['out']}: stopped and saved; run again to continue")
    if code:
        raise TrainingFailed(f"training ended with status {code}:\n{''.join(last)}")


def mistake(job: Path) -> str:
    """The message of the expected mistake that a process of the job ended with; empty where none did."""
    found = sorted(job.parent.glob(MISTAKE.format(rank="*")), key=lambda path: path.stat().st_mtime_ns)
    return found[0].read_text(encoding="utf-8") if found else ""


def main(path: str) -> int:
    """One process of a launched training. Its expected mistakes are left beside the job, for its parent to say."""
    try:
        return _main(path)
    except Exception as error:
        found = expected(error)
        if found is None:
            raise
        write_atomic(Path(path).with_name(MISTAKE.format(rank=os.environ.get("RANK", "0"))), str(found))
        tell(error)  # for whoever started this without `launch`, which shows nothing of it
        return found.status


def _main(path: str) -> int:
    from appo.tracking import log_training
    from appo.training.run import Interrupted, train

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    recipe = parse_recipe(job.pop("recipe"))
    for name in ("manifest_path", "out"):
        job[name] = Path(job[name])
    marker = job["out"] / "INTERRUPTED"
    marker.unlink(missing_ok=True)
    tracking = job.pop("tracking", None)
    try:
        with _tracker(recipe, tracking, job) as tracker:
            train(recipe, tracker=tracker, **job)
            if tracking is not None and tracker is not None:
                log_training(
                    tracker,
                    job["out"],
                    manifest_path=job["manifest_path"],
                    manifest_digest=tracking["manifest_digest"],
                )
    except Interrupted as stopped:
        print(stopped, flush=True)
        marker.write_text(str(stopped), encoding="utf-8")
        return EXIT_INTERRUPTED
    return 0


def _tracker(recipe: Recipe, tracking: dict[str, str] | None, job: dict[str, Any]) -> Any:
    """The run in MLflow, in the first process of all; nothing elsewhere."""
    if tracking is None or os.environ.get("RANK", "0") != "0":
        return contextlib.nullcontext()
    from appo.tracking import start_training

    return start_training(
        recipe,
        Path(tracking["run_dir"]),
        algorithm=job["algorithm"],
        seed=job["seed"],
        model=tracking["model"],
        manifest_digest=tracking["manifest_digest"],
        journals=Path(tracking["journals"]),
    )


def _installed(package: str) -> bool:
    """Whether launched processes can import it; this one may have left it out (`appo.startup.leave_out`)."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _env() -> dict[str, str]:
    # Progress bars and log lines of the processes must arrive as they are written.
    return {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
