"""Checks of the machine that trains: of its GPUs where they are here, of what the cluster section says of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from appo.checks.registry import CannotTell, Subject, check
from appo.errors import UserError


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


@check(
    "fits the GPUs",
    needs="gpu",
    remedy="take more GPUs, or larger ones (appo plan counts what each would hold)",
)
def fits_here(subject: Subject) -> Iterator[str | UserError]:
    import torch

    if subject.submitted:
        raise CannotTell("the run will be elsewhere")
    sizes = [torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())]
    yield from _too_large(subject, subject.processes or len(sizes), min(sizes) / 2**30)


@check(
    "fits the cluster",
    needs="nothing",
    remedy="take more GPUs, or larger ones (appo plan counts what each would hold)",
)
def fits_cluster(subject: Subject) -> Iterator[str | UserError]:
    """By the cluster section alone; on the machine that trains its own GPUs are asked (`fits_here`)."""
    memory = subject.recipe.cluster.gpu_memory_gib
    if memory is None:
        raise CannotTell("cluster.gpu_memory_gib is not given")
    asked = subject.recipe.cluster.gpus_per_node * subject.recipe.cluster.nodes
    if not asked:
        raise CannotTell("the recipe asks for no GPU")
    if gpus() and not subject.submitted:
        raise CannotTell("the GPUs of this machine are asked themselves")
    yield from _too_large(subject, asked, memory)


def _too_large(subject: Subject, count: int, gpu_memory_gib: float) -> Iterator[str | UserError]:
    """One problem for each variant whose hungriest algorithm does not fit, with the figure and what would help."""
    from appo.modeling.architecture import UnknownArchitecture
    from appo.planning.plan import PlanError, fit

    for variant, recipe in subject.recipes.items():
        if recipe.model.path is None:  # made here, and tiny
            continue
        try:
            plan = fit(recipe, count, gpu_memory_gib)
        except PlanError:  # a step that does not divide: "groups" says so
            continue
        except UnknownArchitecture as error:
            raise CannotTell(str(error).splitlines()[0]) from None
        if plan.fits:
            continue
        named = f"variant {variant}: " if variant else ""
        said = (
            f"{named}training.distributed={recipe.training.distributed} on {count} GPUs of {gpu_memory_gib:.0f} GiB: "
            f"{plan.assumed[0]}"
        )
        yield UserError(f"{said}; set {plan.remedy}") if plan.remedy else said
