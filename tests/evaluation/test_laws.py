"""What holds for the scores of every benchmark, whatever a model says."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.evaluation.benchmarks import BENCHMARKS, benchmark_class
from appo.evaluation.predictions import Prediction
from appo.evaluation.scoring import flat, metrics_of, score_items
from tests.evaluation import test_benchmarks as made
from tests.tiers import LONG

ALL = sorted(BENCHMARKS)
LETTERS = [
    "A",
    "B",
    "b.",
    "(C)",
    "C. sit",
    "Z",
    "a dog",
    "sit",
    "outdoors",
    "4",
    "4.2",
    "-1e400",
    "$B$",
    "\\boxed{A}",
    "",
]


@pytest.fixture(scope="module")
def benchmarks(small_set, tmp_path_factory):
    """One small instance of each, with several items and groups."""
    folder = tmp_path_factory.mktemp("all")
    found = {
        "key_moment": benchmark_class("key_moment").load(small_set.manifest, "test"),
        "mvbench": made.mvbench(folder / "m").load(folder / "m", "test"),
        "nextgqa": benchmark_class("nextgqa").load(made.NEXTGQA, "val"),
        "perception_test": made.perception_test(folder / "p"),
        "seed_bench_r1": made.seed_bench(folder / "s").load(folder / "s", "test"),
        "vsi_bench": made.vsi(folder / "v"),
    }
    head = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    rows = [
        f"7,1,1,1,why,{i % 5},{i},{t},run,sit,sleep on it,jump,eat"
        for i, t in enumerate(["CW", "TN", "TP", "DO"])
    ]
    made.write(folder / "n/test.csv", head + "\n".join(rows) + "\n")
    found["nextqa"] = benchmark_class("nextqa").load(folder / "n", "test")
    assert sorted(found) == ALL
    return found


def values(benchmark, said: dict[str, str]) -> dict[str, float]:
    predictions = {name: Prediction(name, text) for name, text in said.items()}
    found = flat(metrics_of(benchmark, score_items(benchmark, predictions)))
    return {name: value for name, value in found.items() if name != "items"}


def responses(seed: int, benchmark) -> dict[str, str]:
    """Some answer to most items: right ones, wrong ones, unreadable ones, times of every kind."""
    rng = random.Random(seed)
    said = {}
    for item in benchmark.items:
        answer = item.answer if rng.random() < 0.3 else rng.choice(LETTERS)
        spans = ", ".join(f"{rng.randint(0, 99)} to {rng.randint(0, 99)}" for _ in range(rng.randint(0, 3)))
        if rng.random() < 0.85:
            said[item.id] = (
                f"<think>{rng.choice(LETTERS)}</think><answer>{answer}</answer><time>{spans}</time>"
            )
    return said


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(8))
def test_scores_stay_in_the_unit_interval_and_order_changes_nothing(benchmarks, name, seed):
    benchmark, said = benchmarks[name], responses(seed, benchmarks[name])
    found = values(benchmark, said)
    assert all(0.0 <= value <= 1.0 for value in found.values()), found
    items, names = list(benchmark.items), list(said)
    random.Random(seed).shuffle(items)
    random.Random(-seed).shuffle(names)
    shuffled = values(type(benchmark)(items, benchmark.split), {one: said[one] for one in names})
    # 1e-12: means are summed in another order.
    assert shuffled == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_answer_in_place_of_any_other_never_raises_a_score(benchmarks, name, seed):
    benchmark, said = benchmarks[name], responses(seed, benchmarks[name])
    before = values(benchmark, said)
    for item in random.Random(seed).sample(list(benchmark.items), min(4, len(benchmark.items))):
        if not item.options:
            wrong = "1e9"
        else:
            right = item.options[ord(item.answer) - ord("A")]
            wrong = next(chr(ord("A") + i) for i, option in enumerate(item.options) if option != right)
        after = values(benchmark, said | {item.id: f"<answer>{wrong}</answer>"})
        # The share of items with a time or an answer is no score, and may rise.
        measures = [metric for metric in before if not metric.endswith(("_rate", "time_given"))]
        assert all(after[metric] <= before[metric] + 1e-12 for metric in measures)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "response", ["<think>A B 4 <answer>{}</answer>", "<think>{}", "{}", "", "<answer>{}"]
)
def test_what_is_not_in_a_closed_answer_outside_of_thinking_is_wrong(benchmarks, name, response):
    """Each given the right answer: an unclosed think, no tag, no end of the tag."""
    benchmark = benchmarks[name]
    found = values(benchmark, {item.id: response.format(item.answer) for item in benchmark.items})
    assert found["accuracy"] == 0.0
    assert found["unparsed_rate"] == 1.0


@pytest.mark.parametrize("name", ALL)
def test_the_truth_scores_one_and_cut_off_it_scores_zero(benchmarks, name):
    benchmark = benchmarks[name]
    right = {item.id: f"<think>x</think><answer>{item.answer}</answer>" for item in benchmark.items}
    assert values(benchmark, right)["accuracy"] == pytest.approx(1.0)
    cut = {one: Prediction(one, text, "length") for one, text in right.items()}
    found = metrics_of(benchmark, score_items(benchmark, cut))
    assert (found["accuracy"], found["truncated_rate"]) == (0.0, 1.0)


@given(st.text(st.characters(codec=None)), st.text())
@settings(max_examples=80, deadline=None)
def test_any_text_is_scored(benchmarks, answer, time_text):
    """Lone surrogates, controls, other digits and letters: inside the tags, where parsers look."""
    said = f"<answer>{answer}</answer><time>{time_text}</time>"
    for benchmark in benchmarks.values():
        found = values(benchmark, {benchmark.items[-1].id: said})
        assert all(0.0 <= value <= 1.0 for value in found.values())


PIECES = [
    "A ",
    "(B)",
    "B.",
    "a. ",
    "1",
    "1,234 ",
    "- ",
    " $",
    "\\boxed{",
    "sleep on it ",
    "<think>",
    "<answer>",
    "\u2028",
    "١",
]


@pytest.mark.parametrize("piece", PIECES)
def test_a_megabyte_is_scored_in_linear_time(benchmarks, piece):
    """Ten seconds for fourteen parses: what is quadratic takes minutes, a fourth of it (`make test`) a dozen seconds."""
    size = 1 << (20 if LONG else 18)
    long = piece * (size // len(piece.encode()))
    began = time.process_time()
    for benchmark in benchmarks.values():
        item = benchmark.items[-1]
        for text in (f"<answer>{long}</answer><time>{long}</time>", long):
            benchmark.score(item, Prediction(item.id, text))
    assert time.process_time() - began < (10 if LONG else 5)
