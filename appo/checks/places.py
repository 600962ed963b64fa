"""Checks of the files and folders that a recipe names: on this machine, and in a store.

A place that only the pods of a submitted run see is left to the first step there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from appo.checks.registry import CannotTell, Subject, check
from appo.errors import UserError
from appo.storage import StorageError, StoreError, is_s3


@check(
    "model",
    needs="files",
    remedy="name a checkpoint folder, an s3:// prefix, or a hub name (OWNER/NAME)",
)
def model(subject: Subject) -> Iterator[str | UserError]:
    from appo.modeling.checkpoints import is_hub_name, model_problem

    path = subject.recipe.model.path
    if path is None or is_s3(path):
        return
    if subject.is_elsewhere(path):
        raise CannotTell(f"only pods see {path}")
    if is_hub_name(path):
        raise CannotTell("a name on the hub, which loading will try")
    if problem := model_problem(path):
        yield UserError(f"model.path={path}: {problem}{_away(subject)}")


@check("model in the store", needs="server", remedy="name the prefix of a whole checkpoint")
def stored_model(subject: Subject) -> Iterator[str | UserError]:
    from appo.modeling.checkpoints import stored_problem

    path = subject.recipe.model.path
    if path is None or not is_s3(path):
        return
    with _store(subject):
        problem = stored_problem(path)
    if problem:
        yield UserError(f"model.path={path}: {problem}")


@check("records", needs="files", remedy="name an existing file or folder")
def records(subject: Subject) -> Iterator[str | UserError]:
    """data.annotations, data.root and data.leakage on this machine; a source that reads records is given some."""
    from appo.data.sources import reads_records

    data = subject.recipe.data
    if data.annotations is None and reads_records(subject.recipe):
        yield UserError(
            f"data.annotations=null: source {data.source} reads the publisher's records; "
            "name the file with --data or data.annotations"
        )
    leaks = [(f"leakage, {name}", place) for name, place in sorted(data.leakage.items())]
    for setting, place in (("annotations", data.annotations), ("root", data.root), *leaks):
        if place is None or is_s3(place) or subject.is_elsewhere(place):
            continue
        if not Path(place).exists():
            yield f"data.{setting}={place}: no such file or folder{_away(subject)}"
        elif setting == "annotations" and Path(place).is_file():
            yield from _unreadable(f"data.annotations={place}", Path(place))


@check("names in the records", needs="files", remedy="name what the records hold")
def names(subject: Subject) -> Iterator[str]:
    """Quotas and types of question by sources that samples come from; reads local records where a name is new."""
    from appo.data.sources import check_names

    place = subject.recipe.data.annotations
    if place is None:
        return
    if is_s3(place) or subject.is_elsewhere(place):
        raise CannotTell("the first step looks into records that lie elsewhere")
    if Path(place).exists():  # else `records` has said so
        check_names(subject.recipe)
    yield from ()


@check("records in the store", needs="server", remedy="name an object that is there")
def stored_records(subject: Subject) -> Iterator[str | UserError]:
    from appo.data.sources import check_names
    from appo.storage import open_binary

    place = subject.recipe.data.annotations
    if place is None or not is_s3(place):
        return
    with _store(subject):
        try:
            open_binary(place).close()
        except StoreError:
            raise
        except StorageError as error:
            yield f"data.annotations={place}: {error}"
            return
        check_names(subject.recipe)


@check(
    "benchmark files",
    needs="files",
    remedy="name the folder of the publishers' files, a sub-folder a benchmark",
)
def benchmark_files(subject: Subject) -> Iterator[str | UserError]:
    from appo.evaluation.benchmarks import BenchmarkError, benchmark_class

    evaluation = subject.recipe.evaluation
    for setting, place in (("annotations", evaluation.annotations), ("videos", evaluation.videos)):
        if place is not None and not subject.is_elsewhere(place) and not Path(place).exists():
            yield f"evaluation.{setting}={place}: no such folder{_away(subject)}"
    if evaluation.annotations is not None:
        return
    lacking = []
    for name in evaluation.benchmarks:
        with suppress(BenchmarkError):  # `benchmarks` has said so
            lacking += [known] if (known := benchmark_class(name).name) != "key_moment" else []
    if lacking:
        yield f"evaluation.annotations=null: the publishers' files of {', '.join(lacking)} are needed"


def _unreadable(named: str, path: Path) -> Iterator[str | UserError]:
    try:
        path.open("rb").close()
    except OSError as error:
        yield UserError(f"{named}: cannot be opened: {error.strerror}; give this user the right to read it")


def _away(subject: Subject) -> str:
    """What to add about a place that is not here when the run is to go elsewhere."""
    return f" (pods see s3:// addresses, {' and '.join(subject.elsewhere)})" if subject.submitted else ""


@contextmanager
def _store(subject: Subject) -> Iterator[None]:
    """A store that does not answer is a problem where the run is to use it from, and no verdict from elsewhere."""
    try:
        yield
    except StoreError as error:
        if subject.submitted:
            raise CannotTell("the store does not answer from here; the first step asks it") from error
        raise
