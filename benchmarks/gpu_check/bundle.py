"""Fetches what a GPU machine may lack as wheels into one folder: `make gpu-check-bundle [ARGS="--python 3.12"]`.

The versions are those of requirements/cuda.lock. Large wheels are packed again, without what nothing here imports and
with a stronger compression, which pip and Python's zipfile read as well: folder and sources together must stay below
what a machine may be handed.

    python -m benchmarks.gpu_check.bundle [--python 3.12] [--out build/gpu-check]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.packages import CARRIED, ROOT, WHEELS, _name, needed

LIMIT_BYTES = 64 * 2**20  # of the folder and the sources
LOCK = ROOT / "requirements" / "cuda.lock"
# As far back as glibc 2.17: what the locked wheels are built for.
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64")
WORTH_PACKING_BYTES = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check-bundle", description=__doc__)
    parser.add_argument("--python", default="3.12", choices=("3.11", "3.12"), help="of the machine")
    parser.add_argument("--out", type=Path, default=WHEELS)
    args = parser.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)  # of another Python
    args.out.mkdir(parents=True)
    status = download(args.python, args.out)
    if status:
        return status
    for wheel in sorted(args.out.glob("*.whl")):
        pack_again(wheel)
    print(f"{args.out}: {len(list(args.out.glob('*.whl')))} wheels for Python {args.python}")
    return check_size(args.out)


def download(python: str, out: Path) -> int:
    """pip's own status."""
    chosen = locked()
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    print(f"fetching {len(chosen)} wheels for Python {python}", flush=True)
    return subprocess.run([*command, "--dest", str(out), *chosen], check=False).returncode


def locked() -> list[str]:
    """`CARRIED` as `name==version`. Raises KeyError for a package that the lock does not name."""
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line]
    versions = {_name(line.split("==")[0]): line for line in lines}
    return [versions[name] for name in CARRIED]


def pack_again(wheel: Path) -> None:
    """The members that are imported, compressed by LZMA, where that makes the file smaller."""
    if wheel.stat().st_size < WORTH_PACKING_BYTES:
        return
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as new:
        for member in needed(wheel, old):
            new.writestr(member, old.read(member), zipfile.ZIP_LZMA)
    if smaller.stat().st_size < wheel.stat().st_size:
        smaller.replace(wheel)
    else:
        smaller.unlink()


def check_size(folder: Path) -> int:
    """Tells what travels; 1 where it is too much."""
    wheels, sources = size_of_wheels(folder), size_of_sources()
    told = f"wheels {wheels / 2**20:.1f} MiB and sources {sources / 2**20:.1f} MiB"
    if wheels + sources <= LIMIT_BYTES:
        print(f"{told}: below {LIMIT_BYTES / 2**20:.0f} MiB")
        return 0
    print(
        f"error: {told}: above {LIMIT_BYTES / 2**20:.0f} MiB; carry less (CARRIED in benchmarks/gpu_check/packages.py)"
    )
    return 1


def size_of_wheels(folder: Path) -> int:
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def size_of_sources() -> int:
    """Bytes of the files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = (ROOT / name for name in listed.decode().split("\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
