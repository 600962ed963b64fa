"""How processes end: a mistake in its lines with status 2, a defect of ours with its traceback and status 1."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from appo import cli_ending, errors
from appo.config import RecipeError
from appo.errors import UserError, expected, first_lines, one_line, said_in, shown
from appo.folders import FolderMissing
from appo.storage import StorageError, StoreError
from tests.errors.conftest import answer, is_a_mistake

ROOT = Path(__file__).parents[2]
APPO = [sys.executable, "-m", "appo.cli"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != errors.DEBUG}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


# Lines ------------------------------------------------------------------------------------------------------------


def test_at_most_six_lines_and_how_many_are_left_out() -> None:
    assert first_lines(["a", "", "b"]) == ["a", "b"]
    assert first_lines(list("abcdef")) == list("abcdef")
    assert first_lines(list("abcdefgh")) == [*"abcde", "and 3 more"]
    assert shown(RecipeError("\n".join("abcdefgh"))).splitlines()[0] == "error: a"
    assert shown(UserError("")) == "error: UserError"


def test_a_line_that_nobody_reads_to_its_end_loses_its_middle() -> None:
    long = "start " + "x" * 5000 + " remedy"
    (line,) = first_lines([long])
    assert len(line) <= errors.LINE_CHARS
    assert line.startswith("start ")
    assert line.endswith(" remedy")
    assert one_line("a\n\n  b") == "a b"
    assert one_line(KeyError()) == "KeyError"


def test_a_childs_lines_are_found_at_the_end_of_its_output() -> None:
    assert said_in(["noise", "error: one", "two"]) == ["error: one", "two"]
    assert said_in(["error: before", "Traceback (most recent call last):", "ValueError: x"]) == []
    assert said_in(["Traceback (most recent call last):", "x.y: one", "error: one"]) == ["error: one"]
    assert said_in(["nothing"]) == []


def test_errors_cross_processes() -> None:
    """Workers send theirs back by pickle, also those that are of two kinds."""
    for error in (StorageError("a: b"), RecipeError("x"), FolderMissing("c")):
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        assert isinstance(again, UserError)
    assert isinstance(StoreError("x"), OSError)
    assert isinstance(RecipeError("x"), ValueError)


# What is expected -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "denied", "/a/b"), "/a/b: permission denied"),
        (OSError(errno.ENOSPC, "full", "/a/b"), "/a/b: no space is left"),
        (OSError(errno.EROFS, "ro", b"/a"), "/a: lies on a file system that is read-only"),
        (ModuleNotFoundError("No module named 'vllm.x'", name="vllm.x"), "pip install 'appo[eval]'"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'appo[train]'"),
    ],
)
def test_what_the_machine_refuses_is_expected(error: Exception, said: str) -> None:
    found = expected(error)
    assert found is not None
    assert said in str(found)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a defect"),
        FileNotFoundError(errno.ENOENT, "none", "/a"),  # which file is meant to be there is ours to know
        OSError("no number"),
        PermissionError(errno.EACCES, "denied"),  # of what?
        ModuleNotFoundError("No module named 'appo.x'", name="appo.x"),
        ImportError("libcuda.so.1"),
    ],
)
def test_a_defect_is_not(error: Exception) -> None:
    assert expected(error) is None


# The command ------------------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback_of_a_mistake_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("recipe", "show", "dmeo")
    is_a_mistake(answer(*words))
    for found in (answer("--debug", *words), answer(*words, "--debug")):
        assert found.status == 2
        assert "Traceback" in found.text
        assert "load_recipe" in found.text
        assert found.lines[-1].startswith("error: recipe 'dmeo': unknown")
    is_a_mistake(answer(*words))  # for the one command only
    monkeypatch.setenv(errors.DEBUG, "1")
    assert "Traceback" in answer(*words).text
    monkeypatch.setenv(errors.DEBUG, "0")
    is_a_mistake(answer(*words))
    assert "--debug" in answer("--help").output


def test_debug_is_no_word_of_what_follows_two_dashes() -> None:
    assert cli_ending.without_debug(["a", "--debug", "b"]) == (["a", "b"], True)
    assert cli_ending.without_debug(["a", "--", "--debug"]) == (["a", "--", "--debug"], False)


def test_a_defect_keeps_its_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("appo.config.load_recipe", broken)
    found = answer("recipe", "show", "demo")
    assert (found.status, type(found.error)) == (1, ZeroDivisionError)


def test_an_interrupted_command_says_how_to_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("appo.config.load_recipe", stop)
    found = answer("recipe", "show", "demo")
    assert (found.status, found.lines) == (130, ["interrupted; give the same command again to continue"])


def test_a_real_process_does_the_same(tmp_path: Path) -> None:
    mistake = run([*APPO, "recipe", "show", "dmeo"])
    assert (mistake.returncode, mistake.stdout) == (2, "")
    assert mistake.stderr.startswith("error: recipe 'dmeo': unknown")
    assert len(mistake.stderr.splitlines()) == 1
    debug = run([*APPO, "recipe", "show", "dmeo"], APPO_DEBUG="1")
    assert debug.returncode == 2
    assert debug.stderr.startswith("Traceback")
    group = run([*APPO, "recipe"])  # the help of a group that was given no command
    assert group.returncode == 2
    assert "Usage: " in group.stdout + group.stderr
    (tmp_path / "sitecustomize.py").write_text("import appo.config; appo.config.load_recipe = None\n")
    defect = run([*APPO, "recipe", "show", "demo"], PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert defect.returncode == 1
    assert "Traceback" in defect.stderr
    assert "TypeError" in defect.stderr


# Steps ------------------------------------------------------------------------------------------------------------

STEP = """
import sys
from appo.errors import UserError, ends_in_lines
@ends_in_lines
def step(kind):
    raise {"mistake": UserError("a\\nb"), "defect": ValueError("ours")}[kind]
step(sys.argv[1])
"""


def test_the_process_of_a_step_ends_in_the_lines_of_a_mistake() -> None:
    mistake = run([sys.executable, "-c", STEP, "mistake"])
    assert (mistake.returncode, mistake.stderr.strip()) == (2, "error: a\nb")
    debug = run([sys.executable, "-c", STEP, "mistake"], APPO_DEBUG="1")
    assert "Traceback" in debug.stderr
    assert debug.returncode == 2
    defect = run([sys.executable, "-c", STEP, "defect"])
    assert defect.returncode == 1
    assert "ValueError: ours" in defect.stderr
    assert "Traceback" in defect.stderr


def test_every_step_of_a_pipeline_does() -> None:
    """All that components call: what `steps` and `retraining` offer, and what they call beside."""
    from appo import closing, plan, retraining, steps
    from components import trainjob

    called = [getattr(steps, name) for name in dir(steps) if not name.startswith("_")]
    called += [retraining.gate, retraining.promote, closing.close_runs, plan.data_overrides, trainjob.launch]
    ours = [f for f in called if getattr(f, "__module__", "") in (steps.__name__, retraining.__name__)]
    functions = [f for f in ours if callable(f) and not isinstance(f, type)] + called[-3:]
    assert len(functions) >= 12
    assert [f.__name__ for f in functions if not hasattr(f, "__wrapped__")] == []


# Files that this user may not read or write -----------------------------------------------------------------------


@pytest.fixture
def as_somebody() -> Iterator[Path]:
    """A folder of root's with things in it that others may not read, and this process as one of those others."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody who may do less")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "secret.yaml").write_text("name: x\n")
        (folder / "secret.jsonl").write_text("{}\n")
        for path in folder.iterdir():
            path.chmod(0o600)
        (folder / "locked").mkdir(mode=0o700)
        # What a command imports late lies in root's folders: it is imported while this is still root.
        answer("explain", "model", "one", "-r", "demo", "-m", "none")
        answer("score", "key_moment", "--annotations", name, "--predictions", name)
        answer("data", "assemble", "-r", "demo", "-o", f"{name}/x/secret.yaml/y", "-s", "data.source=jsonl")
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("recipe show {}/secret.yaml", "secret.yaml: permission denied"),
        ("score key_moment --annotations {} --predictions {}/secret.jsonl", "secret.jsonl: permission denied"),
        ("score key_moment --annotations {}/locked --predictions {}/secret.jsonl", "locked: permission denied"),
        ("explain model one -r demo -o /tmp/page -m {}/secret.jsonl", "secret.jsonl: cannot be opened: Permission"),
        ("data assemble -r demo -o {}/out", "out: cannot be written to (Permission denied)"),
        ("data assemble -r demo -o {}/locked", "locked: cannot be written to (Permission denied)"),
        ("validate demo -s model.path={}/locked", "locked: permission denied"),
        ("validate demo -s data.source=jsonl -s data.annotations={}/secret.jsonl", "secret.jsonl: cannot be opened"),
    ],
)  # fmt: skip
def test_what_this_user_may_not_do_is_said(words: str, said: str, as_somebody: Path) -> None:
    found = answer(*words.replace("{}", str(as_somebody)).split())
    assert found.error is None, found.error
    assert found.status == 2
    assert said in found.text + found.output
