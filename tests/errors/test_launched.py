"""A mistake in a process that accelerate has started reaches whoever started them all, as its message alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from appo.config import load_recipe
from appo.training import launch

ROOT = Path(__file__).parents[2]
STEP = """
import sys
from pathlib import Path
from appo.config import load_recipe
from appo.errors import status_of
from appo.training.launch import launch

def main():
    place = Path(sys.argv[1])
    launch(load_recipe("demo"), processes=2, algorithm="appo", seed=0, manifest_path=place / "manifest.jsonl",
           model_path=str(place / "nowhere"), out=place / "out")

sys.exit(status_of(main))
"""


@pytest.mark.slow
def test_two_real_processes_end_in_one_line(files: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", STEP, str(files)],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"error: {files}/nowhere: no such folder")
    for words in ("Traceback", "ChildFailedError", "torch.distributed"):
        assert words not in ended.stdout + ended.stderr


def started(monkeypatch: pytest.MonkeyPatch, code: str, out: Path) -> None:
    """`launch` with a process of ours in place of accelerate's launcher; `code` is given the job's path."""
    monkeypatch.setattr(
        launch, "launch_command", lambda recipe, job, **_: [sys.executable, "-c", code, str(job)]
    )
    launch.launch(load_recipe("demo"), processes=2, algorithm="appo", seed=0, out=out)


NOISE = "print('step 1', flush=True)\n"
MISTAKE = "from pathlib import Path; Path(sys.argv[1]).with_name('mistake-1.txt').write_text('a=1: wrong')\n"
REPORT = "print('ChildFailedError: thirty lines', flush=True); sys.exit(1)\n"


def test_the_launchers_report_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("APPO_DEBUG", raising=False)
    code = f"import sys, time\n{NOISE}time.sleep(0.5)\n{MISTAKE}{REPORT}"
    # The other processes were told to stop, and have saved: the mistake is what counts.
    (tmp_path / "INTERRUPTED").touch()
    with pytest.raises(launch.UserError, match=r"^a=1: wrong$"):
        started(monkeypatch, code, tmp_path)
    assert capfd.readouterr().out == "step 1\n"
    monkeypatch.setenv("APPO_DEBUG", "1")
    with pytest.raises(launch.UserError):
        started(monkeypatch, code, tmp_path)
    assert "ChildFailedError" in capfd.readouterr().out


def test_a_defect_is_handed_over_with_its_last_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(launch.TrainingFailed, match=r"(?s)status 1.*step 1.*ChildFailedError"):
        started(monkeypatch, f"import sys\n{NOISE}{REPORT}", tmp_path)
