"""The list of checks: what each is called, what it needs, what it finds, and who runs which of them when.

A check is one function in a file of this folder, registered by `check`. It is given a `Subject` and yields what is
wrong, as `setting=value: what is wrong`; the remedy of the check is put behind it. A `UserError` that it yields or
raises is taken as it is. All problems of a recipe are said together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from appo.config import Recipe, RecipeError
from appo.errors import UserError, expected

Need = Literal["nothing", "files", "gpu", "server"]
# In the order in which they run: what is cheap refuses first, and no server is asked about a recipe that cannot run.
NEEDS: Mapping[Need, str] = {"nothing": "nothing", "files": "files", "gpu": "a GPU", "server": "a server"}


class CheckFailed(RecipeError):
    """What the checks found, one line a problem."""


class CannotTell(Exception):
    """Raised by a check that does not apply here after all; the reason is shown. Never leaves this module."""


@dataclass(frozen=True)
class Subject:
    """What is checked.

    variants: of an ablation. processes: of one training, over all its machines; None where nobody knows yet.
    elsewhere: folders that this machine does not see, and pods of the run do. submitted: the run will not be here.
    trains_here: trainings will be processes of this machine.
    """

    recipe: Recipe
    variants: tuple[str, ...] = ()
    processes: int | None = None
    elsewhere: tuple[str, ...] = ()
    submitted: bool = False
    trains_here: bool = False

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """The recipe of each training under its variant's name; the recipe itself under "" without variants."""
        from appo import plan

        made = {training.variant: recipe for training, recipe in plan.ablation(self.recipe, self.variants)}
        return made or {"": self.recipe}

    def is_elsewhere(self, place: str) -> bool:
        """Whether a path of the recipe lies where this machine cannot look."""
        return any(place == folder or place.startswith(f"{folder}/") for folder in self.elsewhere)


Find = Callable[[Subject], Iterator[str | UserError]]


@dataclass(frozen=True, slots=True)
class Check:
    """needs: what must be there to run it. remedy: what a person does about a problem that names none itself."""

    name: str
    needs: Need
    remedy: str
    find: Find


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check said: problems in whole lines, or why it was not run; neither: all is well."""

    check: Check
    problems: tuple[str, ...] = ()
    skipped: str = ""

    def line(self) -> str:
        """`name  ok`, `name  skipped (needs a GPU)` or `name  problem: ...`."""
        said = f"skipped ({self.skipped})" if self.skipped else "ok"
        if self.problems:
            more = len(self.problems) - 1
            said = f"problem: {self.problems[0]}" + (f" (and {more} more)" if more else "")
        return f"{self.check.name:<22} {said}"


_CHECKS: dict[str, Check] = {}


def check(name: str, *, needs: Need, remedy: str) -> Callable[[Find], Find]:
    """Decorator: enter a check into the list under a name of its own."""

    def enter(find: Find) -> Find:
        if name in _CHECKS:
            raise ValueError(f"check {name!r}: is already registered by {_CHECKS[name].find.__module__}")
        _CHECKS[name] = Check(name, needs, remedy, find)
        return find

    return enter


def checks() -> list[Check]:
    """All checks in the order in which they run."""
    order = list(NEEDS)
    return sorted(_CHECKS.values(), key=lambda one: order.index(one.needs))


def run_checks(
    subject: Subject, able: Collection[Need], only: Collection[str] | None = None
) -> list[Outcome]:
    """Every check (or those named), in order.

    Those that need what is not in `able` are skipped, and those that ask a server after any problem.
    """
    outcomes: list[Outcome] = []
    for one in (one for one in checks() if only is None or one.name in only):
        if one.needs not in able:
            outcomes.append(Outcome(one, skipped=f"needs {NEEDS[one.needs]}"))
        elif one.needs == "server" and any(outcome.problems for outcome in outcomes):
            outcomes.append(Outcome(one, skipped="no server is asked before the problems above are mended"))
        else:
            outcomes.append(_run(one, subject))
    return outcomes


def refuse(subject: Subject, able: Collection[Need], only: Collection[str] | None = None) -> None:
    """Raise CheckFailed with all that the checks (or those named) find; return in silence when that is nothing."""
    problems = [line for outcome in run_checks(subject, able, only) for line in outcome.problems]
    if problems:
        raise CheckFailed("\n".join(dict.fromkeys(problems)))


def _run(one: Check, subject: Subject) -> Outcome:
    problems: list[str] = []
    try:
        for found in one.find(subject):
            problems.append(_whole(found) if isinstance(found, UserError) else f"{found}; {one.remedy}")
    except CannotTell as reason:
        return Outcome(one, tuple(problems), skipped="" if problems else str(reason))
    except Exception as error:
        mistake = expected(error)
        if mistake is None:
            raise
        problems.append(_whole(mistake))
    return Outcome(one, tuple(problems))


def _whole(error: UserError) -> str:
    return " ".join(str(error).split())
