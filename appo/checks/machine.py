"""Checks of the machine that trains: of its GPUs where they are here, of what the cluster section says of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from appo.checks.registry import CannotTell, Subject, check
from appo.errors import UserError
from appo.storage import is_s3


def gpus() -> int:
    """How many GPUs this process may use. torch, which takes seconds to load, is asked only where there are any."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return 0
    import torch

    return torch.cuda.device_count()


@check("dtype", needs="gpu", remedy="set model.dtype to float32, or train on a GPU that computes in it")
def dtype(subject: Subject) -> Iterator[str]:
    import torch

    if subject.recipe.model.dtype != "bfloat16":
        return
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                name = torch.cuda.get_device_name(number)
                yield f"model.dtype=bfloat16: GPU {number} ({name}) does not compute in it"
                return


_REMEDY = "take more GPUs, or larger ones (appo plan counts what each would hold)"
Machine = tuple[int, float]  # GPUs, GiB of each


@check("fits the GPUs", needs="gpu", remedy=_REMEDY)
def fits_here(subject: Subject) -> Iterator[str | UserError]:
    if subject.submitted:
        raise CannotTell("the run will be elsewhere")
    yield from _too_large(subject, _gpus_here(subject), "named", "folder")


@check("fits the cluster", needs="nothing", remedy=_REMEDY)
def fits_cluster(subject: Subject) -> Iterator[str | UserError]:
    """By the cluster section alone; on the machine that trains its own GPUs are asked (`fits_here`)."""
    yield from _too_large(subject, _cluster(subject), "named")


@check("model folder fits", needs="files", remedy=_REMEDY)
def folder_fits(subject: Subject) -> Iterator[str | UserError]:
    """The same for a model whose sizes stand in a folder here."""
    yield from _too_large(subject, _cluster(subject), "folder")


@check("stored model fits", needs="server", remedy=_REMEDY)
def stored_fits(subject: Subject) -> Iterator[str | UserError]:
    """The same for a model whose sizes stand in a store."""
    here = gpus() and not subject.submitted
    yield from _too_large(subject, _gpus_here(subject) if here else _cluster(subject), "store")


def _gpus_here(subject: Subject) -> Machine:
    import torch

    sizes = [torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())]
    return subject.processes or len(sizes), min(sizes) / 2**30


def _cluster(subject: Subject) -> Machine:
    """Raises CannotTell where the recipe does not say, or other GPUs are the run's."""
    cluster = subject.recipe.cluster
    if cluster.gpu_memory_gib is None:
        raise CannotTell("cluster.gpu_memory_gib is not given")
    if not cluster.gpus_per_node:
        raise CannotTell("the recipe asks for no GPU")
    if subject.processes is None:
        raise CannotTell("where it will run is not known yet")
    if gpus() and not subject.submitted:
        raise CannotTell("the GPUs of this machine are asked themselves")
    return cluster.gpus_per_node * cluster.nodes, cluster.gpu_memory_gib


def _too_large(subject: Subject, machine: Machine, *where: str) -> Iterator[str | UserError]:
    """One problem for each variant whose hungriest algorithm does not fit, with the figure and what would help.

    where: of the sizes of models that are looked at (`_sizes_stand_in`).
    """
    from appo.modeling.architecture import UnknownArchitecture
    from appo.planning.plan import fit
    from appo.planning.setting import PlanError, Undivided

    looked_at = [
        (variant, recipe, recipe.model.path)
        for variant, recipe in subject.recipes.items()
        if recipe.model.path is not None and _sizes_stand_in(recipe.model.path) in where
    ]
    if not looked_at:
        raise CannotTell("the model is made here, and tiny" if _all_made(subject) else "another check asks")
    count, gpu_memory_gib = machine
    for variant, recipe, path in looked_at:
        if subject.is_elsewhere(path):
            raise CannotTell(f"only pods see {path}")
        named = f"variant {variant}: " if variant else ""
        try:
            plan = fit(recipe, count, gpu_memory_gib)
        except Undivided:  # "groups" says so
            continue
        except PlanError as error:
            yield UserError(f"{named}{error}")
            continue
        except UnknownArchitecture as error:
            raise CannotTell(str(error).splitlines()[0]) from None
        if plan.fits:
            continue
        said = (
            f"{named}training.distributed={recipe.training.distributed} on {count} GPUs of {gpu_memory_gib:.0f} GiB: "
            f"{plan.assumed[0]}"
        )
        yield UserError(f"{said}; set {plan.remedy}") if plan.remedy else said


def _sizes_stand_in(path: str) -> str:
    """Whether a model's sizes are known by its name alone ("named"), or stand in a "folder" here or in a "store"."""
    from appo.modeling.architecture import published

    if is_s3(path):
        return "store"
    return "named" if path.partition("@")[0] in published() and not Path(path).is_dir() else "folder"


def _all_made(subject: Subject) -> bool:
    return all(recipe.model.path is None for recipe in subject.recipes.values())
