"""`make gpu-check`: what it prints, writes and returns, whatever its rows do, and where packages are missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu_check import bundle, packages
from benchmarks.gpu_check.parts import PARTS, Place
from benchmarks.gpu_check.rows import Measure, Row
from tests.gpu_check import machine
from tests.gpu_check import stand_in as s

STAND_IN = ("--cpu", "--parts", "tests.gpu_check.stand_in")


@pytest.fixture(scope="module")
def every_end(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict]:
    out = tmp_path_factory.mktemp("ends") / "found.json"
    done = machine.check(sys.executable, *STAND_IN, "--budget-s", "10", "--out", str(out))
    return done, json.loads(out.read_text())


def test_every_row_is_told_whatever_became_of_the_others(every_end):
    done, found = every_end
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == s.rows(Place("cpu", "", 1))
    assert [row["name"] for row in found["rows"] if row["passed"]] == [s.GOOD, s.AFTER]
    assert rows[s.OUTSIDE]["value"] == 2.0
    assert rows[s.OUTSIDE]["bound"] == 1.0
    assert rows[s.NOT_A_NUMBER]["value"] == "nan"
    assert rows[s.RAISES]["reason"] == "ValueError: boom and more"
    assert rows[s.DIES]["reason"] == "its process ended with status 9: the last words"
    assert rows[s.HANGS]["reason"].startswith("not done within")
    assert done.returncode == 1
    assert not found["passed"]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({len(line) for line in table}) == 1  # one table, its columns aligned
    for name, row in rows.items():
        (line,) = (line for line in table if line.startswith(f"| {name} "))
        assert ("FAILED" in line) == (not row["passed"])
        assert not row["reason"] or row["reason"] in line


def test_good_rows_end_with_status_0(tmp_path: Path):
    out = tmp_path / "found.json"
    done = machine.check(sys.executable, *STAND_IN, "--only", s.GOOD, s.AFTER, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["passed"]
    assert found["device"] == "cpu"
    assert found["machine"]["torch"]
    assert found["replaced"]


def test_a_make_target_runs_the_python_it_is_given():
    """PYTHON and ARGS reach the command, and its failure is make's."""
    command = [
        "make",
        "-s",
        "gpu-check",
        f"PYTHON={sys.executable}",
        f"ARGS={' '.join(STAND_IN)} --only nothing",
    ]
    done = subprocess.run(command, cwd=packages.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "--only nothing: no row has such a name" in done.stderr
    done = subprocess.run(
        ["make", "-s", "gpu-check", "PYTHON=/no/python"],
        cwd=packages.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "/no/python" in done.stderr
    assert "PYTHON=" in done.stderr


def test_names_of_rows_are_unique_and_told_before_anything_runs():
    from importlib import import_module

    for device in ("cpu", "cuda"):
        names = [n for part in PARTS for n in import_module(part.module).rows(Place(device, "", 1))]
        assert len(names) == len(set(names))
        assert sum(name.startswith("matrix: ") for name in names) == 17
        for kind in ("probe against eager", "packed against plain", "step: ", "memory against the plan"):
            assert any(name.startswith(kind) for name in names), kind


def test_a_measure_keeps_its_bound_or_does_not():
    assert Measure("m", 1.0, 1.0).passed
    assert not Measure("m", 1.1, 1.0).passed
    assert Measure("m", 1.1, 1.0, at_most=False).passed
    assert not Measure("m", float("nan"), 1.0, at_most=False).passed
    assert not Row("r").passed  # no number
    row = Row("r", (Measure("m", float("inf"), 1.0), Measure("n", 2.0, unit=" s")), 1.0)
    assert Row.from_json(json.loads(json.dumps(row.to_json()))).to_json() == row.to_json()


# What travels ---------------------------------------------------------------------------------------------------------


def test_a_bare_python_is_told_what_it_lacks_one_line_each(tmp_path: Path):
    done = machine.check(machine.make(tmp_path / "bare", set()))
    assert done.returncode == 2
    first, *lines = done.stderr.splitlines()
    assert first.startswith("error: ")
    for name in packages.OF_THE_MACHINE:
        (line,) = (line for line in lines if line.startswith(f"{name}: "))
        assert f"pip install {name}" in line
    assert "Traceback" not in done.stderr


def test_a_gpu_machine_without_wheels_is_told_how_to_get_them(tmp_path: Path):
    python = machine.make(tmp_path / "machine", machine.of_the_machine())
    done = machine.check(python, "--wheels", str(tmp_path / "none"))
    assert done.returncode == 2
    _, *lines = done.stderr.splitlines()
    missing = {line.partition(":")[0] for line in lines}
    assert missing == {name for name in packages.OF_OURS if name in packages.CARRIED}
    assert all('make gpu-check-bundle ARGS="--python 3.' in line for line in lines)


def wheel(folder: Path, name: str, version: str, *needs: str, tags: str = "py3-none-any") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"VERSION = {version!r}\n")
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


def test_only_what_is_missing_or_too_old_is_taken(tmp_path: Path):
    """trl is there but too old; rich is there; dill is needed by what is taken; xxhash is for another Python."""
    have, carried = tmp_path / "site", tmp_path / "wheels"
    have.mkdir()
    versions = {**dict.fromkeys((*packages.OF_THE_MACHINE, *packages.OF_OURS), "99"), "trl": "1.0"}
    versions |= {"torch": "2.12.1", "transformers": "5.17.0", "psutil": "1.0"}
    for name, version in versions.items():
        info = have / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    wheel(carried, "rich", "13.0")
    wheel(carried, "trl", "1.16.0", "dill", "xxhash", "psutil>=5", "torch; extra == 'more'")
    wheel(carried, "dill", "0.4")
    wheel(carried, "xxhash", "4.0", tags="cp39-cp39-manylinux_2_17_x86_64")
    found = packages.look(carried, path=[str(have)])
    assert [w.name.split("-")[0] for w in found.wheels] == ["trl", "dill"]
    (problem,) = found.problems
    assert problem.startswith("xxhash: is not installed (trl needs xxhash)")
    assert found.notes == ["psutil 1.0: trl asks for psutil>=5"]
    packages.unpack(found.wheels, tmp_path / "unpacked")
    assert {p.name for p in (tmp_path / "unpacked").iterdir() if "." not in p.name} == {"trl", "dill"}


def test_a_package_that_appo_cannot_use_is_named_with_the_range(tmp_path: Path):
    info = tmp_path / "transformers-5.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: transformers\nVersion: 5.2.0\n")
    found = packages.look(tmp_path / "none", path=[str(tmp_path)])
    (line,) = (line for line in found.problems if line.startswith("transformers"))
    assert line.startswith("transformers 5.2.0: appo needs transformers<5.20,>=5.10")


def test_what_travels_is_locked_and_its_size_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert len(bundle.locked()) == len(packages.CARRIED)
    assert 1 << 20 < bundle.size_of_sources() < 16 << 20
    big = tmp_path / "big.whl"
    big.write_bytes(b"")
    assert bundle.check_size(tmp_path) == 0
    os.truncate(big, bundle.LIMIT_BYTES - bundle.size_of_sources() + 1)
    assert bundle.check_size(tmp_path) == 1
    assert "above 64 MiB" in capsys.readouterr().out


def test_a_wheel_packed_again_holds_what_is_imported(tmp_path: Path):
    path = tmp_path / "pyarrow-25.0.1-py3-none-any.whl"
    members = {
        "pyarrow/__init__.py": "x = 1\n" * 400_000,
        "pyarrow/tests/test_it.py": "y",
        "pyarrow/_flight.so": "z",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    before = path.stat().st_size
    bundle.pack_again(path)
    assert path.stat().st_size < before / 100
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["pyarrow/__init__.py"]
        assert archive.read("pyarrow/__init__.py").decode() == members["pyarrow/__init__.py"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_stopped_check_started_ends_with_it(tmp_path: Path):
    """Ctrl-C: the processes of parts are in sessions of their own, which no terminal reaches."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", *STAND_IN, "--only", s.HANGS]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=packages.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    results = None
    while results is None or "began" not in results.read_text():
        results = next(tmp_path.glob("gpu-check-*/stand_in/results.jsonl"), None)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert not left
