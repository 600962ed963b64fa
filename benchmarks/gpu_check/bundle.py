"""What `make gpu-check` carries to a machine without network: wheels for a Python, and sets that need a video decoder.

    python -m benchmarks.gpu_check.bundle [--python 3.11 3.12] [--out build/gpu-check]

Together with the sources it stays under 64 MiB for one Python. pyarrow is the smallest release that `datasets` takes:
TRL imports it, and nothing here reads a table.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.needs import BUNDLE, CARRIED, ROOT, SETS
from benchmarks.gpu_check.sizes import PLANNED

LIMIT_MIB = 64
SMALLER = {"pyarrow": "21.0.0"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check-bundle", description=__doc__)
    parser.add_argument("--python", nargs="+", default=["3.11"], choices=("3.11", "3.12"))
    parser.add_argument("--out", type=Path, default=BUNDLE)
    args = parser.parse_args(argv)
    for python in args.python:
        wheels(python, args.out / "wheels" / f"cp{python.replace('.', '')}")
    sets(args.out)
    over = 0
    for python in args.python:
        tag = f"cp{python.replace('.', '')}"
        carried = size_mib(args.out / "wheels" / tag) + (args.out / "sets.tar.gz").stat().st_size / 2**20
        total = carried + sources_mib()
        over += total > LIMIT_MIB
        print(
            f"{args.out} for {tag}: {carried:.1f} MiB, {total:.1f} MiB with the sources (at most {LIMIT_MIB})"
        )
    return 1 if over else 0


def pinned() -> list[str]:
    """NAME==VERSION of every carried package, as the lock file has it."""
    lock = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    versions = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s+;]+)", lock, re.MULTILINE))
    known = {name.replace("-", "_").lower(): version for name, version in versions.items()}
    return [f"{name}=={SMALLER.get(name, known[name])}" for name in CARRIED]


def wheels(python: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    abi = f"cp{python.replace('.', '')}"
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for name in (abi, "abi3", "none"):
        command += ["--abi", name]
    for platform in (
        "manylinux_2_28_x86_64",
        "manylinux_2_24_x86_64",
        "manylinux_2_17_x86_64",
        "manylinux2014_x86_64",
    ):
        command += ["--platform", platform]
    subprocess.run([*command, "--dest", str(out), *pinned()], check=True)


def sets(out: Path) -> None:
    """The matrix's small set and model, and the frames of `benchmarks.plan_memory`, in one archive."""
    from appo.config import load_recipe
    from appo.data.assemble import assemble
    from benchmarks.cells import OVERRIDES
    from benchmarks.plan_memory import CASES

    shutil.rmtree(out / SETS.name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {"small_set": OVERRIDES} | {
            f"plan-{CASES[n].size}": CASES[n].overrides for n in PLANNED["cuda"]
        }
        for which, overrides in made.items():
            # JPEG, which is smaller than the demo's PNG: no check looks at what the frames show.
            recipe = load_recipe("demo", [*overrides, "data.encoding=jpeg", "data.jpeg_quality=20"])
            assemble(recipe, folder / which, progress=False)
        for videos in folder.glob("**/key_moment"):
            shutil.rmtree(videos)  # frames are decoded, and all that is read
        with tarfile.open(out / "sets.tar.gz", "w:gz") as archive:
            archive.add(folder, SETS.name)


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def sources_mib() -> float:
    """Of the files that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return (
        sum((ROOT / name).stat().st_size for name in listed.splitlines() if (ROOT / name).is_file()) / 2**20
    )


if __name__ == "__main__":
    sys.exit(main())
