"""Runs things in the built images as a cluster would: their own user, a read-only root, no privileges.

`Images.step` runs one step of a compiled pipeline by its compiled command line, told by the message that Kubeflow's
launcher gives; only the object store behind the folder of outputs is missing.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The start of a command that runs a container, such as "docker run --rm"; `make images-check` sets it.
VARIABLE = "APPO_CONTAINER_RUN"
OUT = "/srv/appo/out"
LOCKED = ("--read-only", "--tmpfs", "/tmp", "-e", "HOME=/tmp", "--cap-drop", "ALL")
# Of a model this small, several threads mostly wait for one another.
ONE_THREAD = ("-e", "OMP_NUM_THREADS=1")


@dataclass
class Images:
    """engine: the start of the command; shared: the folder that every container sees as OUT."""

    engine: list[str]
    shared: Path
    pipeline: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, engine: str, shared: Path) -> Images:
        shared.chmod(0o777)  # the user in the containers is another one
        return cls(shlex.split(engine), shared)

    def run(self, image: str, *words: str, fails: bool = False) -> str:
        """Run `words` in `image`; returns everything printed. Fails unless its end is as expected."""
        options = ["--security-opt", "no-new-privileges", "-v", f"{self.shared}:{OUT}"]
        options += ["-e", f"APPO_IMAGE={image}"]  # pods get it from their annotation
        done = subprocess.run(
            [*self.engine, *LOCKED, *ONE_THREAD, *options, image, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stdout[-6000:]
        return done.stdout

    def step(
        self,
        name: str,
        parameters: dict[str, Any],
        artifacts: dict[str, dict[str, Any]] | None = None,
        *,
        image: str | None = None,
        fails: bool = False,
    ) -> dict[str, Any]:
        """Run step `name` -> its output message, with the key "log" added.

        parameters, artifacts: its inputs by name; an artifact as an earlier step's output message holds it.
        image: instead of the one in the pipeline.
        """
        component = self.pipeline["components"][f"comp-{name}"]
        container = self.pipeline["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        place = self.shared / name
        place.mkdir(exist_ok=True)
        place.chmod(0o777)
        given = json.dumps(_message(component, f"{OUT}/{name}", parameters, artifacts or {}))
        words = [given if word == "{{$}}" else word for word in (*container["command"], *container["args"])]
        started = time.monotonic()
        log = self.run(image or container["image"], *words, fails=fails)
        print(f"{name}: {time.monotonic() - started:.0f} s")
        written = place / "executor_output.json"
        return {"log": log, **(json.loads(written.read_text()) if written.exists() else {})}


def artifact(output: dict[str, Any], name: str) -> dict[str, Any]:
    """The artifact `name` of a step's output message."""
    (made,) = output["artifacts"][name]["artifacts"]
    return made


def _message(
    component: dict[str, Any],
    place: str,
    parameters: dict[str, Any],
    artifacts: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    outputs = component.get("outputDefinitions", {})
    return {
        "inputs": {
            "parameterValues": parameters,
            "artifacts": {name: {"artifacts": [value]} for name, value in artifacts.items()},
        },
        "outputs": {
            "outputFile": f"{place}/executor_output.json",
            "parameters": {name: {"outputFile": f"{place}/{name}"} for name in outputs.get("parameters", {})},
            "artifacts": {
                name: {"artifacts": [{"name": name, "uri": f"{place}/{name}", "type": value["artifactType"]}]}
                for name, value in outputs.get("artifacts", {}).items()
            },
        },
    }
