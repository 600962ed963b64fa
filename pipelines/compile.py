"""A graph -> the YAML that Kubeflow Pipelines runs; equal input gives equal bytes.

`python -m pipelines.compile FOLDER` writes every pipeline: the golden files that the tests compare with.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from appo.config import load_recipe
from appo.errors import status_of
from appo.storage import write_atomic
from pipelines import catalog


def compile_pipeline(
    name: str,
    path: Path,
    *,
    recipe: str = "demo",
    overrides: Sequence[str] = (),
    images: str = "",
    tag: str = "",
) -> None:
    """Write pipeline `name` to `path`, with pods as the recipe's cluster section asks.

    images, tag: where the cluster finds the images; must be given before the components are imported.
    Raises UnknownPipeline or RecipeError before anything is written.
    """
    resolved = load_recipe(recipe, overrides)
    for variable, value in {"APPO_IMAGES": images, "APPO_IMAGE_TAG": tag}.items():
        if value:
            os.environ[variable] = value
    from kfp import compiler

    graph = catalog.build(name, resolved)
    # A shipped recipe goes by name, a file or a changed one as its text: on one line, since KFP repeats
    # defaults in the comment at the head of the file.
    shipped = not overrides and not recipe.endswith((".yaml", ".yml"))
    parameters = {"recipe": recipe if shipped else resolved.to_json()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(graph, str(made), pipeline_parameters=parameters)
        write_atomic(path, _with_choices(made.read_text(encoding="utf-8"), catalog.choices(name)))


def _with_choices(text: str, choices: Mapping[str, list[str]]) -> str:
    """Add the values that the form offers for a parameter to the first document, which is the pipeline."""
    if not choices:
        return text
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    documents = list(yaml.safe_load_all(text))
    for parameter, values in choices.items():
        documents[0]["root"]["inputDefinitions"]["parameters"][parameter]["literals"] = values
    return head + yaml.safe_dump_all(documents, sort_keys=True)


def main(folder: str) -> None:
    for name in catalog.NAMES:
        compile_pipeline(name, Path(folder) / f"{name}.yaml")


if __name__ == "__main__":
    sys.exit(status_of(lambda: main(sys.argv[1])))
