"""Commands for single steps: what the pipeline's steps do, with files of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from appo.cli_options import ManifestOption, OutOption, RecipeOption, SetOption

data_app = typer.Typer(help="Questions and videos.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.add_typer(data_app, name="data")
    for command in (train, evaluate, compare):
        app.command()(command)


@data_app.command("assemble")
def data_assemble(
    recipe: RecipeOption,
    out: OutOption,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Records and videos -> a checked manifest, decoded frames, a list of rejects, a card."""
    from appo.config import load_recipe
    from appo.data.assemble import assemble

    made = assemble(load_recipe(recipe, overrides), out)
    typer.echo(f"manifest: {made.manifest}\nrejects:  {made.rejects}\ncard:     {made.card}")


def train(
    recipe: RecipeOption,
    manifest: ManifestOption,
    out: OutOption,
    model: Annotated[
        str, typer.Option(help="checkpoint folder or hub name; default: the recipe's model.path")
    ] = "",
    algorithm: Annotated[str, typer.Option(help="default: the recipe's policy.algorithm")] = "",
    seed: Annotated[int | None, typer.Option(help="default: the recipe's first seed")] = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Train one algorithm with one seed; the same command again continues."""
    from appo.config import RecipeError, load_recipe
    from appo.training.run import train as run_training

    settings = load_recipe(recipe, overrides)
    path = model or settings.model.path
    if path is None:
        raise RecipeError("model.path=null: name the checkpoint to start from with --model")
    summary = run_training(
        settings,
        algorithm=algorithm or settings.policy.algorithm,
        seed=settings.training.seeds[0] if seed is None else seed,
        manifest_path=manifest,
        model_path=path,
        out=out,
    )
    typer.echo(f"{summary}\ncheckpoint: {out / 'checkpoint'}")


def evaluate(
    recipe: RecipeOption,
    out: OutOption,
    checkpoint: Annotated[
        list[str],
        typer.Option("--checkpoint", "-c", metavar="NAME=PATH", help="may be repeated; one engine for all"),
    ],
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", "-m", help="for benchmarks that read the run's own test split"),
    ] = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Generate with vLLM, parse and score; finished items are not generated again."""
    from appo.config import load_recipe

    settings = load_recipe(recipe, overrides)
    checkpoints = {}
    for item in checkpoint:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise typer.BadParameter(f"--checkpoint {item}: write it as NAME=PATH")
        checkpoints[name] = path
    from appo.evaluation.run import evaluate as run_evaluation

    results = run_evaluation(settings, checkpoints=checkpoints, manifest_path=manifest, out=out)
    typer.echo(json.dumps(results, indent=2, default=str))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="output folders of trainings")],
    evaluations: Annotated[Path, typer.Option("--evaluations", "-e", help="output folder of an evaluation")],
    recipe: RecipeOption,
    out: OutOption,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Means and deviations over seeds, ratios, plots: one table and one page."""
    from appo.config import load_recipe
    from appo.reports.compare import compare as run_comparison

    made = run_comparison(runs, evaluations, out, recipe=load_recipe(recipe, overrides))
    typer.echo(f"{made.table}\nreport: {made.html}")
