"""Checks of what a recipe says alone: nothing is opened and nobody is asked."""

from __future__ import annotations

from collections.abc import Iterator

from appo.checks.registry import Subject, check
from appo.config import Recipe
from appo.errors import UserError


@check("seeds", needs="nothing", remedy="a seed counts once, so give each once")
def seeds(subject: Subject) -> Iterator[str | UserError]:
    given = subject.recipe.training.seeds
    if not given:
        yield UserError("training.seeds=[]: none is given; name at least one")
    yield from (f"training.seeds: {seed} is given twice" for seed in _repeated(given))
    for seed in given:
        if not 0 <= seed < 2**32:
            yield UserError(f"training.seeds: {seed} is no seed; give one from 0 to {2**32 - 1}")


@check("algorithms", needs="nothing", remedy="an algorithm counts once, so name each once")
def algorithms(subject: Subject) -> Iterator[str | UserError]:
    if not subject.recipe.algorithms:
        yield UserError("algorithms=[]: none is given; name at least one")
    yield from (f"algorithms: {name} is given twice" for name in _repeated(subject.recipe.algorithms))


@check("variants", needs="nothing", remedy="write a variant as name: section.key=value")
def variants(subject: Subject) -> Iterator[str]:
    _ = subject.recipes  # raises RecipeError with the variant's name
    yield from ()


@check("rewards", needs="nothing", remedy="name rewards that there are, one with a weight other than 0")
def rewards(subject: Subject) -> Iterator[str | UserError]:
    from appo.policy import settings_for
    from appo.training.rewarding import task_rewards

    for variant, recipe in _trainable(subject):
        policy = recipe.policy
        try:
            task_rewards(recipe)
            for name in recipe.algorithms:
                settings_for(policy.model_copy(update={"algorithm": name}))
        except UserError as error:
            yield _named(variant, error)
        if policy.overlong_buffer > policy.max_completion_length:
            yield UserError(
                f"{variant}policy.overlong_buffer={policy.overlong_buffer}: is longer than a completion "
                f"(policy.max_completion_length={policy.max_completion_length}); lower it"
            )


@check(
    "groups", needs="nothing", remedy="change it, policy.num_generations, or cluster.nodes and gpus_per_node"
)
def groups(subject: Subject) -> Iterator[str | UserError]:
    """Completions of a step over the processes of a training, as the trainer divides them."""
    if subject.processes is None:
        return
    from appo.grouping import cut_groups

    for variant, recipe in _trainable(subject):
        try:
            yield from (f"{variant}{problem}" for problem in cut_groups(recipe, subject.processes))
        except UserError as error:
            yield _named(variant, error)


@check("layout", needs="nothing", remedy="set training.distributed=ddp")
def layout(subject: Subject) -> Iterator[UserError]:
    """A layout that cannot run is refused, never replaced; the machine is looked at where it is the one that trains."""
    if subject.processes is None:
        return
    from appo.training.launch import LayoutError, refuse_impossible

    for variant, recipe in _trainable(subject):
        try:
            refuse_impossible(recipe, subject.processes, here=subject.trains_here)
        except LayoutError as error:
            yield _named(variant, error)


@check("source", needs="nothing", remedy="choose one of the sources in docs/data.md")
def source(subject: Subject) -> Iterator[str]:
    """That data.source is known; and quotas and types by name where no records need be read for that."""
    from appo.data.sources import check_names, reads_records

    reads_records(subject.recipe)  # raises for an unknown source
    if subject.recipe.data.annotations is None:
        check_names(subject.recipe)
    yield from ()


@check("benchmarks", needs="nothing", remedy="name each once")
def benchmarks(subject: Subject) -> Iterator[str | UserError]:
    from appo.evaluation.benchmarks import BenchmarkError, benchmark_class

    given, known = subject.recipe.evaluation.benchmarks, []
    if not given:
        yield UserError("evaluation.benchmarks=[]: none is given; name at least one")
    for name in given:
        try:
            known.append(benchmark_class(name).name)
        except BenchmarkError as error:
            yield UserError(f"evaluation.benchmarks: {error}")
    yield from (f"evaluation.benchmarks: {name} is given twice" for name in _repeated(known))


def _trainable(subject: Subject) -> Iterator[tuple[str, Recipe]]:
    """Each training's recipe, and how its variant is named at the head of a line."""
    for variant, recipe in subject.recipes.items():
        yield (f"variant {variant}: " if variant else ""), recipe


def _named(variant: str, error: UserError) -> UserError:
    return UserError(f"{variant}{error}") if variant else error


def _repeated(values: tuple[object, ...] | list[str]) -> list[object]:
    return sorted({value for value in values if list(values).count(value) > 1}, key=str)
