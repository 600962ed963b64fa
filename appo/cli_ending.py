"""How the command `appo` ends: a mistake in its lines with status 2, a defect of ours with its traceback and status 1.

The outermost group does it, and not the program around it, so that tests which call the command in their own process
see just what a shell sees.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from appo.errors import DEBUG, UserError, tell

# typer carries click inside since 0.20 and depended on it before; the mistakes of a command line share this base.
_Mistake: Any = typer.BadParameter.__mro__[2]
INTERRUPTED = 130


class Commands(TyperGroup):
    """The outermost group. `--debug` may stand anywhere: people add it to the command that has just failed."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        words, debug = without_debug(sys.argv[1:] if args is None else args)
        with _debugging(debug):
            try:
                outcome = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
            except _Mistake as error:
                sys.exit(_say_mistake(error))
            except Exception as error:
                status = tell(error)
                if status is None:
                    raise
                sys.exit(status)
        if not standalone_mode:
            return outcome
        sys.exit(outcome if isinstance(outcome, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; give the same command again to continue", err=True)
            raise typer.Exit(INTERRUPTED) from None


def without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words of a command line without `--debug`, and whether it was among them (before a `--`)."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


@contextmanager
def _debugging(wanted: bool) -> Iterator[None]:
    """APPO_DEBUG for this command and the processes that it starts."""
    before = os.environ.get(DEBUG)
    if wanted:
        os.environ[DEBUG] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[DEBUG]
        elif wanted:
            os.environ[DEBUG] = str(before)


def _say_mistake(error: Any) -> int:
    """A mistake that typer found, or that a command found in its own options."""
    if (
        type(error).__name__ == "NoArgsIsHelpError"
    ):  # a group without a command: the message is the whole help
        error.show()
        return int(error.exit_code)
    # Raised by a command of ours, the message says all; found by typer, it lacks which option it is about.
    whole = getattr(error, "param", None) is None and getattr(error, "param_hint", None) is None
    message = error.message if whole and error.message else error.format_message()
    context = getattr(error, "ctx", None)
    hint = "" if context is None else f"\n`{context.command_path} -h` lists what it takes"
    made = UserError(f"{message}{hint}")
    made.__cause__, made.__traceback__ = error, error.__traceback__
    tell(made)
    return int(error.exit_code)
