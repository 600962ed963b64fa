"""Commands for single steps: what the pipeline's steps do, with files of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appo.cli_options import (
    FolderOption,
    ManifestOption,
    OutOption,
    RecipeOption,
    SetOption,
    file_or_folder,
)

if TYPE_CHECKING:
    from appo.config import Recipe

ModelOption = Annotated[
    str,
    typer.Option(
        help="checkpoint folder, s3:// prefix or hub name[@revision]; default: the recipe's model.path"
    ),
]

data_app = typer.Typer(help="Questions and videos.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.add_typer(data_app, name="data")
    for command in (train, compare, rehearse):
        app.command()(command)


@data_app.command("assemble")
def data_assemble(
    recipe: RecipeOption,
    out: OutOption,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Records and videos -> a checked manifest, decoded frames, a list of rejects, a card."""
    from appo import checks
    from appo.config import load_recipe
    from appo.data.assemble import assemble

    settings = load_recipe(recipe, overrides)
    checks.refuse(checks.Subject(settings), checks.able_here(), only=checks.OF_DATA)
    made = assemble(settings, out)
    typer.echo(f"manifest: {made.manifest}\nrejects:  {made.rejects}\ncard:     {made.card}")


@data_app.command("features")
def data_features(
    recipe: RecipeOption,
    manifest: ManifestOption,
    model: ModelOption = "",
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Vision features of every video, computed once into training.feature_cache_dir for trainings to find."""
    from appo.config import load_recipe
    from appo.data.manifest import read_manifest
    from appo.training.feature_fill import fill

    settings = load_recipe(recipe, overrides)
    weights = _checkpoint(settings, model)["model_path"]
    filled = fill(settings, read_manifest(manifest), weights)
    place = settings.training.feature_cache_dir
    typer.echo(
        f"features: {filled.computed} computed, {filled.found} found, of {filled.videos} videos: {place}"
    )


def train(
    recipe: RecipeOption,
    manifest: ManifestOption,
    out: OutOption,
    model: ModelOption = "",
    algorithm: Annotated[str, typer.Option(help="default: the recipe's policy.algorithm")] = "",
    seed: Annotated[
        int | None, typer.Option(help="default: the recipe's first seed", min=0, max=2**32 - 1)
    ] = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Train one algorithm with one seed; the same command again continues."""
    from appo import checks
    from appo.config import load_recipe
    from appo.training.run import train as run_training

    settings = load_recipe(recipe, overrides)
    start = _checkpoint(settings, model)
    # The one training of the many that a recipe may stand for.
    chosen = [f"algorithms=[{algorithm or settings.policy.algorithm}]"]
    chosen += [] if seed is None else [f"training.seeds=[{seed}]"]
    one = load_recipe(recipe, [*overrides, *chosen])
    weights = one.model.model_copy(update={"path": start["model_path"]})
    checks.before_training(
        one.model_copy(update={"model": weights}), algorithm=one.algorithms[0], processes=1
    )
    summary = run_training(
        settings,
        algorithm=one.algorithms[0],
        seed=one.training.seeds[0],
        manifest_path=manifest,
        out=out,
        **start,
    )
    typer.echo(f"{summary}\ncheckpoint: {out / 'checkpoint'}")


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="output folders of trainings; or the name of one MLflow experiment"),
    ],
    recipe: RecipeOption,
    out: OutOption,
    evaluations: Annotated[
        Path | None,
        typer.Option(
            "--evaluations",
            "-e",
            help="output folder of an evaluation; not for an experiment",
            callback=file_or_folder,
        ),
    ] = None,
    folder: FolderOption = Path("runs/demo"),
    manifest: Annotated[
        Path | None, typer.Option("--manifest", "-m", help="for pictures in the heat maps")
    ] = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Means and deviations over seeds, ratios, plots: one table and one page."""
    from appo.config import load_recipe
    from appo.reports.compare import compare as run_comparison

    settings = load_recipe(recipe, overrides)
    store = None
    if evaluations is None:
        from appo.reports.experiment import fetch_experiment

        if len(runs) != 1 or runs[0].is_dir():
            raise typer.BadParameter("--evaluations: needed with folders; or name one MLflow experiment")
        fetched = fetch_experiment(str(runs[0]), out, recipe=settings, run_dir=folder)
        runs, evaluations, store = list(fetched.runs), fetched.evaluations, folder
    made = run_comparison(runs, evaluations, out, recipe=settings, manifest_path=manifest, run_dir=store)
    typer.echo(f"{made.table}\nreport: {made.html}")


def rehearse(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe, or a .yaml file")],
    layers: Annotated[int | None, typer.Option(help="decoder layers to build; default: all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """The recipe's model at full size with random weights, through every part of a run once, on this CPU."""
    from appo import checks
    from appo.config import load_recipe
    from appo.rehearsal import rehearse as run_rehearsal
    from appo.rehearsal import table

    asked = load_recipe(recipe, overrides)
    checks.refuse(checks.Subject(asked), checks.ALONE, only=checks.OF_SETTINGS)
    found = run_rehearsal(asked, layers=layers)
    typer.echo(found.to_json() if as_json else table(found))


def _checkpoint(settings: Recipe, model: str) -> dict[str, Any]:
    """The folder of the weights to start from and what they are called, as `train` takes them."""
    from appo import hub
    from appo.config import RecipeError
    from appo.handover import checkpoint_of
    from appo.modeling.checkpoints import fetched
    from appo.storage import is_s3

    path = model or settings.model.path
    if path is None:
        raise RecipeError("model.path=null: name the checkpoint to start from with --model")
    name = hub.pinned(path)
    return {"model_path": fetched(name if is_s3(name) else checkpoint_of(name)), "model_name": name}
