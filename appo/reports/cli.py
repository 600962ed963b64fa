"""Commands for what people open after a run: explain, champion, tracking upload, and comparing an experiment.

Light to import: everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from appo.cli_options import FolderOption, ManifestOption, RecipeOption, SetOption, folder_to_write

champion_app = typer.Typer(
    help="The model that won: which one it is, and back to the one before.", no_args_is_help=True
)
tracking_app = typer.Typer(help="What MLflow has and has not got.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(explain)
    app.add_typer(champion_app, name="champion")
    app.add_typer(tracking_app, name="tracking")


def explain(
    checkpoint: Annotated[str, typer.Argument(help="folder of a checkpoint")],
    sample: Annotated[str, typer.Argument(help="id of a sample of the manifest")],
    recipe: RecipeOption,
    manifest: ManifestOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="folder for explain.html", callback=folder_to_write)
    ] = Path("explain"),
    seed: Annotated[int, typer.Option(help="of the rollout")] = 0,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Roll out one group on one sample and show what APPO sees: rewards, frames, weights, attention."""
    from appo.config import load_recipe
    from appo.reports.explain import explain as run_explain

    made = run_explain(
        checkpoint, sample, recipe=load_recipe(recipe, overrides), manifest_path=manifest, out=out, seed=seed
    )
    typer.echo(f"{made.text}\npage: {made.html}")


@champion_app.command("show")
def champion_show(
    recipe: RecipeOption,
    folder: FolderOption = Path("runs/demo"),
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """The champion, the one before it, and the numbers it was promoted on."""
    from appo.config import load_recipe
    from appo.tracking.champion import open_registry

    typer.echo(open_registry(load_recipe(recipe, overrides), folder, kept=True).describe())


@champion_app.command("rollback")
def champion_rollback(
    recipe: RecipeOption,
    folder: FolderOption = Path("runs/demo"),
    reason: Annotated[str, typer.Option(help="kept with the model, for those who come after")] = "",
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Make the previous champion the champion again; nothing is deleted."""
    from appo.config import load_recipe
    from appo.tracking.champion import open_registry

    champion = open_registry(load_recipe(recipe, overrides), folder, kept=True).roll_back(reason)
    typer.echo(f"champion: version {champion.version}, {champion.uri}")


@tracking_app.command("upload")
def tracking_upload(
    folder: Annotated[
        str,
        typer.Argument(
            help="folder that holds the journals, looked through to any depth; or an s3:// prefix"
        ),
    ],
    uri: Annotated[
        str | None, typer.Option(help="another address than the run's, or the same one with its password")
    ] = None,
) -> None:
    """Send MLflow what could not be sent while it was away. Sending again does no harm."""
    from appo.storage import is_s3
    from appo.tracking.sender import upload
    from appo.tracking.stored import upload_stored

    if not is_s3(folder) and not Path(folder).is_dir():
        raise typer.BadParameter(f"{folder}: no such folder; name the one that holds a run's journals")
    outcomes = upload_stored(folder, uri=uri) if is_s3(folder) else upload(Path(folder), uri=uri)
    for name, outcome in outcomes.items():
        typer.echo(f"{name}: {outcome}")
    if not outcomes:
        typer.echo(f"{folder}: holds no journal")
