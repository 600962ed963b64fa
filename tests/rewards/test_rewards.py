"""Rewards: format, accuracy by problem type, and the streams that a recipe asks for."""

from __future__ import annotations

import pytest

from appo.config import load_recipe
from appo.data.schema import VideoSample
from appo.rewards import format_reward, reward_functions
from appo.rewards.accuracy import accuracy_reward, word_error_rate


def sample(problem_type: str = "multiple choice", answer: str = "B", **fields) -> VideoSample:
    options = ("a", "b", "c") if problem_type in ("multiple choice", "temporal grounding") else ()
    fields = {"options": options} | fields
    return VideoSample(
        id="1", source="t", problem_type=problem_type, question="?", answer=answer, video="v.mp4", **fields
    )


def said(answer: str) -> str:
    return f"<think>t</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "template", "reward"),
    [
        (said("B"), "reasoning", 1.0),
        (" <think> cross\nshows </think> \n <answer> B </answer> ", "bare", 1.0),
        (said("B") + " more", "reasoning", 0.0),
        ("hm " + said("B"), "reasoning", 0.0),
        ("<think>t</think> so <answer>B</answer>", "reasoning", 0.0),
        # the usual regular expression takes both of these
        (said("A") + "<answer>B</answer>", "reasoning", 0.0),
        ("<think>t<think></think><answer>B</answer>", "reasoning", 0.0),
        ("<answer>B</answer><think>t</think>", "reasoning", 0.0),
        ("<think>t</think><answer>B", "reasoning", 0.0),
        ("", "reasoning", 0.0),
        (said("B"), "grounding", 0.0),
        (said("B") + " <time> 1 to 2 </time>", "grounding", 1.0),
        ("<observation>o</observation>" + said("B"), "observation", 1.0),
        (said("B"), "observation", 0.0),
    ],
)
def test_format(text, template, reward):
    assert format_reward(text, template=template) == reward


@pytest.mark.parametrize(
    ("problem_type", "truth", "answer", "accuracy"),
    [
        ("multiple choice", "B", "B", 1.0),
        ("multiple choice", "B", "B.", 1.0),
        ("multiple choice", "B", "C", 0.0),
        ("temporal grounding", "B", "b", 1.0),
        ("numerical", "1000", "1,000", 1.0),
        ("numerical", "2.50", "2.5", 1.0),
        ("numerical", "2", "2.004", 1.0),
        ("numerical", "2", "2.006", 0.0),
        ("numerical", "2", "two", 0.0),
        ("regression", "10", "12", 0.8),
        ("regression", "10", "25", 0.0),
        ("OCR", "one two three four", "one two three five", 0.75),
        ("OCR", "one", "a b c d", 0.0),
        ("free-form", "the cat sat", "the cat sat", 1.0),
        ("free-form", "the cat sat", "dog", 0.0),
    ],
)
def test_accuracy_is_measured_by_the_samples_own_type(problem_type, truth, answer, accuracy):
    # 1e-8: Video-R1's regression reward adds 1e-9 to both sides of the quotient
    assert accuracy_reward(said(answer), sample(problem_type, truth)) == pytest.approx(accuracy, abs=1e-8)


def test_no_answer_is_wrong_for_every_type():
    for problem_type, truth in [
        ("multiple choice", "B"),
        ("numerical", "0"),
        ("OCR", "x"),
        ("regression", "0"),
    ]:
        assert accuracy_reward("<think>0 x B", sample(problem_type, truth)) == 0.0


def test_either_of_two_equal_right_options_is_right():
    twice = sample(options=("sit", "sit", "run"), answer="B")
    assert accuracy_reward(said("A"), twice) == 1.0
    assert accuracy_reward(said("sit"), twice) == 1.0


def test_word_error_rate_by_hand():
    assert word_error_rate(["a", "b", "c", "d"], ["a", "c", "d", "e"]) == pytest.approx(0.5)
    assert word_error_rate([], []) == 0.0
    assert word_error_rate(["a"], []) == 1.0


def test_a_recipe_gets_the_streams_it_weighs_and_always_accuracy():
    demo = reward_functions(load_recipe("demo"))
    assert list(demo) == ["accuracy", "format"]
    assert [f(said("B"), sample()) for f in demo.values()] == [1.0, 1.0]
    only = reward_functions(load_recipe("demo", ["policy.reward_weights={temporal_iou: 1.0}"]))
    assert list(only) == ["accuracy", "temporal_iou"]
    with pytest.raises(ValueError, match=r"policy\.reward_weights\.style: no such reward"):
        reward_functions(load_recipe("demo", ["policy.reward_weights={style: 1.0}"]))


def test_temporal_reward_is_set_iou_and_absent_without_true_times():
    recipe = load_recipe(
        "demo", ["policy.reward_weights={accuracy: 1, temporal_iou: 1}", "data.template=grounding"]
    )
    reward = reward_functions(recipe)["temporal_iou"]
    timed = sample("temporal grounding", key_times=((0.0, 4.0), (6.0, 8.0)), duration_s=8.0)
    assert reward(said("B") + "<time>0 to 4, 6 to 100</time>", timed) == 1.0
    assert reward(said("B") + "<time>0 to 4</time>", timed) == pytest.approx(4 / 6)
    assert reward(said("B"), timed) == 0.0
    assert reward(said("B"), sample()) is None
