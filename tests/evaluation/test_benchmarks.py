"""Golden cases: every benchmark's parsers, metrics and averages against values worked out by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from appo.evaluation.benchmarks import BENCHMARKS, AnnotationError, benchmark_class
from appo.evaluation.benchmarks.mvbench import TASKS
from appo.evaluation.benchmarks.mvbench import read_letter as mvbench_letter
from appo.evaluation.benchmarks.nextqa import read_letter as nextqa_letter
from appo.evaluation.benchmarks.vsi_bench import mean_relative_accuracy
from appo.evaluation.predictions import Prediction
from appo.evaluation.scoring import metrics_of, score_items

NEXTGQA = Path(__file__).parent.parent / "data" / "nextgqa"


def said(answer: str, time: str | None = None) -> str:
    return f"<think>so</think><answer>{answer}</answer>" + (f"<time>{time}</time>" if time else "")


def scored(benchmark, responses: dict[str, str]):
    predictions = {name: Prediction(name, response) for name, response in responses.items()}
    return metrics_of(benchmark, score_items(benchmark, predictions))


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return path


def test_names_are_found_as_people_write_them():
    for name, title in [
        ("nextgqa", "NExT-GQA"),
        ("seed_bench_r1", "SEED-Bench-R1"),
        ("vsi_bench", "VSI-Bench"),
    ]:
        assert benchmark_class(title) is benchmark_class(name)
    assert all(benchmark_class(name).name == name for name in BENCHMARKS)
    with pytest.raises(ValueError, match="unknown; known are key_moment, mvbench"):
        benchmark_class("videomme")


# --- SEED-Bench-R1 ---------------------------------------------------------------------------------------------


def seed_bench(folder: Path, **changes):
    record = {
        "sample_id": 0,
        "question": "What next?",
        **{f"choice_{letter}": f"option {letter}" for letter in "abcd"},
        "golden_choice_idx": "B",
        "task_progress_metadata": [{"start_frame": 0}],
        "video_source": "EpicKitchens",
        "video_basename": "v.mp4",
        "current_observation_basename": "o.png",
    }
    rows = [record | {"sample_id": 0}, record | {"sample_id": 1, "task_progress_metadata": []}]
    write(folder / "validation_L1.jsonl", "\n".join(json.dumps(row | changes) for row in rows))
    write(folder / "validation_L3.jsonl", json.dumps(record))
    return benchmark_class("seed_bench_r1")


def test_seed_bench_reads_levels_and_leaves_out_videos_without_progress(tmp_path):
    found = seed_bench(tmp_path).load(tmp_path, "test").items
    assert [item.id for item in found] == ["L1_0", "L1_1", "L3_0"]
    assert found[0].video == "videos/EpicKitchens/v.mp4"
    assert found[0].image == "images/EpicKitchens/o.png"
    assert found[1].video is None
    assert [item.id for item in seed_bench(tmp_path).load(tmp_path, "L1").items] == ["0", "1"]


@pytest.mark.parametrize(
    ("answer", "official", "paper"),
    [
        ("B", 1, 1),
        ("B. option b", 1, 1),
        ("Because it is dirty", 1, 0),  # its first character
        ("Answer: B", 0, 1),
        ("b", 0, 1),
        ("option b", 0, 1),
        (r"$B$", 1, 0),  # math_verify
        (r"\boxed{B}", 1, 0),
        (r"$C$", 0, 0),
        ("C", 0, 0),
    ],
)
def test_seed_bench_letter(tmp_path, answer, official, paper):
    benchmark = seed_bench(tmp_path).load(tmp_path, "L3")
    metrics = scored(benchmark, {"0": said(answer)})
    assert (metrics["official"]["accuracy"], metrics["paper"]["accuracy"]) == (official, paper)


def test_seed_bench_reports_each_level(tmp_path):
    benchmark = seed_bench(tmp_path).load(tmp_path, "test")
    metrics = scored(benchmark, {"L1_0": said("B"), "L3_0": said("A")})
    assert metrics["official"]["level/L1/accuracy"] == 0.5
    assert metrics["official"]["level/L3/accuracy"] == 0.0
    assert metrics["missing_rate"] == pytest.approx(1 / 3)


# --- Perception Test -------------------------------------------------------------------------------------------


def perception_test(folder: Path):
    question = {
        "id": 4,
        "question": "Where?",
        "options": ["indoors", "outdoors", "I don't know"],
        "answer_id": 1,
        "area": "physics",
        "reasoning": "descriptive",
        "tag": ["motion"],
    }
    write(
        folder / "mc_question_valid.json",
        {
            "video_1": {"metadata": {}, "mc_question": [question, question | {"id": 5, "area": "memory"}]},
        },
    )
    return benchmark_class("perception_test").load(folder, "val")


@pytest.mark.parametrize(
    ("answer", "official", "paper"),
    [
        ("B", 1, 1),
        ("(B) outdoors", 1, 1),
        ("I think B", 1, 0),
        ("A person is outdoors: B", 0, 0),  # the article is the first standalone letter
        ("outdoors", 0, 1),
        ("b", 0, 1),
        ("B and C", 1, 0),
    ],
)
def test_perception_test_letter(tmp_path, answer, official, paper):
    benchmark = perception_test(tmp_path)
    metrics = scored(benchmark, {item.id: said(answer) for item in benchmark.items})
    assert (metrics["official"]["accuracy"], metrics["paper"]["accuracy"]) == (official, paper)


def test_perception_test_groups_and_ids(tmp_path):
    benchmark = perception_test(tmp_path)
    assert [item.id for item in benchmark.items] == ["video_1_4", "video_1_5"]
    metrics = scored(benchmark, {"video_1_4": said("B")})["official"]
    assert (metrics["area/physics/accuracy"], metrics["area/memory/accuracy"]) == (1.0, 0.0)
    assert metrics["reasoning/descriptive/accuracy"] == 0.5


# --- MVBench ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("(B) a dog", "B"),  # the bracket is dropped, then B comes before the article
        ("C. a dog", "C"),
        ("c. a dog", "C"),
        ("b", "B"),
        ("a dog", "A"),  # the English article
        ("It is a dog", "A"),
        ("Best option: (D)", "D"),
        ("the dog", None),
        ("E", "E"),
        ("F", None),
        ("", None),
        ("B.", "B"),
        ("dog-b", "B"),  # a hyphen becomes a space
    ],
)
def test_mvbench_letter(answer, letter):
    assert mvbench_letter(answer) == letter


def mvbench(folder: Path):
    for index, task in enumerate(TASKS):
        record = {"video": "v.mp4", "question": "?", "candidates": ["x", "y"], "answer": "y"}
        write(folder / "json" / f"{task}.json", [record] * (1 if index else 3))
    return benchmark_class("mvbench")


def test_mvbench_overall_is_the_mean_of_tasks_and_empty_answers_are_wrong(tmp_path):
    benchmark = mvbench(tmp_path).load(tmp_path, "test")
    first = next(iter(TASKS))
    responses = {item.id: said("B") for item in benchmark.items}
    responses[f"{first}_0"] = said("A")
    responses[f"{first}_1"] = "<answer></answer>"
    metrics = scored(benchmark, responses)
    assert metrics["official"][f"task/{first}/accuracy"] == pytest.approx(1 / 3)
    # not 20/22 of the questions, and not 20 of the 21 that were answered
    assert metrics["accuracy"] == pytest.approx((19 + 1 / 3) / 20)
    assert metrics["unparsed_rate"] == pytest.approx(1 / 22)


def test_mvbench_lacking_a_task_is_refused(tmp_path):
    kind = mvbench(tmp_path)
    (tmp_path / "json" / "moving_count.json").unlink()
    with pytest.raises(AnnotationError, match=r"lacks moving_count\.json"):
        kind.load(tmp_path, "test")


# --- NExT-QA ---------------------------------------------------------------------------------------------------

FIVE = ("run", "sit", "sleep on it", "jump", "eat")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("(A) or (B)", "B"),  # the last one wins
        ("B or D ", "D"),
        ("it is D. surely", "D"),
        ("USA is A great", "A"),
        ("I would say they sleep on it", "C"),  # more than five words: the option's text
        ("sleep on it", None),  # no more than five words: a guess there, wrong here
        ("none of these", None),
    ],
)
def test_nextqa_letter(answer, letter):
    assert nextqa_letter(answer, FIVE) == letter


def test_nextqa_groups_fold_tp_into_tn(tmp_path):
    head = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    rows = [
        f"7,1,1,1,why,1,{index},{kind},run,sit,sleep on it,jump,sit"
        for index, kind in enumerate(["CW", "TN", "TP", "DO"])
    ]
    write(tmp_path / "test.csv", head + "\n".join(rows) + "\n")
    benchmark = benchmark_class("nextqa").load(tmp_path, "test")
    metrics = scored(benchmark, {"7_0": said("B"), "7_1": said("E"), "7_2": said("A"), "7_3": said("sit")})
    official, paper = metrics["official"], metrics["paper"]
    # E is the right text given twice; "sit" is too short for the official parser
    assert {name: official[f"group/{name}/accuracy"] for name in "CTD"} == {"C": 1.0, "T": 0.5, "D": 0.0}
    assert official["type/TN/accuracy"] == 0.5
    assert "type/TP/accuracy" not in official
    assert paper["accuracy"] == 0.75


# --- NExT-GQA --------------------------------------------------------------------------------------------------


def gqa(folder: Path, spans, duration: float = 40.0):
    head = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    write(folder / "val.csv", head + "7,1,1,1,why,sit,3,CW,run,sit,sleep,jump,eat\n")
    write(folder / "gsub_val.json", {"7": {"duration": duration, "fps": 30, "location": {"3": spans}}})
    return benchmark_class("nextgqa").load(folder, "val")


@pytest.mark.parametrize(
    ("true", "time", "official", "paper"),
    [
        # (IoP, IoU) of each variant
        ([[10, 20]], "10 to 20", (1, 1), (1, 1)),
        ([[10, 20]], "15 to 25", (0.5, 5 / 15), (0.5, 5 / 15)),
        # several true spans: the best of each, never their union
        ([[0, 10], [20, 30]], "0 to 30", (10 / 30, 10 / 30), (20 / 30, 20 / 30)),
        ([[0, 10], [20, 40]], "0 to 22", (10 / 22, 10 / 22), (12 / 22, 12 / 40)),
        # several predicted spans: their hull, officially
        ([[0, 10], [20, 30]], "0 to 10, 20 to 30", (10 / 30, 10 / 30), (1, 1)),
        ([[0, 10]], "20 to 30; 0 to 10", (10 / 30, 10 / 30), (0.5, 0.5)),
        # zero length: the script's IoP of 1 stays, the set has no such span
        ([[10, 20]], "15 to 15", (1, 0), (0, 0)),
        ([[10, 20]], "25 to 25", (0, 0), (0, 0)),
        # past the end: the script takes it as it is, the set is clipped to the video (40 s)
        ([[30, 50]], "30 to 50", (1, 1), (1, 1)),
        ([[30, 40]], "30 to 60", (10 / 30, 10 / 30), (1, 1)),
        # reversed: no interval; the script's quotient of two negative lengths would be an IoP of 1
        ([[10, 20]], "20 to 10", (0, 0), (0, 0)),
        ([[10, 20]], "30 to 1, 10 to 20", (1, 1), (1, 1)),
        ([[10, 20]], None, (0, 0), (0, 0)),
    ],
)
def test_nextgqa_spans(tmp_path, true, time, official, paper):
    metrics = scored(gqa(tmp_path, true), {"7_3": said("sit", time)})
    for variant, (iop, iou) in (("official", official), ("paper", paper)):
        assert metrics[variant]["mIoP"] == pytest.approx(iop, abs=1e-12)
        assert metrics[variant]["mIoU"] == pytest.approx(iou, abs=1e-12)
        assert metrics[variant]["Acc@GQA"] == float(iop >= 0.5)
        assert metrics[variant]["IoU@0.5"] == float(iou >= 0.5)
        assert metrics[variant]["time_given"] == float(time is not None)


def test_nextgqa_best_span_is_a_choice_that_is_recorded(tmp_path):
    benchmark = gqa(tmp_path, [[0, 10]])
    benchmark.span_rule = "best"
    metrics = scored(benchmark, {"7_3": said("B", "20 to 30; 0 to 10")})
    assert metrics["official"]["mIoU"] == 1.0
    assert "best" in metrics["parsers"]["official"]


def test_nextgqa_grounding_without_the_right_answer_is_no_gqa(tmp_path):
    metrics = scored(gqa(tmp_path, [[10, 20]]), {"7_3": said("run", "10 to 20")})["official"]
    assert (metrics["mIoU"], metrics["Acc@QA"], metrics["Acc@GQA"]) == (1.0, 0.0, 0.0)


def test_nextgqa_on_real_annotations_truth_scores_one_and_silence_zero():
    benchmark = benchmark_class("nextgqa").load(NEXTGQA, "val")
    assert len(benchmark.items) == 15
    truth = {}
    for item in benchmark.items:
        spans = ", ".join(f"{start} to {end}" for start, end in item.extra["spans"])
        truth[item.id] = said(item.options[ord(item.answer) - ord("A")], spans)
    metrics = scored(benchmark, truth)
    assert all(metrics["paper"][name] == 1.0 for name in ("Acc@QA", "Acc@GQA", "mIoP", "mIoU"))
    assert metrics["official"]["Acc@QA"] == 1.0
    some = dict(list(truth.items())[:5])
    partly = scored(benchmark, some)
    assert partly["paper"]["mIoU"] == pytest.approx(5 / 15)  # the publisher's script would say 1
    assert partly["missing_rate"] == pytest.approx(10 / 15)


def test_nextgqa_published_script_replayed_on_real_annotations():
    """The measures again, span by span in the plainest Python, for a system that always says the middle third."""
    benchmark = benchmark_class("nextgqa").load(NEXTGQA, "val")
    raw = json.loads((NEXTGQA / "gsub_val.json").read_text())
    responses, ious, iops = {}, [], []
    for item in benchmark.items:
        video, qid = item.id.rsplit("_", 1)
        third = round(raw[video]["duration"] / 3, 1)
        start, end = third, 2 * third
        responses[item.id] = said("A", f"{start} to {end}")
        best_iou = best_iop = 0.0
        for s, e in raw[video]["location"][qid]:
            inter = min(end, e) - max(start, s)
            best_iou = max(best_iou, inter / (max(end, e) - min(start, s)))
            best_iop = max(best_iop, inter / (end - start))
        ious.append(best_iou)
        iops.append(best_iop)
    official = scored(benchmark, responses)["official"]
    assert official["mIoU"] == pytest.approx(sum(ious) / len(ious), abs=1e-9)
    assert official["mIoP"] == pytest.approx(sum(iops) / len(iops), abs=1e-9)
    assert official["IoP@0.3"] == sum(iop >= 0.3 for iop in iops) / len(iops)
    assert official["IoU@0.3"] == sum(iou >= 0.3 for iou in ious) / len(ious)


# --- VSI-Bench -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "score"),
    [
        (10.0, 1.0),
        (10.5, 1.0),
        (10.51, 0.9),
        (11, 0.9),
        (13.5, 0.4),
        (13.51, 0.3),
        (15, 0.1),
        (15.01, 0.0),
        (6.5, 0.4),
        (5, 0.1),
        (4.99, 0.0),
        (None, 0.0),
        (float("inf"), 0.0),
        (float("nan"), 0.0),
    ],
)
def test_vsi_mean_relative_accuracy_at_its_ten_thresholds(predicted, score):
    """Equality counts: a relative error of exactly 0.35 scores 0.4, where the strict reading gives 0.3."""
    assert mean_relative_accuracy(predicted, 10.0) == pytest.approx(score)


def vsi(folder: Path):
    base = {"dataset": "scannet", "scene_name": "s1", "question": "?"}
    kinds = ["easy", "medium", "hard"]
    choice = {"options": ["A. left", "B. right"], "ground_truth": "A"}
    rows = [base | choice | {"question_type": f"object_rel_direction_{kind}"} for kind in kinds]
    rows.append(base | choice | {"question_type": "route_planning"})
    rows.append(base | {"question_type": "object_counting", "options": None, "ground_truth": "4"})
    lines = [json.dumps(row | {"id": index}) for index, row in enumerate(rows)]
    write(folder / "test.jsonl", "\n".join(lines))
    return benchmark_class("vsi_bench").load(folder, "test")


@pytest.mark.parametrize(
    ("answer", "official", "paper"),
    [
        ("A", 1, 1),
        ("a", 1, 1),
        ("A.", 1, 1),
        ("A is it", 1, 0),
        ("(A)", 0, 1),
        ("A,", 0, 0),
        ("A\nleft", 0, 0),
        ("left", 0, 1),
        ("A. left", 1, 1),
    ],
)
def test_vsi_choice_is_the_first_word(tmp_path, answer, official, paper):
    metrics = scored(vsi(tmp_path), {"3": said(answer)})
    assert metrics["official"]["route_planning"] == official
    assert metrics["paper"]["route_planning"] == paper


@pytest.mark.parametrize(
    ("answer", "official", "paper"),
    [("4", 1, 1), ("4.", 1, 1), ("4 chairs", 1, 1), ("about 4", 0, 1), ("four", 0, 0), ("4.0", 1, 1)],
)
def test_vsi_number(tmp_path, answer, official, paper):
    metrics = scored(vsi(tmp_path), {"4": said(answer)})
    assert metrics["official"]["object_counting"] == official
    assert metrics["paper"]["object_counting"] == paper


def test_vsi_overall_is_the_mean_of_tasks_with_the_directions_as_one(tmp_path):
    metrics = scored(vsi(tmp_path), {"0": said("A"), "3": said("A"), "4": said("4")})
    assert metrics["official"]["object_rel_direction"] == pytest.approx(1 / 3)
    assert metrics["accuracy"] == pytest.approx((1 / 3 + 1 + 1) / 3)


# --- all of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "content", "complaint"),
    [
        ("nextgqa", "val.csv", "video_id,qid\n1,2\n", r"gsub_val\.json: is missing"),
        (
            "vsi_bench",
            "test.jsonl",
            '{"id": 1}\n',
            r"line 1: question_type: is missing; is this .* VSI-Bench",
        ),
        ("vsi_bench", "test.jsonl", "nonsense\n", r"line 1: is not JSON"),
        ("vsi_bench", "test.jsonl", "\n", r"holds no item"),
        (
            "perception_test",
            "mc_question_valid.json",
            '{"v": {"x": 1}}',
            r"video 'v': mc_question: is missing",
        ),
        ("seed_bench_r1", "validation_L1.jsonl", '{"sample_id": 1}', r"line 1: video_source: is missing"),
        ("nextqa", "test.csv", "video_id,qid\n1,2\n", r"line 2: a0: is missing"),
        ("nextqa", "test.csv", 'video_id,a0\n1,"' + "x" * 200_000, r"is not CSV: field larger"),
        ("vsi_bench", "test.jsonl", "[" * 100_000, r"line 1: is not JSON"),
        ("vsi_bench", "test.jsonl", "\udcff", r"test\.jsonl: is not UTF-8"),
        ("vsi_bench", "test.jsonl", "3\n", r"line 1: is int, not an object"),
        ("perception_test", "mc_question_valid.json", "3", r"is a JSON int"),
        ("perception_test", "mc_question_valid.json", '{"v": {"mc_question": [3]}}', r"video 'v'"),
    ],
)
def test_annotations_of_something_else_are_refused(tmp_path, name, file, content, complaint):
    write(tmp_path / file, content)
    kind = benchmark_class(name)
    split = "val" if file.startswith("val.") else kind.splits[0]
    with pytest.raises(AnnotationError, match=complaint):
        kind.load(tmp_path, split)


def test_nextqa_and_nextgqa_are_not_taken_for_one_another(tmp_path):
    gqa(tmp_path, [[0, 9]])
    with pytest.raises(AnnotationError, match=r"answer='sit': must be an index; NExT-GQA"):
        benchmark_class("nextqa").load(tmp_path, "val")
    text = (tmp_path / "val.csv").read_text().replace(",sit,3", ",1,3")
    (tmp_path / "val.csv").write_text(text)
    with pytest.raises(AnnotationError, match=r"answer='1': must be the text of an option; NExT-QA"):
        benchmark_class("nextgqa").load(tmp_path, "val")


ODD = [
    None,
    True,
    -1,
    99,
    1e400,
    "",
    " ",
    "x",
    "A",
    [],
    {},
    [1],
    ["x"],
    {"x": 1},
    [[5, 3]],
    [[None, 1]],
    "\x00",
    "../x",
]


def spoiled(value, rng: random.Random):
    """A copy with one thing in it replaced, or taken away."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {name: kept for name, kept in value.items() if name != key}
        return value | {key: spoiled(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], spoiled(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


@pytest.mark.parametrize("seed", range(40))
def test_spoiled_annotations_are_read_or_refused(tmp_path, seed):
    """Anything may stand anywhere in a file: it is an AnnotationError with the file's name, or a benchmark whose items
    can be scored; never another error."""
    makers = {
        "seed_bench_r1": lambda folder: seed_bench(folder),
        "perception_test": perception_test,
        "mvbench": lambda folder: mvbench(folder),
        "nextgqa": lambda folder: gqa(folder, [[0, 9], [12, 20]]),
        "vsi_bench": vsi,
    }
    rng = random.Random(seed)
    for name, make in makers.items():
        make(tmp_path / name)
        files = sorted(p for p in (tmp_path / name).rglob("*.json*"))
        for _ in range(6):
            path = rng.choice(files)
            whole = path.read_text()
            lines = path.suffix == ".jsonl"
            value = [json.loads(line) for line in whole.split("\n")] if lines else json.loads(whole)
            value = spoiled(value, rng)
            rows = value if lines and isinstance(value, list) else [value]
            path.write_text("\n".join(map(json.dumps, rows)))
            kind = benchmark_class(name)
            try:
                benchmark = kind.load(tmp_path / name, "val" if name == "nextgqa" else kind.splits[0])
                metrics = scored(benchmark, {item.id: said("A", "1 to 2") for item in benchmark.items})
                assert 0 <= metrics["accuracy"] <= 1
            except AnnotationError as error:
                assert name in str(error)  # the folder's name is in it  # noqa: PT017
            path.write_text(whole)
