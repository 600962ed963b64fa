"""Where a run's files lie: equal work in equal places, changed settings never in the place of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from appo import plan, steps
from appo.config import RecipeError, load_recipe, parse_recipe


def places(*overrides: str) -> plan.Layout:
    return plan.layout(load_recipe("demo", overrides), "/runs")


def test_trainings_are_every_algorithm_with_every_seed() -> None:
    made = plan.trainings(load_recipe("demo", ["algorithms=[dapo, appo]", "training.seeds=[3, 5]"]))
    assert [training.name for training in made] == ["dapo-seed3", "appo-seed3", "dapo-seed5", "appo-seed5"]


@pytest.mark.parametrize(
    ("override", "moved"),
    [
        ("data.seed=7", {"data", "base", "trainings", "evaluation", "report"}),
        ("video.num_frames=8", {"data", "base", "trainings", "evaluation", "report"}),
        ("model.warm_start.steps=9", {"base", "trainings", "evaluation", "report"}),
        ("training.learning_rate=1", {"trainings", "evaluation", "report"}),
        ("perception.max_weight=1.2", {"trainings", "evaluation", "report"}),
        ("evaluation.max_tokens=9", {"evaluation"}),
        ("training.seeds=[9]", set()),  # another seed stands beside the others
        ("algorithms=[appo]", set()),
        ("data.workers=1", set()),  # changes speed, not content
        ("cluster.gpus_per_node=4", set()),
    ],
)
def test_a_setting_moves_exactly_what_it_changes(override: str, moved: set[str]) -> None:
    before, after = places(), places(override)
    names = ("data", "base", "trainings", "evaluation", "report")
    assert {name for name in names if getattr(before, name) != getattr(after, name)} == moved


def test_assembly_is_shared_by_runs_that_train_otherwise() -> None:
    one, other = load_recipe("demo"), load_recipe("demo", ["training.max_steps=1", "perception.k1=2"])
    assert plan.assembly_recipe(one) == plan.assembly_recipe(other)
    assert plan.base_recipe(one) == plan.base_recipe(other)
    longer = load_recipe("demo", ["model.warm_start.steps=9"])
    assert plan.assembly_recipe(one) == plan.assembly_recipe(longer)
    assert plan.base_recipe(one) != plan.base_recipe(longer)


def test_steps_agree_on_places_whichever_recipe_they_were_given() -> None:
    recipe = load_recipe("demo", ["data.seed=3"])
    full = plan.layout(recipe, "/runs")
    assert plan.layout(plan.assembly_recipe(recipe), "/runs").data == full.data
    assert plan.layout(plan.base_recipe(recipe), "/runs").base == full.base


@pytest.mark.parametrize("form", ["to_yaml", "to_json"])
def test_a_recipe_survives_the_way_between_steps(form: str) -> None:
    recipe = load_recipe("demo", ["training.learning_rate=1e-6", "cluster.queue=video"])
    text = getattr(recipe, form)()
    assert parse_recipe(text) == recipe
    assert plan.resolve(text) == recipe
    assert plan.resolve(text, ["training.max_steps=3"]).training.max_steps == 3


def test_new_records_are_new_work(tmp_path: Path) -> None:
    """The first step looks at the records themselves: the same name with other contents moves everything."""
    records = tmp_path / "records.json"
    places = []
    for text in ("[]", "[]", "[{}]"):
        records.write_text(text)
        recipe = steps.validate("demo", [f"data.annotations={records}"])
        places.append(plan.layout(recipe, "/runs"))
    assert places[0] == places[1]
    assert places[0].data != places[2].data
    assert places[0].trainings != places[2].trainings


def test_records_that_cannot_be_read_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.annotations=.*missing.json"):
        steps.validate("demo", [f"data.annotations={tmp_path / 'missing.json'}"])


def test_text_that_is_no_recipe_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe given as text: trainig.*unknown key"):
        plan.resolve("name: x\ntrainig: {}\n")


def test_an_ablation_varies_each_setting_with_every_seed() -> None:
    recipe = load_recipe("demo", ["algorithms=[appo]", "training.seeds=[1, 2]"])
    made = plan.ablation(recipe, ["hard: perception.strategy=hard", "k: perception.k1=3 perception.k3=4"])
    assert [t.name for t, _ in made] == ["appo.hard-seed1", "appo.k-seed1", "appo.hard-seed2", "appo.k-seed2"]
    assert made[0][1].perception.strategy == "hard"
    assert (made[1][1].perception.k1, made[1][1].perception.k3) == (3, 4)
    places = {plan.layout(changed, "/runs").training(training) for training, changed in made}
    assert len(places) == 4
    assert {plan.layout(changed, "/runs").base for _, changed in made} == {plan.layout(recipe, "/runs").base}


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        (["hard perception.strategy=hard"], "name: section.key=value"),
        (["a b: perception.k1=3"], "name: section.key=value"),
        (["a: perception.k1=3", "a: perception.k1=4"], "'a'.*twice"),
        (["a: perception.k9=3"], "perception.k9.*unknown key"),
        (["a: video.num_frames=8"], "changes the data or the model"),
    ],
)
def test_variants_that_cannot_be_compared_are_refused(variants: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plan.ablation(load_recipe("demo"), variants)
