"""A recipe that extends others: what is merged, what is refused, and which file a complaint names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from appo import plan
from appo.config import Recipe, RecipeError, load_recipe, recipe_names
from appo.recipe_files import RENAMED, SHIPPED, base_names

MODEL = {"path": "somewhere"}


def written(folder: Path, name: str, /, **values: object) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_mappings_merge_key_by_key_and_everything_else_replaces(tmp_path: Path) -> None:
    written(
        tmp_path,
        "parts/below.yaml",
        model=MODEL,
        algorithms=["grpo", "dapo"],
        data={"seed": 3, "quotas": {"STAR": "all", "CLEVRER": 6}, "problem_types": {"STAR": ["OCR"]}},
        policy={"temperature": 0.5, "judge": {"workers": 2, "timeout_s": 5}},
    )
    above = written(
        tmp_path,
        "above.yaml",
        extends="parts/below.yaml",
        name="above",
        algorithms=["appo"],
        data={"quotas": {"CLEVRER": 7, "NeXT-QA": 1}},
        policy={"judge": {"workers": 4}},
    )
    recipe = load_recipe(above)
    assert recipe.algorithms == ("appo",)  # a list replaces
    assert recipe.data.seed == 3
    assert recipe.data.quotas == {"STAR": "all", "CLEVRER": 7, "NeXT-QA": 1}
    assert (recipe.policy.temperature, recipe.policy.judge.workers, recipe.policy.judge.timeout_s) == (
        0.5,
        4,
        5,
    )


def test_null_clears(tmp_path: Path) -> None:
    written(
        tmp_path,
        "below.yaml",
        name="below",
        description="of the other",
        model={**MODEL, "lora": {"rank": 4}},
        video={"num_frames": 8},
        data={"quotas": {"STAR": "all", "CLEVRER": 6}, "problem_types": {"STAR": ["OCR"]}, "limit": 9},
        training={"learning_rate": 0.5},
    )
    above = written(
        tmp_path,
        "above.yaml",
        extends="below.yaml",
        name="above",
        model={"lora": None},
        video={"num_frames": None, "fps": 2.0},
        data={"quotas": {"STAR": None}, "problem_types": None, "limit": None},
        training={"learning_rate": None},
    )
    recipe = load_recipe(above)
    assert (recipe.model.path, recipe.model.lora) == ("somewhere", None)
    assert (recipe.video.num_frames, recipe.video.fps) == (None, 2.0)  # null, and not the default of 16
    assert recipe.data.quotas == {"CLEVRER": 6}
    assert (recipe.data.problem_types, recipe.data.limit) == ({}, None)
    assert recipe.training.learning_rate == 1e-6  # cannot be null: the default again
    assert recipe.description == ""  # what the other is, not this one


def test_null_where_nothing_is_below_is_refused_as_ever(tmp_path: Path) -> None:
    path = written(tmp_path, "one.yaml", name="one", model=MODEL, training={"learning_rate": None})
    with pytest.raises(
        RecipeError, match=r"one\.yaml: training\.learning_rate=None: input should be a valid"
    ):
        load_recipe(path)


def test_of_a_list_the_later_lie_above_the_earlier(tmp_path: Path) -> None:
    written(tmp_path, "a.yaml", model=MODEL, data={"seed": 1, "limit": 1})
    written(tmp_path, "b.yaml", data={"seed": 2})
    path = written(tmp_path, "c.yaml", name="c", extends=["a.yaml", "b.yaml"])
    assert (load_recipe(path).data.seed, load_recipe(path).data.limit) == (2, 1)


def test_a_shipped_recipe_is_extended_by_name_and_relative_paths_start_at_their_file(tmp_path: Path) -> None:
    written(tmp_path, "one/middle.yaml", extends="demo", data={"seed": 5})
    path = written(tmp_path, "two/mine.yaml", name="mine", extends="../one/middle.yaml")
    changed = load_recipe("demo", ["data.seed=5", "name=mine", "description=''"])
    assert load_recipe(path) == changed


def test_a_recipe_that_extends_another_has_a_name_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, "mine.yaml", extends="demo")
    with pytest.raises(RecipeError, match=r"mine\.yaml: name: is missing"):
        load_recipe(path)


def test_a_circle_is_refused_with_its_chain(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        written(tmp_path, f"{name}.yaml", extends=f"{other}.yaml")
    with pytest.raises(RecipeError, match=r"a\.yaml -> \S*b\.yaml -> \S*c\.yaml -> \S*a\.yaml"):
        load_recipe(str(tmp_path / "a.yaml"))
    own = written(tmp_path, "self.yaml", extends="../%s/self.yaml" % tmp_path.name)  # noqa: UP031
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(own)


def test_the_same_part_twice_is_no_circle(tmp_path: Path) -> None:
    written(tmp_path, "a.yaml", model=MODEL)
    written(tmp_path, "b.yaml", extends="a.yaml")
    assert load_recipe(written(tmp_path, "c.yaml", name="c", extends=["a.yaml", "b.yaml"])).name == "c"


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("gone.yaml", r"mine\.yaml: extends='gone\.yaml': no such file; a relative path starts at"),
        ("dmeo", r"mine\.yaml: extends='dmeo': unknown, similar are demo"),
        ("video_r1_34k", r"extends='video_r1_34k': is named qwen2\.5_vl_7b_video_r1_34k now"),
        ("paper", r"extends='paper': is a part of recipes .*`extends: base/paper`"),
        (7, r"mine\.yaml: extends=7: must be a recipe's name or path"),
        (["demo", None], r"extends=\['demo', None\]: must be"),
        ({"demo": 1}, r"extends=\{'demo': 1\}: must be"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, extends: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(written(tmp_path, "mine.yaml", name="mine", extends=extends))


def test_a_complaint_names_the_file_that_the_value_stands_in(tmp_path: Path) -> None:
    written(tmp_path, "below.yaml", model=MODEL, training={"learning_rate": -1.0, "save_every": 5})
    above = written(tmp_path, "above.yaml", name="a", extends="below.yaml", policy={"top_p": 2})
    with pytest.raises(RecipeError) as refused:
        load_recipe(above)
    assert sorted(line.rpartition("/")[2].split("=")[0] for line in str(refused.value).splitlines()) == [
        "above.yaml: policy.top_p",
        "below.yaml: training.learning_rate",
    ]
    with pytest.raises(RecipeError, match=r"above\.yaml with .*: training\.lr=1: unknown key"):
        load_recipe(above, ["training.learning_rate=1", "policy.top_p=1", "training.lr=1"])


def test_a_pod_is_sent_text_that_needs_no_other_file(tmp_path: Path) -> None:
    path = written(tmp_path, "mine.yaml", name="mine", extends="qwen2.5_vl_3b_lora_1gpu", data={"seed": 5})
    recipe = plan.resolve(path)
    assert "extends" not in recipe.to_yaml()
    assert plan.resolve(recipe.to_yaml()) == plan.resolve(recipe.to_json()) == recipe


# --- What ships -------------------------------------------------------------------------------------------------


def test_every_shipped_recipe_is_named_as_its_file() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description


def test_parts_are_not_recipes() -> None:
    assert base_names()
    assert not {name.removeprefix("base/") for name in base_names()} & set(recipe_names())
    for name in base_names():
        for asked in {name, name.removeprefix("base/")} - set(RENAMED):
            with pytest.raises(RecipeError, match=f"part of recipes.*extends: {name}"):
                load_recipe(asked)


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_are_refused_with_the_new_one(old: str) -> None:
    with pytest.raises(RecipeError, match=f"'{old}': is named {RENAMED[old]} now".replace(".", r"\.")):
        load_recipe(old)
    assert load_recipe(RENAMED[old]).name == RENAMED[old]
    assert load_recipe(RENAMED[old].replace("_7b_", "_3b_")).video.num_frames == 30


def test_every_setting_of_the_parts_stands_once() -> None:
    """No recipe repeats what it extends: a value changed in one place is changed for all."""

    def leaves(values: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
        found: dict[tuple[str, ...], object] = {}
        for key, value in values.items():
            found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
        return found

    def own(name: str) -> dict:
        return yaml.safe_load(SHIPPED.joinpath(f"{name}.yaml").read_text())

    def inherited(name: str) -> dict:
        values, found = own(name), {}
        references = values.get("extends", [])
        for reference in [references] if isinstance(references, str) else references:
            found |= inherited(reference) | leaves(own(reference))
        return found

    for name in [*recipe_names(), *base_names()]:
        mine, below = leaves(own(name)), inherited(name)
        assert not {key for key in mine.keys() & below.keys() if mine[key] == below[key]} - {("extends",)}, (
            name
        )


def test_the_documents_recipe_is_one_and_names_recipes_that_are(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    mine = load_recipe(str(tmp_path / "mine.yaml"))
    assert (mine.name, mine.video.num_frames, mine.cluster.gpus_per_node) == ("mine", 16, 8)
    shown = {word for name in re.findall(r"\| (`.*?) \|", text) for word in re.findall(r"`(.*?)`", name)}
    sizes = {word.replace("{3b,7b}", size) for word in shown for size in ("3b", "7b")}
    whole = {word for word in sizes if not word.startswith("...")}
    ends = [word.removeprefix("...") for word in sizes if word.startswith("...")]
    assert whole <= set(recipe_names())
    left = set(recipe_names()) - whole
    assert all(name.endswith(tuple(ends)) for name in left)


# algorithm.md's table, that is the paper's section 4.1 and supplement B.
PAPER = {
    "policy": {"num_generations": 8, "max_completion_length": 512, "temperature": 1.0, "top_p": 1.0},
    "training": {
        "prompts_per_step": 16,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-6,
        "lr_schedule": "linear",
        "gradient_checkpointing": True,
        "distributed": "fsdp2",
    },
    "perception": {"k1": 15, "k2": 3, "k3": 64, "tau": 0.5, "max_weight": 1.7, "layers": "last3"},
    "model": {"dtype": "bfloat16", "freeze_vision": True, "lora": None},
    "evaluation": {"temperature": 0.1, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.05},
    "cluster": {"nodes": 2, "gpus_per_node": 8},
}


@pytest.mark.parametrize("data", ["video_r1_34k", "seed_bench_r1_6k", "perception_test_6k", "nextgqa_3k"])
@pytest.mark.parametrize(("size", "frames"), [("3b", 30), ("7b", 16)])
def test_the_papers_recipes_hold_the_papers_settings(size: str, frames: int, data: str) -> None:
    recipe = load_recipe(f"qwen2.5_vl_{size}_{data}")
    values = recipe.model_dump()
    for section, settings in PAPER.items():
        assert settings.items() <= values[section].items()
    assert recipe.model.path == f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"
    assert (recipe.video.num_frames, recipe.video.max_pixels) == (frames, 224 * 224)
    grounding = data == "nextgqa_3k"
    assert recipe.training.epochs == (2 if grounding else 1)
    assert recipe.data.template == ("grounding" if grounding else "reasoning")
    weights = {"accuracy": 0.9, "format": 0.1}
    if grounding:
        weights = {"accuracy": 1.0, "format": 0.1, "temporal_iou": 1.0}
    assert recipe.policy.reward_weights == weights
    assert recipe.evaluation.data_parallel == recipe.cluster.gpus_per_node


def _whole_groups(recipe: Recipe) -> bool:
    """Whether a process scores whole groups at a time: a group over several passes is scored twice as slowly."""
    processes = max(1, recipe.cluster.nodes * recipe.cluster.gpus_per_node)
    rows = recipe.training.prompts_per_step * recipe.policy.num_generations
    rows /= processes * recipe.training.gradient_accumulation_steps
    return rows % recipe.policy.num_generations == 0


@pytest.mark.parametrize("name", recipe_names())
def test_groups_divide_over_the_gpus_that_a_recipe_asks_for(name: str) -> None:
    assert _whole_groups(load_recipe(name))
