"""The command line: answers at once, loads nothing heavy, and refuses mistakes in one clear line."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from appo import cli
from appo.config import load_recipe

HEAVY = ("torch", "transformers", "vllm", "mlflow", "kfp", "datasets", "boto3", "matplotlib", "av", "decord")
COMMANDS = [
    [],
    ["recipe"],
    ["recipe", "show"],
    ["recipe", "list"],
    ["data"],
    ["data", "assemble"],
    ["train"],
    ["evaluate"],
    ["compare"],
    ["ui"],
    ["pipeline"],
    ["pipeline", "run"],
    ["pipeline", "compile"],
    ["schedule"],
]
appo = [str(Path(sys.executable).parent / "appo")]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*appo, *arguments], capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words) or "appo")
def test_every_command_explains_itself(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_help_answers_within_a_second() -> None:
    """In processor time: the clock on the wall would measure what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 1.0


def test_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, appo.cli; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_recipe_shown_in_full_is_the_same_recipe(tmp_path: Path) -> None:
    shown = run("recipe", "show", "demo", "--set", "training.learning_rate=1e-6")
    path = tmp_path / "mine.yaml"
    path.write_text(shown.stdout)
    assert load_recipe(str(path)) == load_recipe("demo", ["training.learning_rate=1e-6"])
    assert yaml.safe_load(shown.stdout)["policy"]["num_generations"] == 8  # a default, filled in


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe", "show", "dmeo"], ["dmeo", "demo"]),
        (
            ["recipe", "show", "demo", "--set", "training.lr=1"],
            ["training.lr", "unknown key", "learning_rate"],
        ),
        (
            ["recipe", "show", "demo", "--set", "policy.top_p=2"],
            ["policy.top_p", "2", "less than or equal to 1"],
        ),
        (["recipe", "show", "demo", "--set", "policy.algorithm=ppo"], ["ppo", "grpo", "dapo", "appo"]),
        (["recipe", "show", "demo", "--set", "perception.k2=9"], ["perception.k2=9", "8"]),
        (["recipe", "show", "demo", "--set", "seeds"], ["section.key=value"]),
        (["pipeline", "run", "-r", "demo", "--set", "training.seeds=[1, 1]"], ["training.seeds", "twice"]),
        (["pipeline", "run", "-r", "demo", "--set", "training.seeds=[]"], ["training.seeds", "at least one"]),
        (["pipeline", "run", "-r", "demo", "--data", "missing.json"], ["missing.json", "no such file"]),
        (["pipeline", "run", "-r", "demo", "-p", "compare"], ["compare", "compare_policies"]),
        (["pipeline", "compile", "nothing"], ["nothing", "compare_policies"]),
        (["evaluate", "-r", "demo", "-o", "out", "-c", "a=checkpoint"], ["--manifest"]),
        (["train", "-r", "demo", "-m", "m.jsonl", "-o", "out"], ["model.path", "--model"]),
        (["ui", "-f", "nowhere"], ["nowhere", "pipeline run"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_named_with_their_remedy(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    result = run(*arguments, cwd=tmp_path)
    message = " ".join(result.stderr.replace("│", " ").split())
    assert result.returncode == 2
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir())  # refused before anything was written


def test_the_list_shows_model_data_gpus_and_type_of_every_recipe() -> None:
    from appo.config import recipe_names

    shown = CliRunner().invoke(cli.app, ["recipe", "list"], terminal_width=200).output
    for name in recipe_names():
        recipe = load_recipe(name)
        (line,) = (line for line in shown.splitlines() if line.split()[:1] == [name])
        assert recipe.model.dtype in line
        gpus = recipe.cluster.nodes * recipe.cluster.gpus_per_node
        assert (f" {gpus} " if gpus else " none ") in line
        assert recipe.data.source in line
        assert recipe.model.path is None or recipe.model.path.rpartition("/")[2] in line
