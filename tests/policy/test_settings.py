"""The registry: each algorithm's own values, what a recipe overrides, and one file adding one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import appo.policy
from appo.config import Policy
from appo.policy import Algorithm, algorithms, base, register, settings_for


def test_the_papers_values() -> None:
    grpo, dapo, appo_, pa_grpo = (
        settings_for(Policy(algorithm=name)) for name in ("grpo", "dapo", "appo", "pa_grpo")
    )
    assert (grpo.beta, grpo.epsilon_low, grpo.epsilon_high, grpo.loss) == (0.01, 0.2, 0.2, "grpo")
    assert (dapo.beta, dapo.epsilon_low, dapo.epsilon_high, dapo.loss) == (0.0, 0.2, 0.28, "dapo")
    assert [s.uses_perception_weights for s in (grpo, dapo, appo_, pa_grpo)] == [False, False, True, False]
    assert dapo.tags == appo_.tags == ()
    assert pa_grpo.tags == ("observation",)
    assert pa_grpo.reward_names == ("perception", "accuracy", "format")


def test_appo_differs_from_dapo_by_its_weights_alone() -> None:
    dapo, ours = (settings_for(Policy(algorithm=name)) for name in ("dapo", "appo"))
    for field in dapo.__dataclass_fields__:
        if field not in ("algorithm", "uses_perception_weights"):
            assert getattr(ours, field) == getattr(dapo, field)


def test_a_recipes_own_values_win_zero_included() -> None:
    policy = Policy(algorithm="grpo", beta=0.0, epsilon_high=0.3, loss="dapo", perception_weights=True)
    found = settings_for(policy)
    assert (found.beta, found.epsilon_low, found.epsilon_high, found.loss) == (0.0, 0.2, 0.3, "dapo")
    assert found.uses_perception_weights


def test_the_overlong_punishment_joins_the_stream_of_the_whole_completion() -> None:
    for name in ("dapo", "pa_grpo"):
        plain, punished = (
            settings_for(Policy(algorithm=name, overlong_buffer=buffer)).streams for buffer in (0, 16)
        )
        assert punished[:-1] == plain[:-1]
        assert punished[-1].rewards == {**plain[-1].rewards, "overlong": 1.0}


def test_a_stream_without_reward_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"policy.reward_weights=\{'perception': 1.0\}: leaves the reasoning"
    ):
        settings_for(Policy(algorithm="pa_grpo", reward_weights={"perception": 1.0}))
    with pytest.raises(ValueError, match="reward_weights"):
        settings_for(Policy(algorithm="dapo", reward_weights={"accuracy": 0.0}))


def test_a_name_is_taken_once() -> None:
    algorithms()
    with pytest.raises(ValueError, match=r"'grpo': already registered by appo\.policy\.grpo"):
        register("grpo")(type("Another", (Algorithm,), {}))


def test_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'ppo' is no algorithm; known are appo, dapo, grpo, pa_grpo"):
        Policy(algorithm="ppo")
    with pytest.raises(ValueError, match=r"policy\.algorithm='ppo': unknown"):
        settings_for(Policy().model_copy(update={"algorithm": "ppo"}))


def test_every_file_of_the_folder_registers_or_says_that_it_does_not() -> None:
    files = {path.stem for path in Path(appo.policy.__file__).parent.glob("*.py")} - {"__init__"}
    assert files - base._NOT_ALGORITHMS == set(algorithms())
    assert files >= base._NOT_ALGORITHMS


def test_one_file_adds_an_algorithm(tmp_path: Path) -> None:
    """The example of docs/new_algorithm.md, dropped into a copy of the package, is found by its name."""
    guide = (Path(__file__).parents[2] / "docs/new_algorithm.md").read_text()
    example = guide.split("```python\n")[1].split("```")[0]
    package = Path(appo.policy.__file__).parents[1]
    copy = tmp_path / "appo"
    (copy / "policy").mkdir(parents=True)
    (copy / "recipes").mkdir()
    for path in [
        "__init__.py",
        "config.py",
        "errors.py",
        "sections.py",
        "prompts.py",
        *(f"policy/{p.name}" for p in (package / "policy").glob("*.py")),
    ]:
        (copy / path).write_text((package / path).read_text())
    (copy / "policy/token_grpo.py").write_text(example)
    program = (
        "import sys; from appo.config import Policy; from appo.policy import settings_for;"
        "s = settings_for(Policy(algorithm='token_grpo'));"
        "print(s.algorithm, s.beta, s.loss, 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["token_grpo", "0.0", "dapo", "False"]
