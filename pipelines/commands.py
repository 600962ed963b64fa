"""`appo pipeline ...` and `appo schedule ...`. Imports kfp only when a command runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from appo.cli_options import RecipeOption, SetOption
from pipelines.catalog import NAMES

pipeline = typer.Typer(help="Whole pipelines: on this machine, as YAML, on a cluster.", no_args_is_help=True)
schedule = typer.Typer(help="Recurring pipelines on a cluster.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(help=f"one of {', '.join(NAMES)}")]


@pipeline.command("run")
def run(
    recipe: RecipeOption,
    name: Annotated[str, typer.Option("--pipeline", "-p", help=f"one of {', '.join(NAMES)}")] = NAMES[0],
    data: Annotated[
        Path | None,
        typer.Option(help="records to use instead of the recipe's; videos are relative to this file"),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--folder", "-f", help="default: runs/RECIPE")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget what finished before")] = False,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Run a pipeline on this machine; the same command again continues after the last finished step."""
    from appo import plan, steps
    from pipelines import catalog
    from pipelines.console import Story
    from pipelines.local import run_graph

    if data is not None:
        if not data.is_file():
            raise typer.BadParameter(f"--data {data}: no such file")
        overrides = [f"data.annotations={data.resolve()}", f"data.root={data.resolve().parent}", *overrides]
    resolved = steps.validate(recipe, overrides)  # refused here, before a folder is made
    folder = (folder or Path("runs") / resolved.name).resolve()
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if resolved.tracking.uri is None:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    cluster = resolved.cluster.model_copy(update={"retries": 0})
    with Story() as story:
        run_graph(
            catalog.build(name, cluster),
            {"recipe": resolved.to_yaml(), "storage": str(folder)},
            folder=folder,
            story=story,
        )
    _say_results(folder, Path(plan.layout(resolved, str(folder)).report))


@pipeline.command("compile")
def compile_(
    name: NameArgument = NAMES[0],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="default: build/pipelines/NAME.yaml")
    ] = None,
    recipe: RecipeOption = "demo",
    overrides: SetOption = [],  # noqa: B006
    images: Annotated[
        str, typer.Option(help="registry and path of the images, such as registry.example/appo")
    ] = "",
    tag: Annotated[str, typer.Option(help="tag of the images; default: the version of appo")] = "",
) -> None:
    """Write a pipeline's YAML for Kubeflow Pipelines; pods ask for what the recipe's cluster section says."""
    from pipelines.compile import compile_pipeline

    path = out or Path("build/pipelines") / f"{name}.yaml"
    compile_pipeline(name, path, recipe=recipe, overrides=overrides, images=images, tag=tag)
    typer.echo(f"pipeline: {path}")


def _say_results(folder: Path, report: Path) -> None:
    table = report / "table.txt"
    if table.is_file():
        typer.echo(f"\n{table.read_text(encoding='utf-8').rstrip()}\n")
    for page in sorted(report.glob("*.html")):
        typer.echo(f"report:  {_short(page)}")
    option = "" if folder == Path("runs/demo").resolve() else f" --folder {_short(folder)}"
    typer.echo(f"MLflow:  appo ui{option}   (here: {_short(folder / 'mlflow.db')})")


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
