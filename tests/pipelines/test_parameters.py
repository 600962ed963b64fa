"""The run form's parameters for the data: they reach the recipe, or are refused in the first step by name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from appo import cli, plan, steps
from appo.config import RecipeError, load_recipe
from components import validate
from pipelines import catalog, cluster, parameters
from pipelines.console import Story
from pipelines.local import run_graph
from pipelines.parameters import fitting, read_parameters

GOLDEN = Path(__file__).parent / "golden"


def checked(recipe: str = "demo", overrides: tuple[str, ...] = (), **given: Any) -> Any:
    """The recipe that the first step hands on."""
    return plan.resolve(validate.python_func(recipe=recipe, overrides=list(overrides), **given)[0])


def records(folder: Path, *sources: str) -> list[str]:
    path = folder / "q.jsonl"
    lines = [json.dumps({"video": "a.mp4", "question": "?", "answer": "1", "source": s}) for s in sources]
    path.write_text("\n".join(lines))
    return ["data.source=jsonl", f"data.annotations={path}"]


def test_given_values_reach_the_recipe(tmp_path: Path) -> None:
    quotas = {"mine": 5000.0, "ours 動画": "all"}  # a cluster hands numbers of an object over as floats
    recipe = checked(
        overrides=tuple(records(tmp_path, "mine", "ours 動画")),
        quotas=quotas, data_seed=7, num_frames=8, max_pixels=3136,
    )  # fmt: skip
    assert recipe.data.quotas == {"mine": 5000, "ours 動画": "all"}
    assert isinstance(recipe.data.quotas["mine"], int)
    assert (recipe.data.seed, recipe.video.num_frames, recipe.video.max_pixels) == (7, 8, 3136)
    by_rate = checked(fps=1.5)
    assert (by_rate.video.num_frames, by_rate.video.fps) == (None, 1.5)


def test_values_left_alone_leave_the_recipe_alone() -> None:
    overrides = ("data.seed=3", "data.quotas={key_moment: 9}", "video.num_frames=8")
    assert checked(overrides=overrides) == load_recipe("demo", overrides)
    assert checked(overrides=overrides, data_seed=0).data.seed == 0  # 0 is a seed like any other
    assert checked() == load_recipe("demo")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quotas": {"Nowhere": 5}}, r"data\.quotas, Nowhere: no sample .* there are key_moment"),
        ({"quotas": {"key_moment": -1}}, r"quotas, key_moment: -1 must be a count"),
        ({"quotas": {"key_moment": 1.5}}, r"quotas, key_moment: 1\.5 must be a count"),
        ({"quotas": {"key_moment": "some"}}, r"quotas, key_moment: 'some' must be a count"),
        ({"quotas": {"key_moment": True}}, r"quotas, key_moment: True must be a count"),
        ({"quotas": ["key_moment"]}, r"quotas=\['key_moment'\]: must be an object"),
        ({"data_seed": -2}, r"data_seed=-2: must be -1 \(as the recipe says\) or more"),
        ({"data_seed": "one"}, r"data_seed='one': must be a whole number"),
        ({"num_frames": -4}, r"num_frames=-4: must be 0 \(as the recipe says\) or more"),
        ({"num_frames": 2.5}, r"num_frames=2\.5: must be a whole number"),
        ({"fps": -0.5}, r"fps=-0\.5: must be 0"),
        ({"fps": float("nan")}, r"fps=nan: must be 0"),
        ({"num_frames": 8, "fps": 1.0}, r"num_frames=8, fps=1\.0: give one of them, and 0 for the other"),
        ({"max_pixels": -1}, r"max_pixels=-1: must be 0"),
        ({"max_pixels": 100}, r"min_pixels=784 is above max_pixels=100"),
        ({"num_frames": 4}, r"perception\.k2=3.*video\.num_frames=4"),
    ],
)
def test_impossible_values_are_refused_in_the_first_step(given: dict[str, Any], words: str) -> None:
    overrides = ("perception.k2=3",) if given == {"num_frames": 4} else ()
    with pytest.raises(RecipeError, match=words):
        checked(overrides=overrides, **given)


def test_sources_of_ones_own_records_are_looked_up_in_them(tmp_path: Path) -> None:
    overrides = records(tmp_path, "mine", "ours")
    assert checked(overrides=tuple(overrides), quotas={"mine": 1}).data.quotas == {"mine": 1}
    with pytest.raises(RecipeError, match=r"data\.quotas, yours: no sample .* there are mine, ours"):
        checked(overrides=tuple(overrides), quotas={"yours": 1})


def test_a_misspelt_source_is_refused_before_the_records_are_there() -> None:
    with pytest.raises(RecipeError, match=r"problem_types, LLaVA-Video: .*LLaVA-Video-178K"):
        steps.validate("video_r1_34k", ["data.problem_types={LLaVA-Video: [OCR]}"])
    with pytest.raises(RecipeError, match=r"quotas, NextQA: .*NeXT-QA"):
        checked("video_r1_34k", quotas={"NextQA": 5})


@pytest.mark.parametrize("name", catalog.NAMES)
def test_every_form_offers_them_in_the_same_words(name: str) -> None:
    pipeline = next(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text()))
    fields = pipeline["root"]["inputDefinitions"]["parameters"]
    for parameter, text in {**parameters.COMMON, **parameters.DATA}.items():
        assert fields[parameter]["description"] == text
    assert fields["quotas"]["parameterType"] == "STRUCT"
    kinds = {fields[name]["parameterType"] for name in ("data_seed", "num_frames", "max_pixels")}
    assert kinds == {"NUMBER_INTEGER"}
    assert fields["fps"]["parameterType"] == "NUMBER_DOUBLE"


def test_the_local_runner_hands_them_over(tmp_path: Path) -> None:
    """The real first step in kfp's runner: an object stays an object on the way through its files."""
    from kfp import dsl

    given = records(tmp_path, "mine")

    def graph(quotas={}, data_seed=-1, fps=0.0):  # noqa: B006
        validate(recipe="demo", overrides=given, quotas=quotas, data_seed=data_seed, fps=fps)

    # KFP wants the types themselves, not the strings that this file's annotations are.
    graph.__annotations__ = {"quotas": dict, "data_seed": int, "fps": float}
    graph = dsl.pipeline(name="first-step")(graph)
    screen = io.StringIO()
    values = fitting(graph, read_parameters(["quotas={mine: 3}", "data_seed=4", "fps=2"]))
    with Story(Console(file=screen, width=120)) as story:
        run_graph(graph, values, folder=tmp_path / "run", story=story)
    (made,) = (tmp_path / "run" / "kfp").rglob("validate/executor_output.json")
    recipe = plan.resolve(json.loads(made.read_text())["parameterValues"]["recipe"])
    assert (recipe.data.quotas, recipe.data.seed, recipe.video.fps) == ({"mine": 3}, 4, 2.0)


def test_submit_refuses_before_the_server_is_asked() -> None:
    good = cluster.Order("compare_policies", "demo", parameters={"data_seed": 1, "num_frames": 8})
    assert good.arguments()["data_seed"] == 1
    with pytest.raises(RecipeError, match="data_seed=-5"):
        cluster.Order("compare_policies", "demo", parameters={"data_seed": -5}).arguments()


def test_run_refuses_before_a_folder_is_made(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        folder = str(tmp_path / "run")
        return CliRunner().invoke(cli.app, ["pipeline", "run", "-r", "demo", "-f", folder, *words])

    failed = run("-P", "max_pixels=-3")
    assert failed.exit_code
    assert "max_pixels=-3" in failed.output + str(failed.exception)
    failed = run("-P", "frames=8")
    assert failed.exit_code == typer.BadParameter("").exit_code
    assert "has none of this name" in failed.output
    assert not (tmp_path / "run").exists()
