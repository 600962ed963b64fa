"""Every shipped recipe runs as shipped: from its records to its report, in its own dtype and layout.

Parametrised over `recipe_names()`, so that a recipe that is added is in. What a test may replace is in one list
(`tests.recipes.replaceable`); a difference outside it fails.

The graph runs all trainings of a recipe. Here the steps are called one by one, with all of its algorithms and its first
seed alone: other seeds run the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from appo.config import Recipe, load_recipe, recipe_names
from tests.recipes.whole_path import (
    Sets,
    check_evaluation,
    check_layout,
    check_report,
    check_trainings,
    run,
)
from tests.tiers import long


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for all recipes: making its tables takes longer than a training."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


@long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs_as_shipped(
    name: str, made: Sets, stand_in: Callable[[Recipe], Path | None], tracking: str, tmp_path: Path
) -> None:
    run_ = run(name, made, stand_in(load_recipe(name)), tmp_path / "run", tracking)
    check_trainings(run_)
    check_evaluation(run_)
    check_report(run_, tracking)


def test_a_run_is_not_made_to_pass_by_its_names() -> None:
    """`check_layout` refuses a layout that only carries the name."""
    noted = {
        "layout": "fsdp2",
        "processes": 2,
        "distributed": "MULTI_CPU",
        "wrapped": ["DistributedDataParallel"],
        "policy": ["Qwen2_5_VLForConditionalGeneration"],
        "trained": ["torch.float32"],
        "adapters": False,
        "checkpointing": True,
        "completions": 8,
        "completion_tokens": 512,
        "learning_rate": 1e-6,
    }
    with pytest.raises(AssertionError):
        check_layout(noted, load_recipe("qwen2.5_vl_7b_video_r1_34k"))
    sharded = {**noted, "policy": ["FSDPModule"], "distributed": "FSDP"}
    check_layout(sharded, load_recipe("qwen2.5_vl_7b_video_r1_34k"))
    with pytest.raises(AssertionError):
        check_layout({**sharded, "trained": ["torch.bfloat16"]}, load_recipe("qwen2.5_vl_7b_video_r1_34k"))
