"""A Python as on a GPU machine: torch, transformers, accelerate and peft with what they need, and nothing else.

An environment without packages of its own, whose site-packages are links to those of the environment that the tests run
in. So what is imported beyond the list fails there as it would on the machine; the versions, and the absence of a GPU,
are this machine's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.gpu_check.bundle import pack_again
from benchmarks.gpu_check.packages import CARRIED, OF_THE_MACHINE, ROOT, _name


def of_the_machine() -> set[str]:
    """The four and what they need, but for what is carried."""
    found: set[str] = set()
    waiting = list(OF_THE_MACHINE)
    while waiting:
        name = waiting.pop()
        if name in found or name in CARRIED:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # of another system, or left out of the lock
            continue
        found.add(name)
        wanted = [Requirement(line) for line in needs]
        waiting += [_name(w.name) for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    return found


def make(folder: Path, packages: set[str]) -> Path:
    """The environment's Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in packages:
        for top in _tops(distribution(name)):
            link = site / top.name
            if not link.exists():
                link.symlink_to(top)
    if (
        "torchvision" in packages
    ):  # built for another torch than this environment's: see requirements/cpu_shims.py
        ours = Path(sysconfig.get_path("purelib"))
        for shim in ours.glob("appo_torchvision_on_cpu.*"):
            (site / shim.name).symlink_to(shim)
    return folder / "bin" / "python"


def _tops(found: Distribution) -> set[Path]:
    """Files and folders of a distribution right below site-packages."""
    names = {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}
    return {Path(str(found.locate_file(name))).absolute() for name in names}


def wheel_of(name: str, folder: Path) -> Path:
    """The installed package as a wheel again, packed as those that travel."""
    found = distribution(name)
    tags = [
        line.split(": ")[1]
        for line in (found.read_text("WHEEL") or "").splitlines()
        if line.startswith("Tag")
    ]
    # py2-none-any and py3-none-any are one name, py2.py3-none-any.
    python, abi, platform = (
        ".".join(dict.fromkeys(part)) for part in zip(*(tag.split("-") for tag in tags), strict=True)
    )
    title = found.metadata["Name"].replace("-", "_")
    wheel = folder / f"{title}-{found.version.partition('+')[0]}-{python}-{abi}-{platform}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in found.files or []:
            if file.parts[0] != ".." and "__pycache__" not in file.parts:
                archive.write(str(found.locate_file(file)), str(file))
    pack_again(wheel)
    return wheel


def check(python: Path | str, *args: str, timeout_s: int = 280) -> subprocess.CompletedProcess[str]:
    """Run the command with a Python, as make does."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")
    }
    return subprocess.run(
        [str(python), "-m", "benchmarks.gpu_check", *args],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=timeout_s,
    )  # fmt: skip
