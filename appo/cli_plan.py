"""`appo plan`: what each GPU will hold, how long it takes, whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from appo.cli_options import SetOption

if TYPE_CHECKING:
    from appo.planning.plan import Plan

DOES_NOT_FIT = 3
_WORDS = {
    "parameters": "weights that passes compute with, the vision tower's among them, gathered ones at their most",
    "gradients": "and buffers in which processes sum them up",
    "masters": "float32 weights that the optimizer moves",
    "moments": "of Adam, two for each trained weight",
    "reference": "frozen copy for the KL term",
    "activations": "kept for the backward pass, or passing through a layer",
    "logits": "and what is made of them, a tile at a time",
    "kv_cache": "of completions while they are drawn",
    "vision_features": "of a pass, or the tower's own pass",
    "engine": "vLLM in the same process",
    "total": "the most that lies there at one moment",
}


def plan(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe (appo recipe list), or a .yaml file")],
    gpus: Annotated[int, typer.Option(help="GPUs of one training, over all nodes")],
    gpu_memory: Annotated[float, typer.Option(help="GiB of each")],
    overrides: SetOption = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Does a recipe fit these GPUs, and for how long will it take them? Status 3 where it does not fit."""
    from appo import checks
    from appo.config import load_recipe
    from appo.planning.plan import fit

    asked = load_recipe(recipe, overrides)
    checks.refuse(checks.Subject(asked), checks.ALONE, only=checks.OF_SETTINGS)
    found = fit(asked, gpus, gpu_memory)
    typer.echo(found.to_json() if as_json else text(found))
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def text(found: Plan) -> str:
    """The plan as a person reads it."""
    rows = [f"{found.recipe} on {found.gpus} x {found.gpu_memory_gib:g} GiB", "", "GiB of each GPU, at most:"]
    rows += [
        f"  {line:<16}{value:>9.2f}  {_WORDS[line]}"
        for line, value in found.per_gpu_gib.items()
        if value or line == "total"
    ]
    rows += [
        "",
        f"checkpoint       {found.checkpoint_gib:9.2f} GiB published, {found.resumable_gib:.2f} to resume from; "
        f"a training leaves up to {found.disk_gib:,.0f} on its disk, {found.bucket_gib:,.0f} in S3",
        f"time             {found.hours:9.1f} hours, {found.gpu_hours:,.0f} GPU-hours, "
        f"{found.samples_per_second:.3g} samples/s",
        "",
        f"It fits: {found.per_gpu_gib['total']:.1f} of {found.usable_gib:.1f} GiB that tensors can use."
        if found.fits
        else f"It does not fit: {found.assumed[0]}.",
    ]
    if not found.fits:
        rows.append(
            f"It would with {' '.join(f'--set {setting}' for setting in found.remedy.split())}"
            if found.remedy
            else "No setting of the recipe makes it fit; take more GPUs, or larger ones."
        )
    rows += ["", "Assumed:", *(f"- {note}" for note in found.assumed[0 if found.fits else 1 :])]
    return "\n".join(rows)
