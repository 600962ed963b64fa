"""Errors that users are meant to read: what was given, where, and the remedy, in at most six lines.

The lowest layer: standard library only, read by everything. An expected mistake derives from `UserError`; whoever shows
it (the command line, a pipeline's step, one process of a launched training) shows its lines, and never a traceback
unless APPO_DEBUG is set. Every other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import wraps
from types import TracebackType
from typing import Any, ClassVar, ParamSpec, TypeVar

LINES = 6
# A line that wraps over half a screen is not read; what is cut off in the middle stands in the traceback of --debug.
LINE_CHARS = 700
DEBUG = "APPO_DEBUG"
PREFIX = "error: "
# Packages that some commands need and the smallest installation lacks -> the extra that brings them (pyproject.toml).
EXTRAS = {
    **dict.fromkeys(("av", "boto3", "botocore", "datasets", "decord", "pyarrow"), "data"),
    **dict.fromkeys(("accelerate", "peft", "torch", "torchvision", "transformers", "trl"), "train"),
    **dict.fromkeys(("math_verify", "rouge_score", "vllm"), "eval"),
    **dict.fromkeys(("flask_wtf", "jinja2", "matplotlib", "mlflow"), "track"),
    **dict.fromkeys(("kfp", "kfp_server_api", "kubeflow", "kubernetes"), "pipeline"),
}
# What a machine refuses, whatever the program does.
_MACHINE = {
    errno.EACCES: "permission denied; give this user the right to it, or name another place",
    errno.EPERM: "permission denied; give this user the right to it, or name another place",
    errno.EROFS: "lies on a file system that is read-only; name another place",
    errno.ENOSPC: "no space is left on its disk; free some, or name another place",
    errno.EDQUOT: "the quota of its disk is used up; free some, or name another place",
    errno.ENAMETOOLONG: "the name is too long for the file system; name a shorter one",
    errno.ELOOP: "a chain of symbolic links leads back to itself; name the file itself",
}

Given = ParamSpec("Given")
Result = TypeVar("Result")


class UserError(Exception):
    """An expected mistake. The message names what was given, where, and the remedy; one line a problem.

    status: what a process that ends with it returns.
    """

    status: ClassVar[int] = 2


class SettingError(UserError, ValueError):
    """Settings of a recipe or a command that cannot be, or do not fit together: setting, value, remedy."""


class Diverged(UserError, ValueError):
    """Numbers of a training that are no longer finite: which, and what to lower."""


class MissingPackage(UserError, ImportError):
    """A package that this installation lacks, with the command that brings it."""


def one_line(error: object, longest: int = 300) -> str:
    """The text of a foreign error as a part of one of our lines: blanks joined, cut in the middle."""
    text = " ".join(str(error).split())
    if not text:
        text = type(error).__name__
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} ... {text[-longest // 4 :]}"


def first_lines(lines: Iterable[str], most: int = LINES) -> list[str]:
    """At most `most` lines; where more were given, the last says how many are left out."""
    kept = [line.rstrip() for line in lines if line.strip()]
    kept = [line if len(line) <= LINE_CHARS else one_line(line, LINE_CHARS) for line in kept]
    return kept if len(kept) <= most else [*kept[: most - 1], f"and {len(kept) - most + 1} more"]


def shown(error: object) -> str:
    """What a person sees of an error: at most six lines, the first with `error: ` before it."""
    return PREFIX + "\n".join(first_lines(str(error).splitlines()) or [type(error).__name__])


def debugging() -> bool:
    """Whether tracebacks of expected mistakes are wanted too (`appo --debug`, or APPO_DEBUG=1)."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def expected(error: BaseException) -> UserError | None:
    """The error as one for the user, or None for a defect of ours.

    Beside ours these are what a program cannot cause: a file system that refuses, a package that is not installed.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _MACHINE and error.filename is not None:
        place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        return UserError(f"{place}: {_MACHINE[error.errno]}")
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        name = str(error.name).partition(".")[0]
        return MissingPackage(
            f"{name}: is not installed, and this command needs it; pip install 'appo[{EXTRAS[name]}]'"
        )
    return None


def tell(error: BaseException) -> int | None:
    """Write an expected mistake to stderr and return its status; None, and nothing written, for a defect."""
    found = expected(error)
    if found is None:
        return None
    if debugging():
        traceback.print_exception(error)
    print(shown(found), file=sys.stderr, flush=True)
    return found.status


def status_of(main: Callable[[], int | None]) -> int:
    """Run the main function of a process; its status, also after an expected mistake, whose lines are written."""
    try:
        return main() or 0
    except Exception as error:
        status = tell(error)
        if status is None:
            raise
        return status


def ends_in_lines(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorator of what pipeline steps call: an expected mistake that leaves it ends the process in its lines.

    Kubeflow's executor, which runs a step's function, catches nothing, so the last word is `sys.excepthook`'s. It is
    set only when such a mistake passes here, and shows every other exception as before.
    """

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if expected(error) is not None and sys.excepthook is not _last_word:
                _last_word.before = sys.excepthook
                sys.excepthook = _last_word
            raise

    return call


class _LastWord:
    """A `sys.excepthook` for expected mistakes; `before` shows all others."""

    before: Any = staticmethod(sys.__excepthook__)

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if expected(error) is not None:
            print(
                file=sys.stderr
            )  # a progress bar may have left its line open, and the rest of that is not kept
        status = tell(error)
        if status is None:
            self.before(kind, error, trace)
        else:
            raise SystemExit(status)  # of a hook, Python takes it as the status of the process


_last_word = _LastWord()


def said_in(lines: list[str]) -> list[str]:
    """The lines of the last expected mistake in a process's output, or none: how a parent finds its child's."""
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith(PREFIX):
            return first_lines(lines[number:])
        if re.match(r"Traceback \(most recent call last\)|\s+File \"", lines[number]):
            return []
    return []
