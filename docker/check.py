"""Runs the first steps of a compiled pipeline in their images, with the command lines that Kubeflow would
use.

`.venv/bin/python docker/check.py [ENGINE...]`, where ENGINE starts a container tool, such as `docker run
--rm` or `podman --runtime runc run --rm --network host`. The executor's input is what Kubeflow's launcher
would give it; only the object store behind `/srv/appo/out` is missing. Containers run as their own user, with a
read-only root.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

GOLDEN = Path(__file__).parents[1] / "tests" / "pipelines" / "golden" / "compare_policies.yaml"
SMALL = ["data.key_moment.train=8", "data.key_moment.easy_train=8", "data.key_moment.validation=2"]


def main(engine: list[str]) -> None:
    pipeline = next(yaml.safe_load_all(GOLDEN.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        shared.chmod(0o777)  # the container's user is another one
        given = {"recipe": "demo", "overrides": [*SMALL, "data.key_moment.test=2"]}
        run(engine, pipeline, shared, "validate", given)
        resolved = json.loads((shared / "validate" / "executor_output.json").read_text())["parameterValues"]
        assert "name: demo" in resolved["recipe"]
        given_next = {"recipe": resolved["assembly"], "storage": "/srv/appo/out/storage"}
        run(engine, pipeline, shared, "assemble", given_next)
        output = json.loads((shared / "assemble" / "executor_output.json").read_text())
        location = output["artifacts"]["manifest"]["artifacts"][0]["metadata"]["location"]
        manifest = shared / Path(location).relative_to("/srv/appo/out")
        print(
            f"validate and assemble ran in their images: {len(manifest.read_text().splitlines()) - 1} samples"
        )
        refused = run(
            engine, pipeline, shared, "validate", {**given, "overrides": ["policy.top_p=7"]}, fails=True
        )
        assert "policy.top_p" in refused, refused
        print("a bad recipe was refused in the first step")


def run(
    engine: list[str],
    pipeline: dict[str, Any],
    shared: Path,
    name: str,
    parameters: dict[str, Any],
    *,
    fails: bool = False,
) -> str:
    """Run one step; what it writes lies in `shared/name` afterwards. Returns its output."""
    component = pipeline["components"][f"comp-{name}"]
    place = f"/srv/appo/out/{name}"
    (shared / name).mkdir(exist_ok=True)
    (shared / name).chmod(0o777)
    outputs = component.get("outputDefinitions", {})
    given = {
        "inputs": {"parameterValues": parameters},
        "outputs": {
            "outputFile": f"{place}/executor_output.json",
            "parameters": {key: {"outputFile": f"{place}/{key}"} for key in outputs.get("parameters", {})},
            "artifacts": {
                key: {"artifacts": [{"name": key, "uri": f"{place}/{key}", "type": value["artifactType"]}]}
                for key, value in outputs.get("artifacts", {}).items()
            },
        },
    }
    container = pipeline["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
    words = [*container["command"], *container["args"]]
    words = [json.dumps(given) if word == "{{$}}" else word for word in words]
    command = [*engine, "--read-only", "--tmpfs", "/tmp", "-e", "HOME=/tmp", "-v", f"{shared}:/srv/appo/out"]
    done = subprocess.run(
        [*command, container["image"], *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout[-3000:]
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:] or ["docker", "run", "--rm"])
