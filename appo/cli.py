"""The command `appo`: one door to every step and to whole pipelines.

Free of torch, kfp and mlflow until a command that needs them runs, so that `--help` answers at once.
Mistakes of the person at the keyboard end with one clear line and exit status 2, not with a traceback.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from appo import cli_steps
from appo.cli_options import FolderOption, RecipeOption, SetOption
from appo.evaluation import cli as evaluation_cli
from appo.planning import cli as planning_cli
from appo.reports import cli as reports_cli

app = typer.Typer(
    name="appo",
    help="Attention-guided Perception Policy Optimization for video-language models, as a pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(help="The settings a run is made from.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
cli_steps.register(app)
evaluation_cli.register(app)
app.command()(planning_cli.plan)
reports_cli.register(app)
# The graphs stand above this package; they are added by name, so that the library never depends on them.
for _name in ("pipeline", "schedule"):
    app.add_typer(getattr(import_module("pipelines.commands"), _name), name=_name)


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes that ship with appo."""
    from appo.config import load_recipe, recipe_names

    for name in recipe_names():
        typer.echo(f"{name:<24} {load_recipe(name).description}")


@recipe_app.command("show")
def recipe_show(
    name: Annotated[str, typer.Argument(help="a shipped recipe, or a .yaml file")],
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """A recipe in full, with its defaults filled in."""
    from appo.config import load_recipe

    typer.echo(load_recipe(name, overrides).to_yaml(), nl=False)


@app.command()
def ui(
    folder: FolderOption = Path("runs/demo"),
    port: Annotated[int, typer.Option(help="on 127.0.0.1")] = 5000,
) -> None:
    """Open MLflow's pages over the runs of a local pipeline."""
    store = folder / "mlflow.db"
    if not store.is_file():
        raise typer.BadParameter(
            f"{store}: not there; run `appo pipeline run --recipe demo` first, or name --folder"
        )
    typer.echo(f"MLflow: http://127.0.0.1:{port}  (Ctrl-C ends it)")
    command = ["-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store.resolve()}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Seven processes for judges of chat models; nothing here asks for them.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.execv(sys.executable, [sys.executable, *command])


def main() -> None:
    """Run the command line; errors that appo raises on purpose are printed without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted; give the same command again to continue", err=True)
        sys.exit(130)
    except Exception as error:  # only ours are shortened; everything else goes on as it is
        if not type(error).__module__.startswith(("appo.", "pipelines.")):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


__all__ = ["RecipeOption", "app", "main"]

if __name__ == "__main__":
    main()
