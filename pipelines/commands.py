"""`appo pipeline ...` and `appo schedule ...`. Imports kfp only when a command runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from appo.cli_options import RecipeOption, SetOption, file_to_read, file_to_write, folder_to_write
from pipelines.catalog import NAMES

pipeline = typer.Typer(help="Whole pipelines: on this machine, as YAML, on a cluster.", no_args_is_help=True)
schedule = typer.Typer(help="Recurring pipelines on a cluster.", no_args_is_help=True)
ParameterOption = Annotated[
    list[str],
    typer.Option("--parameter", "-P", metavar="NAME=VALUE", help="of the pipeline, in YAML; may be repeated"),
]
NameArgument = Annotated[str, typer.Argument(help=f"one of {', '.join(NAMES)}")]


@pipeline.command("run")
def run(
    recipe: RecipeOption,
    name: Annotated[str, typer.Option("--pipeline", "-p", help=f"one of {', '.join(NAMES)}")] = NAMES[0],
    data: Annotated[
        Path | None,
        typer.Option(
            help="records (JSON or JSON lines) to use instead of the recipe's", callback=file_to_read
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", "-f", help="default: runs/RECIPE", callback=folder_to_write)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget what finished before")] = False,
    parameters: ParameterOption = [],  # noqa: B006
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Run a pipeline on this machine; the same command again continues after the last finished step."""
    from appo import plan, steps
    from appo.data.sources import reads_records
    from pipelines import catalog
    from pipelines.console import Story
    from pipelines.local import run_graph
    from pipelines.parameters import fitting, overrides_of, read_parameters

    if data is not None:
        overrides = [
            f"data.annotations={json.dumps(str(data.resolve()))}",
            f"data.root={json.dumps(str(_root_of(data.resolve())))}",
            *overrides,
        ]
    # Refused here, before a folder is made.
    settings = plan.resolve(recipe, overrides)
    if data is not None and not reads_records(settings):
        raise typer.BadParameter(
            f"--data {data}: data.source={settings.data.source} makes its own records and reads none; "
            "choose another recipe (such as smoke) or data.source"
        )
    given = fitting(catalog.build(name, settings), read_parameters(parameters))
    resolved = steps.validate(recipe, [*overrides, *overrides_of(given)], given.get("variants", ()))
    cluster = resolved.cluster.model_copy(update={"local": True})
    graph = catalog.build(name, resolved.model_copy(update={"cluster": cluster}))
    folder = (folder or Path("runs") / resolved.name).resolve()
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if resolved.tracking.uri is None:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    with Story() as story:
        run_graph(
            graph,
            {"recipe": resolved.to_yaml(), "storage": str(folder), **given},
            folder=folder,
            story=story,
        )
    _say_results(folder, Path(plan.layout(resolved, str(folder)).report))


@pipeline.command("compile")
def compile_(
    name: NameArgument = NAMES[0],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="default: build/pipelines/NAME.yaml", callback=file_to_write),
    ] = None,
    recipe: RecipeOption = "demo",
    overrides: SetOption = [],  # noqa: B006
    images: Annotated[
        str, typer.Option(help="registry and path of the images, such as registry.example/appo")
    ] = "",
    tag: Annotated[str, typer.Option(help="tag of the images; default: the version of appo")] = "",
) -> None:
    """Write a pipeline's YAML for Kubeflow Pipelines; pods ask for what the recipe's cluster section says."""
    from appo import checks
    from appo.config import load_recipe
    from pipelines.compile import compile_pipeline

    resolved = load_recipe(recipe, overrides)
    checks.refuse(checks.submitted(resolved), checks.ALONE)
    path = out or Path("build/pipelines") / f"{name}.yaml"
    compile_pipeline(name, path, recipe=recipe, overrides=overrides, images=images, tag=tag)
    typer.echo(f"pipeline: {path}")


def _root_of(data: Path) -> Path:
    """The folder that the records' paths start from: the file's own, or the one above it.

    Publishers write both: `clips/a.mp4` beside the file, and `set/clips/a.mp4` for a file that lies in
    `set/`.
    """
    text = data.read_bytes().decode("utf-8-sig", "replace")  # assembly refuses what is not UTF-8
    try:
        records = json.loads(text)
    except json.JSONDecodeError:  # one record a line
        try:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError:  # assembly says what is wrong with it
            return data.parent
    records = records if isinstance(records, list) else []
    names = [
        str(record.get("path") or record.get("video") or "") for record in records if isinstance(record, dict)
    ]
    for folder in (data.parent, data.parent.parent):
        if any(name and (folder / name).is_file() for name in names):
            return folder
    return data.parent


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


EndpointOption = Annotated[
    str | None, typer.Option(help="address of Kubeflow Pipelines; default: KF_PIPELINES_ENDPOINT")
]
NamespaceOption = Annotated[
    str, typer.Option(help="Kubernetes namespace (the profile's, where there are several)")
]
StorageOption = Annotated[str, typer.Option(help="s3:// prefix below which all files of the run lie")]
ExperimentOption = Annotated[str, typer.Option(help="experiment on the server")]
AccountOption = Annotated[str, typer.Option(help="Kubernetes service account of the run")]
ImagesOption = Annotated[str, typer.Option(help="registry and path of the images")]
TagOption = Annotated[str, typer.Option(help="tag of the images; default: the version of appo")]


@pipeline.command("submit")
def submit(
    name: NameArgument = NAMES[0],
    recipe: RecipeOption = "demo",
    overrides: SetOption = [],  # noqa: B006
    endpoint: EndpointOption = None,
    namespace: NamespaceOption = "appo",
    storage: StorageOption = "s3://appo/runs",
    experiment: ExperimentOption = "appo",
    service_account: AccountOption = "appo-launcher",
    images: ImagesOption = "",
    tag: TagOption = "",
    run_name: Annotated[str, typer.Option(help="default: the pipeline and the recipe")] = "",
    mlflow_experiment: Annotated[str, typer.Option(help="for Kubeflow's own MLflow plugin")] = "",
    no_mlflow_plugin: Annotated[bool, typer.Option(help="tell that plugin to leave this run alone")] = False,
    parameters: ParameterOption = [],  # noqa: B006
) -> None:
    """Start a pipeline on a cluster. The recipe is checked and sent along; images need not know it."""
    from pipelines import cluster
    from pipelines.parameters import read_parameters

    mlflow = {"disabled": True} if no_mlflow_plugin else None
    if mlflow_experiment:
        mlflow = {"experiment_name": mlflow_experiment}
    order = cluster.Order(
        pipeline=name,
        recipe=recipe,
        overrides=overrides,
        storage=storage,
        experiment=experiment,
        service_account=service_account,
        images=images,
        tag=tag,
        mlflow=mlflow,
        parameters=read_parameters(parameters),
    )
    order.check()  # whatever can be refused from here is, before the server is asked
    client = cluster.connect(endpoint, namespace)
    run_id = cluster.submit(client, order, name=run_name or f"{name} {recipe}", namespace=namespace)
    typer.echo(f"run: {run_id}")


@schedule.command("apply")
def schedule_apply(
    name: Annotated[str, typer.Argument(help="name of the schedule; the same name again changes it")],
    cron: Annotated[str, typer.Option(help="six fields, seconds first: '0 0 3 * * 1' is Mondays at three")],
    pipeline_name: Annotated[
        str, typer.Option("--pipeline", "-p", help=f"one of {', '.join(NAMES)}")
    ] = NAMES[0],
    recipe: RecipeOption = "demo",
    overrides: SetOption = [],  # noqa: B006
    endpoint: EndpointOption = None,
    namespace: NamespaceOption = "appo",
    storage: StorageOption = "s3://appo/runs",
    experiment: ExperimentOption = "appo",
    service_account: AccountOption = "appo-launcher",
    images: ImagesOption = "",
    tag: TagOption = "",
    parameters: ParameterOption = [],  # noqa: B006
) -> None:
    """Create the recurring run NAME, or replace it when anything about it changed."""
    from pipelines import cluster
    from pipelines.parameters import read_parameters

    order = cluster.Order(
        pipeline=pipeline_name,
        recipe=recipe,
        overrides=overrides,
        storage=storage,
        experiment=experiment,
        service_account=service_account,
        images=images,
        tag=tag,
        parameters=read_parameters(parameters),
    )
    order.check()
    cluster.check_cron(cron)
    client = cluster.connect(endpoint, namespace)
    typer.echo(f"{name}: {cluster.apply_schedule(client, order, name=name, cron=cron, namespace=namespace)}")


@schedule.command("list")
def schedule_list(endpoint: EndpointOption = None, namespace: NamespaceOption = "appo") -> None:
    """The recurring runs of a namespace."""
    from pipelines import cluster

    for run in cluster.list_schedules(cluster.connect(endpoint, namespace), namespace):
        cron = run.trigger.cron_schedule.cron if run.trigger and run.trigger.cron_schedule else "-"
        typer.echo(f"{run.display_name:<30} {cron:<20} {run.status}")


@schedule.command("delete")
def schedule_delete(
    name: Annotated[str, typer.Argument(help="name of the schedule")],
    endpoint: EndpointOption = None,
    namespace: NamespaceOption = "appo",
) -> None:
    """Delete the recurring run NAME; not an error when there is none."""
    from pipelines import cluster

    count = cluster.delete_schedule(cluster.connect(endpoint, namespace), name, namespace=namespace)
    typer.echo(f"{name}: {'deleted' if count else 'was not there'}")
