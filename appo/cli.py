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
from appo.cli_ending import Commands
from appo.cli_options import FolderOption, RecipeOption, SetOption
from appo.cli_plan import plan as plan_command
from appo.evaluation import cli as evaluation_cli
from appo.reports import cli as reports_cli

app = typer.Typer(
    name="appo",
    cls=Commands,
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
app.command()(plan_command)
reports_cli.register(app)
# The graphs stand above this package; they are added by name, so that the library never depends on them.
for _name in ("pipeline", "schedule"):
    app.add_typer(getattr(import_module("pipelines.commands"), _name), name=_name)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="show the traceback of expected mistakes too; or set APPO_DEBUG=1")
    ] = False,
) -> None:
    # Taken out of the words before they get here, so that it may stand anywhere; declared for the help.
    del debug


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes that ship with appo, with model, data, GPUs and precision."""
    from appo.recipe_table import recipe_table

    typer.echo(recipe_table())


@recipe_app.command("show")
def recipe_show(
    name: Annotated[str, typer.Argument(help="a shipped recipe, or a .yaml file")],
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """A recipe in full, with its defaults filled in."""
    from appo import checks
    from appo.config import load_recipe

    settings = load_recipe(name, overrides)
    # Where it will run is not known yet, so nothing is said about groups and processes.
    checks.refuse(checks.Subject(settings), checks.ALONE)
    typer.echo(settings.to_yaml(), nl=False)


@app.command()
def validate(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe, or a .yaml file")],
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Every check of a recipe that can run on this machine, one line each; status 2 when one finds a problem."""
    from appo import checks
    from appo.config import load_recipe

    settings = load_recipe(recipe, overrides)
    outcomes = checks.run_checks(checks.at_home(settings), checks.able_here())
    for outcome in outcomes:
        typer.echo(outcome.line())
    if found := [outcome.check.name for outcome in outcomes if outcome.problems]:
        raise checks.CheckFailed(
            f"recipe {settings.name}: {len(found)} of {len(outcomes)} checks found problems ({', '.join(found)}); "
            "the lines above say what to change"
        )


@app.command()
def ui(
    folder: FolderOption = Path("runs/demo"),
    port: Annotated[int, typer.Option(help="on 127.0.0.1", min=1, max=65535)] = 5000,
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
    """Run the command line; `appo.cli_ending` says how it ends."""
    app()


__all__ = ["RecipeOption", "app", "main"]

if __name__ == "__main__":
    main()
