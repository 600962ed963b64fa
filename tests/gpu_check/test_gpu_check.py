"""`make gpu-check` without a GPU: its verdicts, its table and file, and that what it carries is all that it needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import bundle, needs, rows
from benchmarks.gpu_check.rows import Row
from tests.tiers import long

ROOT = Path(__file__).parents[2]


def good() -> object:
    row = Row("good")
    row.bounded("figure", 0.5, most=1.0)
    yield row


def bad() -> object:
    row = Row("bad")
    row.bounded("figure", float("nan"), most=1.0)
    row.bounded("other", 1.0, least=2.0)
    yield row


def broken() -> object:
    yield Row("first")
    raise ValueError("a kernel\nis missing")


def test_a_failing_row_gives_status_one_and_the_others_are_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"probe": broken, "packed": bad, "memory": good}
    monkeypatch.setattr(command, "checks", lambda device: made)
    out = tmp_path / "found.json"
    assert command.main(["--cpu", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert [(row["row"], row["passed"]) for row in found["rows"]] == [
        ("first", True),
        ("probe", False),
        ("bad", False),
        ("good", True),
    ]
    assert found["passed"] is False
    shown = capsys.readouterr().out
    assert re.search(r"\| probe \| FAILED: ValueError: a kernel is missing \(test_gpu_check.py:\d+\)", shown)
    assert "figure nan, at most 1 is allowed; other 1, at least 2 is asked for" in shown
    assert "2 of 4 rows passed" in shown
    monkeypatch.setattr(command, "checks", lambda device: {"probe": good})
    assert command.main(["--cpu", "--out", str(out)]) == 0


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err


def test_what_is_missing_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    lacking = {"peft", "trl"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else found(name))
    said = needs.missing()
    assert len(said) == 2
    assert said[0].startswith("peft: not installed for ")
    assert said[1].startswith(
        f"trl: neither installed nor carried for {needs.tag()}; `make gpu-check-bundle`"
    )


def test_a_carried_wheel_is_unpacked_once_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    folder = tmp_path / "wheels" / needs.tag()
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "appo_made_up-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("appo_made_up.py", "VALUE = 3\n")
    monkeypatch.setattr(needs, "CARRIED", {"appo_made_up": "appo_made_up"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert needs.reach_carried(tmp_path) == ["appo_made_up"]
    import appo_made_up

    assert appo_made_up.VALUE == 3
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [
        str(ROOT),
        str(tmp_path / f"site-{needs.tag()}"),
        "/elsewhere",
    ]
    assert needs.reach_carried(tmp_path) == []  # it is there now


def test_carried_packages_have_their_versions_in_the_lock() -> None:
    pinned = bundle.pinned()
    assert len(pinned) == len(needs.CARRIED)
    assert f"trl=={importlib.metadata.version('trl')}" in pinned


# Modules of distributions that a machine of this kind has, and of those that are carried; nothing else may be imported.
BLOCK = '''
import sys
ALLOWED = set({allowed!r})
KNOWN = set({known!r})
class Without:
    """A finder that does not find what is not on such a machine."""
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        return None if top in KNOWN and top not in ALLOWED else self.finder.find_spec(name, path, target)
from importlib.machinery import PathFinder
sys.meta_path[sys.meta_path.index(PathFinder)] = Without(PathFinder)
'''


def closure(names: list[str]) -> set[str]:
    """Distributions that these bring, by their metadata, extras left out."""
    found: set[str] = set()
    ahead = [name.lower().replace("_", "-") for name in names]
    while ahead:
        name = ahead.pop()
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in required:
            if "extra ==" not in text:
                ahead.append(re.match(r"[A-Za-z0-9_.-]+", text)[0].lower().replace("_", "-"))
    return found


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with torch, transformers, accelerate, peft, what these need, and what is carried."""
    present = closure(["torch", "transformers", "accelerate", "peft", "torchvision"])
    here = present | {name.replace("_", "-") for name in needs.CARRIED}
    known, allowed = set(), set()
    for module, distributions in importlib.metadata.packages_distributions().items():
        known.add(module)
        if any(name.lower().replace("_", "-") in here for name in distributions):
            allowed.add(module)
    allowed |= {"appo", "benchmarks", "appo_torchvision_on_cpu"}
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCK.format(allowed=sorted(allowed), known=sorted(known)))
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_what_is_carried_is_all_that_trainings_import(bare: dict[str, str]) -> None:
    code = """
from appo.startup import UNUSED_BY_TRAINING, heavy_imports
with heavy_imports(without=UNUSED_BY_TRAINING):
    import appo.training.run, appo.training.trainer, appo.training.perceiving, appo.training.records
    import appo.planning.plan, appo.modeling.loading, peft
    import benchmarks.cells, benchmarks.plan_memory, benchmarks.training_step
    import benchmarks.gpu_check.kernels, benchmarks.gpu_check.matrix, benchmarks.gpu_check.sizes
try:
    import decord
except ImportError:
    print("blocked")
"""
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "blocked" in done.stdout


@long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_row_has_a_number_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = subprocess.run(
        ["make", "-s", "gpu-check", f"ARGS=--cpu --out {out}", f"PYTHON={sys.executable}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    names = [row["row"] for row in found["rows"]]
    for start, count in (("probe", 2), ("packed", 2), ("memory", 3), ("step", 1), ("matrix", 17)):
        assert sum(name.startswith(start) for name in names) == count
    for row in found["rows"]:
        assert row["figures"]
        assert all(isinstance(value, float) for value in row["figures"].values())


def test_rows_are_timed_one_by_one() -> None:
    said: list[str] = []
    (row,) = rows.run("good", good, said.append)
    assert row.seconds < 1
    assert said[0] == "good ..."
