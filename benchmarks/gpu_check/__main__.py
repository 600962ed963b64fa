"""`make gpu-check [ARGS="--cpu ..."]`, or `python -m benchmarks.gpu_check`: every row, one JSON file, one table.

Status 0 where every row keeps its bounds, 1 where one does not, 2 where it cannot start: packages that are missing, no
GPU. Reads packages and starts processes; what is measured stands in the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import packages, schedule
from benchmarks.gpu_check.parts import PARTS, Part
from benchmarks.gpu_check.rows import Report, Row

OUT = packages.ROOT / "build" / "gpu-check.json"
# Under nine minutes on a GPU, whatever happens; a CPU that does other work besides may take its time.
BUDGET_S = {"cuda": 525.0, "cpu": 1800.0}
TOLD = ("torch", "torchvision", "transformers", "trl", "accelerate", "peft", "datasets", "pyarrow", "numpy")
# Asked of a process that then ends: a CUDA context left open would take memory from what is measured.
FACTS = """
import json, torch, torchvision
gpu = torch.cuda.is_available()
found = {"gpu": gpu}
if gpu:
    card = torch.cuda.get_device_properties(0)
    found |= {"name": card.name, "memory_gib": round(card.total_memory / 2**30, 1),
              "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda,
              "cudnn": torch.backends.cudnn.version()}
print(json.dumps(found))
"""


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    args = _parser().parse_args(argv)
    found = packages.look(args.wheels)
    if found.problems:
        print(f"error: {sys.executable} lacks what the check needs", file=sys.stderr)
        print("\n".join(found.problems), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        # dill, by which datasets names its tables, takes modules for somebody's own code where no folder above them has
        # this name, and pickles them whole.
        site = Path(folder) / "site-packages"
        carried = site / "carried"
        packages.unpack(found.wheels, carried)
        packages.prepare(carried)
        sys.path.insert(0, str(carried))
        env = _environment(site, carried, cpu=args.cpu)
        facts = {"gpu": False} if args.cpu else _facts(env)
        if isinstance(facts, str):
            print(facts, file=sys.stderr)
            return 2
        if not args.cpu and not facts["gpu"]:
            print(
                "error: torch sees no GPU (torch.cuda.is_available() is False); start it where there is one and torch "
                "is built for CUDA, or check the CPU's way with ARGS=--cpu",
                file=sys.stderr,
            )
            return 2
        return _check(args, found, env, facts, Path(folder), began)


def _check(
    args: argparse.Namespace, found: packages.Found, env: dict[str, str], facts: dict[str, Any], folder: Path,
    began: float,
) -> int:  # fmt: skip
    device, cores = "cpu" if args.cpu else "cuda", os.cpu_count() or 2
    threads = max(1, cores // 2) if args.cpu else max(1, min(8, cores // 3))
    env["OMP_NUM_THREADS"] = str(threads)
    parts = [Part(module) for module in args.parts] if args.parts else PARTS

    def wanted(name: str) -> bool:
        return not args.only or any(fnmatch(name, pattern) for pattern in args.only)

    jobs = schedule.jobs_of(parts, device, folder, threads, wanted)
    total = sum(len(job.waiting) for job in jobs)
    if not total:
        print(f"error: --only {' '.join(args.only)}: no row has such a name", file=sys.stderr)
        return 2
    report = _report(device, facts, found)
    for line in (*report.notes, *report.replaced):
        print(f"note: {line}")
    print(f"{total} rows on {facts.get('name', 'this CPU')}, {cores} cores", flush=True)
    ended = 0

    def tell(row: Row) -> None:
        nonlocal ended
        ended += 1
        mark = "ok    " if row.passed else "FAILED"
        print(f"[{time.monotonic() - began:4.0f} s] {ended:2d}/{total} {mark} {row.name}: {row}", flush=True)

    def alive(names: list[str]) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] under way: {', '.join(names) or 'loading'}", flush=True)

    budget = BUDGET_S[device] if args.budget_s is None else args.budget_s
    report.rows = schedule.run(jobs, env, cores=cores, until=began + budget, tell=tell, alive=alive)
    report.seconds = time.monotonic() - began
    report.write(args.out)
    failures = sum(not row.passed for row in report.rows)
    print(f"\n{report.table()}\n")
    print(
        f"{total - failures} of {total} rows keep their bounds; {report.seconds:.0f} s; "
        f"{args.out.relative_to(packages.ROOT) if args.out.is_relative_to(packages.ROOT) else args.out}"
    )
    return 0 if report.passed else 1


def _report(device: str, facts: dict[str, Any], found: packages.Found) -> Report:
    from benchmarks.gpu_check.small_set import REPLACED

    installed = {packages._name(d.metadata["Name"]): d.version for d in reversed(list(distributions()))}
    machine = {key: value for key, value in facts.items() if key != "gpu"}
    machine["python"] = sys.version.split()[0]
    machine |= {name: installed[name] for name in TOLD if name in installed}
    machine["cores"], machine["date"] = os.cpu_count(), time.strftime("%Y-%m-%d", time.gmtime())
    carried = [wheel.name.split("-")[0] for wheel in found.wheels]
    notes = [*found.notes, *([f"carried as wheels: {', '.join(carried)}"] if carried else [])]
    if device == "cuda":
        notes.append(
            "cuDNN's attention is switched off in comparisons, so that FlashAttention's kernels are compared"
        )
    else:
        notes.append("no GPU is used: small shapes, this CPU's kernels, nothing here says what a GPU does")
    replaced = [
        REPLACED,
        "rollouts of the matrix: fixed completions and rewards, but for one real draw of each training",
        "weights: random, of the architectures named",
    ]
    return Report(device, machine, replaced, notes)


def _environment(site: Path, carried: Path, *, cpu: bool) -> dict[str, str]:
    """Of every process: this repository, carried packages first, no hub, one GPU at most."""
    before = [
        _linked(Path(place), site) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place
    ]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(carried), str(packages.ROOT), *before]),
        "CUDA_VISIBLE_DEVICES": "" if cpu else seen,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _linked(place: Path, site: Path) -> str:
    """A folder of packages (`pip install --target`) by a name below `site`; this repository keeps its own."""
    if place.resolve() == packages.ROOT or not place.is_dir():
        return str(place)
    site.mkdir(exist_ok=True)
    link = site / f"{len(list(site.iterdir()))}-{place.name}"
    link.symlink_to(place.resolve(), target_is_directory=True)
    return str(link)


def _facts(env: dict[str, str]) -> dict[str, Any] | str:
    """What torch says about the machine; a line for the user where it does not start."""
    done = subprocess.run([sys.executable, "-c", FACTS], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        said = f"torch, or torchvision beside it, does not start in {sys.executable}: {lines[-1]}"
        return f"error: {said}; install builds that match"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="every row on small shapes, without a GPU")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file (default: build/gpu-check.json)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="rows by name, e.g. 'probe*'"
    )
    parser.add_argument("--wheels", type=Path, default=packages.WHEELS, help="folder of carried wheels")
    parser.add_argument("--budget-s", type=float, help="seconds after which what still runs is a failed row")
    parser.add_argument("--parts", nargs="+", default=[], metavar="MODULE", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
