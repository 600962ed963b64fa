"""Laws of scoring, and prediction files that must be refused: with file, line and reason."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from appo.evaluation.benchmarks import benchmark_class
from appo.evaluation.predictions import Prediction, PredictionError, PredictionLog
from appo.evaluation.scoring import flat, metrics_of, score, score_items

NEXTGQA = Path(__file__).parent.parent / "data" / "nextgqa"
BENCHMARK = benchmark_class("nextgqa").load(NEXTGQA, "val")
ITEMS = BENCHMARK.items
IDS = [item.id for item in ITEMS]

letters = st.sampled_from(["A", "B", "C", "D", "E", "b.", "(C)", "Z", "a dog", ""])
times = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), max_size=3)
responses = st.one_of(
    st.text(max_size=40),
    st.builds(
        lambda letter, spans: (
            f"<think>x</think><answer>{letter}</answer><time>"
            + ", ".join(f"{s} to {e}" for s, e in spans)
            + "</time>"
        ),
        letters,
        times,
    ),
)
files = st.dictionaries(st.sampled_from(IDS), responses)


def metrics(said: dict[str, str], benchmark=BENCHMARK):
    return metrics_of(
        benchmark, score_items(benchmark, {name: Prediction(name, text) for name, text in said.items()})
    )


def values(said: dict[str, str], benchmark=BENCHMARK) -> dict[str, float]:
    return {name: value for name, value in flat(metrics(said, benchmark)).items() if name != "items"}


@given(files)
@settings(max_examples=60, deadline=None)
def test_scores_stay_between_zero_and_one(said):
    assert all(0.0 <= value <= 1.0 for value in values(said).values())


@given(files, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_order_changes_nothing(said, shuffler: random.Random):
    """Of the predictions, and of the annotations. 1e-12: means are summed in another order."""
    names = list(said)
    shuffler.shuffle(names)
    items = list(ITEMS)
    shuffler.shuffle(items)
    shuffled = values({name: said[name] for name in names}, type(BENCHMARK)(items, "val"))
    assert shuffled == pytest.approx(values(said), abs=1e-12)


@given(files, st.sampled_from(IDS), responses)
@settings(max_examples=60, deadline=None)
def test_another_wrong_answer_never_raises_a_score(said, name, response):
    """A wrong answer in the place of a missing one, of an unreadable one, or of any other one."""
    item = next(item for item in ITEMS if item.id == name)
    wrong = "A" if item.answer != "A" else "B"
    after = values(said | {name: f"<answer>{wrong}</answer>"})
    before = values(said)
    # The share of items with a time or an answer is no score, and may rise.
    measures = [n for n in before if not n.endswith(("_rate", "time_given"))]
    assert all(after[n] <= before[n] + 1e-12 for n in measures)


def test_silence_equals_wrong_answers():
    assert values({})["missing_rate"] == 1.0
    assert all(value == 0.0 for name, value in values({}).items() if name != "missing_rate")


def test_a_megabyte_of_answer_is_scored(tmp_path):
    long = "<answer>" + "a 1 to 2 " * 110_000 + "</answer><time>" + "1 to 2, " * 100_000 + "</time>"
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": IDS[0], "response": long}) + "\n")
    found = score("nextgqa", annotations=NEXTGQA, predictions=path, split="val")
    assert found["missing_rate"] == pytest.approx(14 / 15)


def test_flat_names_are_such_as_mlflow_takes():
    import re

    assert all(re.fullmatch(r"[\w\-. /]+", name) for name in values({}))


GOOD = json.dumps({"id": IDS[0], "response": "x"})


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([GOOD, "{broken"], r"line 2: is not JSON"),
        ([GOOD, '["a"]'], r"line 2: is list, not an object"),
        ([GOOD, "", '{"response": "x"}'], r"line 3: id: is missing"),
        ([GOOD, json.dumps({"id": IDS[1]})], r"line 2: response: is missing"),
        ([json.dumps({"id": IDS[0], "response": 3})], r"line 1: response=3: must be a string"),
        ([json.dumps({"id": "nobody", "response": "x"})], r"line 1: id 'nobody' is not an item"),
        ([GOOD, GOOD], rf"line 2: id '{IDS[0]}' was given in line 1 already"),
        ([json.dumps({"id": True, "response": "x"})], r"line 1: id=True: must be a string"),
        ([GOOD, "[" * 100_000], r"line 2: is not JSON: .*recursion"),
        ([GOOD, '{"id": ' + "9" * 5000 + "}"], r"line 2: is not JSON: .*digits"),
        ([GOOD, "\udcff"], r"line 2: is not UTF-8"),
        ([""], None),
        (["\ufeff" + GOOD], None),
        ([json.dumps({"id": IDS[0], "response": "<answer>\ud800</answer>"})], None),
        (
            [json.dumps({"id": IDS[0], "response": "x", "finish_reason": 1})],
            r"line 1: finish_reason=1",
        ),
    ],
)
def test_malformed_predictions_are_refused_by_line(tmp_path, lines, complaint):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    if complaint is None:  # odd, and nothing wrong with it
        assert score("nextgqa", annotations=NEXTGQA, predictions=path, split="val")["accuracy"] == 0.0
        return
    with pytest.raises(PredictionError, match=rf"p\.jsonl, {complaint}"):
        score("nextgqa", annotations=NEXTGQA, predictions=path, split="val")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"answer": "A"}, "span: is missing"),
        ({"span": [1, 2]}, "answer: is missing"),
        ({"answer": "A", "span": [1]}, r"span=\[1\]: must be \[start, end\]"),
        ({"answer": "A", "span": "1-2"}, "span='1-2'"),
        ({"answer": "A", "span": [1, float("nan")]}, "span="),
        ({"answer": "A", "span": [1, 10**400]}, "span="),
        ({"answer": "A", "span": [True, 2]}, "span="),
        ({"answer": "A", "span": []}, "span="),
        ({"answer": ["A"], "span": [1, 2]}, "answer="),
    ],
)
def test_malformed_spans_are_refused_by_line(tmp_path, record, complaint):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": IDS[0], **record}))
    with pytest.raises(PredictionError, match=f"line 1: {complaint}"):
        score("nextgqa", annotations=NEXTGQA, predictions=path, split="val", time_format="span")


def test_spans_of_other_systems(tmp_path):
    """Answers by letter, by text and by index; spans alone or in a list; nothing at all."""
    lines = []
    for number, item in enumerate(ITEMS):
        index = ord(item.answer) - ord("A")
        answer = [item.answer, item.options[index], index, str(index)][number % 4]
        spans = item.extra["spans"]
        lines.append({"id": item.id, "answer": answer, "span": spans if number % 2 else spans[0]})
    lines[0] |= {"answer": None, "span": None}
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = score("nextgqa", annotations=NEXTGQA, predictions=path, split="val", time_format="span")
    assert found["official"]["Acc@QA"] == pytest.approx(14 / 15)
    assert found["missing_rate"] == pytest.approx(1 / 15)


def test_the_command_prints_json_and_refuses_with_status_2(tmp_path):
    import subprocess
    import sys

    from appo.cli import app

    path = tmp_path / "p.jsonl"
    path.write_text(GOOD)
    command = ["score", "nextgqa", "--annotations", str(NEXTGQA), "--predictions", str(path)]
    result = CliRunner().invoke(app, [*command, "--split", "val", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["official"]["Acc@QA"] == 0.0
    path.write_text("{broken")
    done = subprocess.run(
        [sys.executable, "-m", "appo.cli", *command, "--split", "val"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "p.jsonl, line 1: is not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    for wrong in (["--split", "all"], ["--split", "val", "--time-format", "x"]):
        assert CliRunner().invoke(app, [*command, *wrong]).exit_code != 0


# --- files that runs write ----------------------------------------------------------------------------------


def test_a_log_continues_after_a_cut_line_and_refuses_other_settings(tmp_path):
    path = tmp_path / "a" / "b.jsonl"
    log = PredictionLog(path, {"seed": 0})
    log.add({"id": "1", "response": "x"})
    log.add({"id": "2", "response": None, "error": "no frames"})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "3", "resp')
    again = PredictionLog(path, {"seed": 0})
    assert list(again.records) == ["1"]  # the failed item is tried again
    again.add({"id": "3", "response": "é"})
    again.close()
    assert path.read_bytes().startswith(whole)
    assert list(PredictionLog(path, {"seed": 0}).records) == ["1", "3"]
    with pytest.raises(PredictionError, match=r"generated with other settings \(seed\)"):
        PredictionLog(path, {"seed": 1})


@given(st.integers(0, 400))
@settings(max_examples=25, deadline=None)
def test_a_log_cut_anywhere_loses_only_the_line_it_was_cut_in(tmp_path_factory, size):
    path = tmp_path_factory.mktemp("log") / "b.jsonl"
    log = PredictionLog(path, {"seed": 0})
    for number in range(8):
        log.add({"id": str(number), "response": "a\u2028b"})
    log.close()
    data = path.read_bytes()[:size]
    path.write_bytes(data)
    again = PredictionLog(path, {"seed": 0})
    assert list(again.records) == [str(number) for number in range(max(0, data.count(b"\n") - 1))]
