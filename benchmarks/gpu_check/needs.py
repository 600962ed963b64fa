"""Which packages the check needs, which of them are carried beside the sources, and which are missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Made by `make gpu-check-bundle`, ignored by git: wheels, and the small sets that need a video decoder to make.
BUNDLE = ROOT / "build" / "gpu-check"
SETS = BUNDLE / "sets"
PYTHONS = ((3, 11), (3, 12))
TORCH = ((2, 11), (2, 13))
# A machine that trains has these; nothing here installs them.
PRESENT = ("torch", "transformers", "accelerate", "peft", "yaml")
# Distribution -> the module that shows it is there. Carried as wheels where the machine lacks them: TRL, what it
# imports, and what recipes are read with.
CARRIED = {
    "trl": "trl",
    "datasets": "datasets",
    "pyarrow": "pyarrow",
    "pandas": "pandas",
    "dill": "dill",
    "multiprocess": "multiprocess",
    "xxhash": "xxhash",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic_core",
    "annotated_types": "annotated_types",
    "typing_inspection": "typing_inspection",
    "python_dateutil": "dateutil",
    "six": "six",
}


def tag() -> str:
    """This Python's name in wheels, as "cp311"."""
    return f"cp{sys.version_info.major}{sys.version_info.minor}"


def reach_carried(bundle: Path = BUNDLE) -> list[str]:
    """Unpack the carried wheels of packages that are not here, and put them on the path, for child processes too.

    Returns the names of those that were taken from the bundle. Nothing is installed.
    """
    lacking = [name for name, module in CARRIED.items() if importlib.util.find_spec(module) is None]
    site, taken = bundle / f"site-{tag()}", []
    for name in lacking:
        wheels = sorted((bundle / "wheels" / tag()).glob(f"{name}-*.whl"))
        if not wheels:
            continue
        if not (site / f"{wheels[0].stem}.unpacked").exists():
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(site)
            (site / f"{wheels[0].stem}.unpacked").touch()
        taken.append(name)
    if taken:
        sys.path.append(str(site))
        importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *([str(site)] if taken else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return taken


def unpack_sets(bundle: Path = BUNDLE) -> None:
    """The small sets, where they are carried; elsewhere each check makes its own."""
    packed = bundle / "sets.tar.gz"
    if packed.exists() and not (bundle / SETS.name).exists():
        with tempfile.TemporaryDirectory(dir=bundle) as folder:
            with tarfile.open(packed) as archive:
                archive.extractall(folder, filter="data")
            (Path(folder) / SETS.name).rename(bundle / SETS.name)


def missing() -> list[str]:
    """One line for each thing that is not here, with the remedy."""
    found = []
    if sys.version_info[:2] not in PYTHONS:
        found.append(
            f"Python {sys.version_info.major}.{sys.version_info.minor}: run it with 3.11 or 3.12 (PYTHON=...)"
        )
    found += [
        f"{module}: not installed for {sys.executable}; install it, or name another Python (PYTHON=...)"
        for module in PRESENT
        if importlib.util.find_spec(module) is None
    ]
    found += [
        f"{name}: neither installed nor carried for {tag()}; `make gpu-check-bundle` on a machine with the environment "
        "makes build/gpu-check, to be copied here"
        for name, module in CARRIED.items()
        if importlib.util.find_spec(module) is None
    ]
    if importlib.util.find_spec("torch") is not None:
        version = importlib.metadata.version("torch")
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if not TORCH[0] <= numbers <= TORCH[1]:
            found.append(f"torch {version}: 2.11 to 2.13 are checked; take one of them")
    return found
