"""What the check needs beside Python, what of it may travel as wheels, and what is missing, in one line each.

torch, transformers, accelerate and peft are the machine's own. TRL and what it needs, and what appo imports, are taken
from there as well; where one is missing or too old, a wheel from a folder stands in for it, unpacked for the time of the
run. Nothing is installed. Standard library only: this runs before there is anything else.
"""

from __future__ import annotations

import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email import message_from_string
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "build" / "gpu-check"
PYTHONS = ((3, 11), (3, 12))
TORCH = ("2.11", "2.12", "2.13")
# Whoever has a GPU has these, with what they need themselves.
OF_THE_MACHINE = ("torch", "transformers", "accelerate", "peft")
# Of pyproject.toml's, what the check imports; with their own needs they make up `CARRIED`.
OF_OURS = ("numpy", "pydantic", "pyyaml", "rich", "pillow", "torchvision", "trl", "datasets", "pyarrow")
CARRIED = (
    *(
        "trl",
        "datasets",
        "pyarrow",
        "pandas",
        "python-dateutil",
        "six",
        "dill",
        "multiprocess",
        "xxhash",
    ),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("rich", "markdown-it-py", "mdurl", "pygments", "pillow", "torchvision"),
)
# What nothing here uses, by far the larger part. torchvision's compiled operators would fit one torch alone.
LEFT_OUT = {
    "torchvision": ("torchvision/*.so", "torchvision.libs/*"),
    "pyarrow": ("pyarrow/include/*", "pyarrow/tests/*", "pyarrow/*flight*"),
    "pandas": ("pandas/tests/*",),
}


@dataclass(slots=True)
class Found:
    """wheels: to unpack. problems: one line each, with the remedy. notes: what is another than what was tested."""

    wheels: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look(folder: Path = WHEELS, *, path: Sequence[str] | None = None) -> Found:
    """What this interpreter has (path: where to look, `sys.path` by default), and what the folder makes up for."""
    found = Found()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info[:2] < PYTHONS[0]:
        found.problems.append(f"Python {version}: appo needs 3.11 or newer; name another with PYTHON=...")
        return found
    if sys.version_info[:2] not in PYTHONS:
        found.notes.append(f"Python {version}: tested are {', '.join(f'{a}.{b}' for a, b in PYTHONS)}")
    installed = {
        _name(d.metadata["Name"]): d for d in distributions(path=list(sys.path if path is None else path))
    }
    try:
        from packaging.requirements import Requirement
    except ImportError:  # every one of the machine's four brings it
        found.problems += [_remedy(name) for name in OF_THE_MACHINE if name not in installed]
        found.problems.append("packaging: is not installed; it comes with transformers")
        return found
    ranges = _ranges()
    for name in OF_THE_MACHINE:
        if name not in installed:
            found.problems.append(_remedy(name))
        elif not _fits(installed[name].version, wanted := ranges[name]):
            found.problems.append(
                f"{name} {installed[name].version}: appo needs {wanted}; pip install '{wanted}'"
            )
    if "torch" in installed and not installed["torch"].version.startswith(TORCH):
        found.notes.append(f"torch {installed['torch'].version}: tested are {', '.join(TORCH)}")
    carried = dict(_usable(folder))
    waiting: list[tuple[Any, str]] = [(ranges[name], "appo") for name in OF_OURS]
    settled: set[str] = set(OF_THE_MACHINE)
    while waiting:
        wanted, asked_by = waiting.pop(0)
        name = _name(wanted.name)
        if name in settled or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        have = installed[name].version if name in installed else None
        if have is not None and _fits(have, wanted):
            continue
        settled.add(name)
        if name in carried and _fits(_version(carried[name]), wanted):
            found.wheels.append(carried[name])
            waiting += [(Requirement(line), name) for line in _needs(carried[name])]
        elif asked_by != "appo" and (have is not None or name not in CARRIED):
            # A library's own ranges are of what it was tested with; the lock leaves out what nothing here uses.
            what = f"{name} is not installed" if have is None else f"{name} {have}"
            found.notes.append(f"{what}: {asked_by} asks for {wanted.name}{wanted.specifier}")
        else:
            found.problems.append(_missing(name, have, wanted, asked_by, version, folder))
    return found


def _missing(name: str, have: str | None, wanted: Any, asked_by: str, version: str, folder: Path) -> str:
    asked = f"{asked_by} needs {wanted.name}{wanted.specifier}"
    what = f"is not installed ({asked})" if have is None else asked
    remedy = (
        f'`make gpu-check-bundle ARGS="--python {version}"` where there is a network, and bring {_told(folder)} along'
        if name in CARRIED
        else f"pip install '{wanted.name}{wanted.specifier}'"
    )
    return f"{name if have is None else f'{name} {have}'}: {what}, and no wheel of it lies here; {remedy}"


def unpack(wheels: Sequence[Path], folder: Path) -> None:
    """Lay the wheels out side by side, ready for a path of imports."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in needed(wheel, archive):
                archive.extract(member, folder)
            for data in {m.split("/")[0] for m in archive.namelist() if m.split("/")[0].endswith(".data")}:
                for kind in ("purelib", "platlib"):
                    for entry in (folder / data / kind).glob("*"):
                        entry.rename(folder / entry.name)


def prepare(folder: Path) -> None:
    """Let torchvision be imported from the folder, which has none of its compiled operators.

    Its Python code wants two of them declared; on CPUs the environment does so (requirements/cpu_shims.py), here every
    process that has the folder on its path, whatever torch is built for.
    """
    from requirements.cpu_shims import HOOK

    only_on_cpus = "torch.version.cuda is None and torch.version.hip is None"
    assert only_on_cpus in HOOK, "the hook of requirements/cpu_shims.py has changed"
    if (folder / "torchvision").exists():
        (folder / "sitecustomize.py").write_text(HOOK.replace(only_on_cpus, "True"), encoding="utf-8")


def needed(wheel: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members of a wheel that are imported here."""
    left = LEFT_OUT.get(_name(wheel.name.split("-")[0]), ())
    return [m for m in archive.infolist() if not any(fnmatch(m.filename, pattern) for pattern in left)]


def _remedy(name: str) -> str:
    return f"{name}: is not installed in {sys.executable}; pip install {name}, or name another Python with PYTHON=..."


def _ranges() -> dict[str, Any]:
    """Package -> what pyproject.toml asks of it."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["train"], *extras["data"]]
    return {_name((found := Requirement(line)).name): found for line in lines}


def _fits(version: str, wanted: Any) -> bool:
    """A torch of another index has a local version (2.13.0+cpu), which is the same release."""
    return bool(wanted.specifier.contains(version.partition("+")[0], prereleases=True))


def _usable(folder: Path) -> Iterator[tuple[str, Path]]:
    """Wheels in the folder that this interpreter can import."""
    from packaging.tags import sys_tags
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    here = set(sys_tags())
    for wheel in sorted(folder.glob("*.whl")):
        try:
            name, _, _, tags = parse_wheel_filename(wheel.name)
        except InvalidWheelFilename:
            continue
        if tags & here:
            yield name, wheel


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def _needs(wheel: Path) -> list[str]:
    """The packages that a wheel needs, as its metadata names them."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(m for m in archive.namelist() if m.endswith(".dist-info/METADATA"))
        text = archive.read(member).decode("utf-8")
    return message_from_string(text).get_all("Requires-Dist") or []


def _name(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _told(folder: Path) -> str:
    return str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else str(folder)
