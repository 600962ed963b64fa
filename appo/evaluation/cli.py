"""The commands `appo evaluate` and `appo score`. Free of torch until they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from appo.cli_options import OutOption, SetOption, file_or_folder, file_to_read

PAPER = "qwen2.5_vl_7b_video_r1_34k"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (evaluate, score):
        app.command()(command)


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]MODEL...", help="checkpoint folders or hub names; one engine for all"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="default: the paper's settings and benchmarks, in one process"),
    ] = None,
    out: OutOption = Path("runs/evaluation"),
    checkpoint: Annotated[
        list[str] | None,
        typer.Option("--checkpoint", "-c", metavar="NAME=PATH", help="the same as an argument NAME=MODEL"),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option("--benchmark", "-b", metavar="NAME", help="default: the recipe's evaluation.benchmarks"),
    ] = None,
    annotations: Annotated[
        str | None, typer.Option(help="folder of the publishers' files, one sub-folder a benchmark")
    ] = None,
    videos: Annotated[
        str | None, typer.Option(help="the same for videos; default: beside the annotations")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", "-m", help="for key_moment, a manifest's own test split")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="vllm or transformers")] = None,
    seeds: Annotated[int | None, typer.Option(help="times that each item is generated")] = None,
    overrides: SetOption = [],  # noqa: B006
) -> None:
    """Generate with vLLM, parse and score; finished items are not generated again."""
    from appo.config import load_recipe
    from appo.evaluation.run import evaluate as run_evaluation

    sets = [*([] if recipe else ["evaluation.data_parallel=1"]), *overrides]
    if benchmark:
        from appo.evaluation.benchmarks import benchmark_class

        names = [benchmark_class(name).name for name in benchmark]
        sets.append(f"evaluation.benchmarks={json.dumps(names)}")
    for key, value in (
        ("annotations", annotations),
        ("videos", videos),
        ("engine", engine),
        ("seeds", seeds),
    ):
        if value is not None:
            sets.append(f"evaluation.{key}={json.dumps(value)}")  # a path is no YAML
    checkpoints = named([*(models or []), *(checkpoint or [])])
    results = run_evaluation(
        load_recipe(recipe or PAPER, sets),
        checkpoints={name: _here(path) for name, path in checkpoints.items()},
        manifest_path=manifest,
        out=out,
    )
    typer.echo(json.dumps(results, indent=2))


def _here(path: str) -> str:
    """What lies in a store is fetched, when it is a whole checkpoint; evaluation itself looks at folders."""
    from appo.modeling.checkpoints import fetched
    from appo.storage import is_s3

    return fetched(path) if is_s3(path) else path


def named(models: list[str]) -> dict[str, str]:
    """`NAME=PATH` as it is; a bare path under the name of its last folder."""
    found: dict[str, str] = {}
    for item in models:
        name, equals, path = item.partition("=")
        if not equals:
            name, path = Path(item).name, item
        if not name or not path:
            raise typer.BadParameter(f"{item}: write it as NAME=PATH, or PATH alone")
        if name in found:
            raise typer.BadParameter(f"{item}: the name {name} is taken; write NAME=PATH with another one")
        found[name] = path
    if not found:
        raise typer.BadParameter("name at least one checkpoint")
    return found


def score(
    name: Annotated[str, typer.Argument(metavar="BENCHMARK", help="such as nextgqa; see docs/evaluation.md")],
    annotations: Annotated[
        Path,
        typer.Option(help="folder of the publisher's files, or the file itself", callback=file_or_folder),
    ],
    predictions: Annotated[
        Path, typer.Option(help='JSONL of {"id": ..., "response": ...} lines', callback=file_to_read)
    ],
    split: Annotated[str | None, typer.Option(help="default: the benchmark's first")] = None,
    time_format: Annotated[
        str, typer.Option(help='tags: <time> in the response; span: {"id", "answer", "span": [s, e]} lines')
    ] = "tags",
    span_rule: Annotated[
        str,
        typer.Option(help="NExT-GQA: several intervals become their hull, or the best (looks at the truth)"),
    ] = "hull",
    as_json: Annotated[bool, typer.Option("--json", help="the metrics as JSON on standard output")] = False,
) -> None:
    """Score a file of predictions, from here or from elsewhere. Missing and unreadable answers are wrong."""
    from appo.evaluation.scoring import flat
    from appo.evaluation.scoring import score as run_scoring

    metrics = run_scoring(
        name,
        annotations=annotations,
        predictions=predictions,
        split=split,
        time_format=time_format,
        span_rule=span_rule,
    )
    if as_json:
        typer.echo(json.dumps(metrics, indent=2))
        return
    for metric, value in flat(metrics).items():
        typer.echo(f"{metric:<48} {value:.4f}" if isinstance(value, float) else f"{metric:<48} {value}")
