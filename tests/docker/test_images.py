"""The built images `data` and `cpu`: what Kubeflow would run in them, and the demo's pipeline. `make images-check`.

The cpu image stands in for `train` and `eval`, as on a cluster without GPUs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components.images import image
from tests.docker.containers import OUT, VARIABLE, Images, artifact
from tests.pipelines.test_whole_pipeline import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        VARIABLE not in os.environ, reason=f"needs built images: make images-check ({VARIABLE})"
    ),
]
KINDS = ("data", "cpu")
CPU = image("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """With the pipeline as the cpu image itself compiles it."""
    made = Images.start(os.environ[VARIABLE], tmp_path_factory.mktemp("shared"))
    made.run(CPU, "appo", "pipeline", "compile", "compare_policies", "--out", f"{OUT}/pipeline.yaml")
    made.pipeline = next(yaml.safe_load_all((made.shared / "pipeline.yaml").read_text()))
    yield made
    made.run(CPU, "bash", "-c", f"rm -rf {OUT}/*")  # the folder's files belong to the containers' user


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_runs_as_an_ordinary_user(images: Images, kind: str) -> None:
    assert "Usage: appo" in images.run(image(kind), "appo", "--help")
    assert images.run(image(kind), "id", "-u").strip() == "1000"


def test_the_images_know_their_revision_and_share_it(images: Images) -> None:
    revisions = {images.run(image(kind), "printenv", "APPO_GIT_REVISION").strip() for kind in KINDS}
    assert len(revisions) == 1, f"build them together: {revisions}"
    assert re.fullmatch(r"[0-9a-f]{40}", revisions.pop())


@pytest.mark.parametrize(
    ("kind", "modules"), [("data", "appo.steps, mlflow"), ("cpu", "torch, transformers, vllm")]
)
def test_nothing_is_compiled_anew_on_a_read_only_root(images: Images, kind: str, modules: str) -> None:
    """Layers of a reproducible image carry another time than the files had when their bytecode was made."""
    said = images.run(image(kind), "python", "-W", "ignore", "-v", "-c", f"import {modules}")
    loaded = re.findall(r"^# code object from (\S+)", said, flags=re.MULTILINE)
    assert len(loaded) > 500
    assert not [path for path in loaded if path.strip("'").endswith(".py")]


def test_steps_run_by_their_compiled_command_lines(images: Images) -> None:
    from mlflow.tracking import MlflowClient

    storage, tracking = f"{OUT}/storage", f"tracking.uri=sqlite:///{OUT}/mlflow.db"
    validated = images.step("validate", {"recipe": "demo", "overrides": [*SMALL, tracking]})
    recipes = validated["parameterValues"]
    assembled = images.step("assemble", {"recipe": recipes["assembly"], "storage": storage})
    manifest = artifact(assembled, "manifest")
    lines = (images.shared / Path(manifest["metadata"]["location"]).relative_to(OUT)).read_text().splitlines()
    assert len(lines) > 16 + 32  # a header and the questions

    base = images.step(
        "base-model", {"recipe": recipes["base"], "storage": storage}, {"manifest": manifest}, image=CPU
    )
    trained = images.step(
        "train",
        {"recipe": recipes["recipe"], "storage": storage, "algorithm": "appo", "seed": "0", "variant": ""},
        {"manifest": manifest, "base": artifact(base, "model")},
        image=CPU,
    )
    (summary,) = images.shared.glob("storage/*/train/appo-seed0/summary.json")
    assert json.loads(summary.read_text())["steps"] == 2
    assert artifact(trained, "policy")["metadata"]["location"]

    client = MlflowClient(f"sqlite:///{images.shared / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    (training,) = [run for run in runs if run.data.tags.get("appo.role") == "training"]
    assert training.info.status == "FINISHED"
    assert training.data.tags["appo.image"] == CPU
    revision = images.run(CPU, "printenv", "APPO_GIT_REVISION").strip()
    assert training.data.tags["mlflow.source.git.commit"] == revision


def test_a_bad_recipe_is_refused_in_the_first_step(images: Images) -> None:
    said = images.step("validate", {"recipe": "demo", "overrides": ["policy.top_p=7"]}, fails=True)["log"]
    assert "policy.top_p" in said


def test_the_demo_runs_small_in_the_cpu_image(images: Images) -> None:
    settings = [word for value in SMALL for word in ("--set", value)]
    said = images.run(
        CPU, "appo", "pipeline", "run", "--recipe", "demo", "--folder", f"{OUT}/demo", *settings
    )
    assert "report.html" in said
    trained = {path.parent.name for path in images.shared.glob("demo/*/train/*/summary.json")}
    assert trained == {"grpo-seed0", "dapo-seed0", "appo-seed0"}
