"""From generated outputs to table, page, Markdown, numbers and MLflow: the same values everywhere."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from appo.config import load_recipe
from appo.reports.compare import Comparison, compare
from appo.reports.results import ReportError, ordered, read_trainings, split_checkpoint
from appo.reports.tables import Table, to_html, to_markdown, with_spread
from tests.reports.made_runs import BASE_COMMIT, make_comparison, make_evaluation, make_training


def accuracies(folder: Path, algorithm: str) -> list[float]:
    paths = sorted(folder.glob(f"evaluation/{algorithm}-seed*/key_moment.jsonl"))
    rows = [[json.loads(line)["score"] for line in path.open()] for path in paths]
    return [fmean(scores) for scores in rows]


def test_every_output_gives_the_mean_and_deviation_of_the_predictions(
    compared: tuple[Comparison, Path],
) -> None:
    made, folder = compared
    numbers = json.loads(made.numbers.read_text())
    for algorithm in ("grpo", "dapo", "appo"):
        scores = accuracies(folder, algorithm)
        said = numbers["methods"][algorithm]["accuracy"]["key_moment"]
        assert said["mean"] == pytest.approx(fmean(scores), abs=1e-12)
        assert said["std"] == pytest.approx(stdev(scores), abs=1e-12)
        assert said["n"] == 2
        cell = f"{100 * fmean(scores):.1f} ± {100 * stdev(scores):.1f} (n=2)"
        for text in (made.table, made.markdown.read_text(), made.html.read_text()):
            assert cell in text
    assert "key frame found" in made.table


def test_every_output_names_the_commit_of_the_base_model(compared: tuple[Comparison, Path]) -> None:
    made, _ = compared
    for text in (made.markdown.read_text(), made.html.read_text()):
        assert f"org/name, commit {BASE_COMMIT}" in text
    (base,) = json.loads(made.numbers.read_text())["base_models"]
    assert base == {"model": "org/name", "commit": BASE_COMMIT}


def test_ratio_is_taken_seed_by_seed(compared: tuple[Comparison, Path]) -> None:
    made, folder = compared
    speed = {
        (s["algorithm"], s["seed"]): s["samples_per_second"]
        for s in (json.loads(p.read_text()) for p in folder.glob("train/*/summary.json"))
    }
    ratios = [speed["appo", seed] / speed["dapo", seed] for seed in (0, 1)]
    said = json.loads(made.numbers.read_text())["methods"]["appo"]["ratio_to_dapo"]
    assert said["mean"] == pytest.approx(fmean(ratios), abs=1e-12)


def test_how_near_the_device_came_to_its_peak_stands_beside_samples(
    compared: tuple[Comparison, Path],
) -> None:
    made, _ = compared
    numbers = json.loads(made.numbers.read_text())
    for method in numbers["methods"].values():
        assert method["mfu"]["mean"] == pytest.approx(0.211, abs=2e-3)
    text = made.markdown.read_text()
    assert "| method | samples per second | MFU, percent | percent of DAPO |" in text
    rows = [line for line in text.splitlines() if line.startswith("| DAPO | ")]
    assert any("| DAPO | update | 0.430" in row and "| 31.0 ± 0.0" in row for row in rows)
    assert any("| DAPO | whole step | 0.580" in row and "| 1200 ± 0" in row for row in rows)


def test_flips_list_every_question_once(compared: tuple[Comparison, Path]) -> None:
    made, _ = compared
    rows = list(csv.DictReader((made.html.parent / "flips.csv").open()))
    assert len({row["id"] for row in rows}) == len(rows) == 128
    difference = next(
        d
        for d in json.loads(made.numbers.read_text())["differences"]
        if (d["first"], d["second"]) == ("appo", "dapo")
    )
    gap = fmean(float(row["appo"]) - float(row["dapo"]) for row in rows)
    assert difference["mean"] == pytest.approx(gap, abs=1e-12)
    assert (difference["fixed"] - difference["broken"]) / 128 == pytest.approx(gap, abs=1e-12)


def test_it_says_what_it_cannot_show_and_claims_nothing(compared: tuple[Comparison, Path]) -> None:
    made, _ = compared
    for text in (made.table, made.markdown.read_text(), made.html.read_text()):
        flat = re.sub(r"\s+", " ", text)
        assert "cannot be shown here: that APPO is better than DAPO" in flat
        assert "2 seeds per algorithm: too few to rank algorithms" in flat
    assert all(
        d["verdict"].startswith("no claim") for d in json.loads(made.numbers.read_text())["differences"]
    )


def test_the_papers_numbers_are_marked_as_the_papers(compared: tuple[Comparison, Path]) -> None:
    page = compared[0].html.read_text()
    rows = re.findall(r"<tr( class=\"paper\")?><th scope=\"row\">([^<]*)</th>", page)
    assert {bool(mark) for mark, name in rows if name.startswith("paper")} == {True}
    assert any(name == "paper, APPO 7B" for _, name in rows)
    for mark, name in rows:
        assert (
            not mark or name.startswith("paper") or name in ("LLaVA-Video", "STAR", "CLEVRER", "NExT-QA")
        ), name


def test_the_page_needs_nothing_beside_it(compared: tuple[Comparison, Path]) -> None:
    page = compared[0].html.read_text()
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert not re.search(r"url\((?!data:)|@import", page)


def test_the_same_files_give_the_same_page(compared: tuple[Comparison, Path], tmp_path: Path) -> None:
    made, folder = compared
    runs = sorted(
        (folder / "train").iterdir(), reverse=True
    )  # the order in which runs are named is no matter
    again = compare(runs, folder / "evaluation", tmp_path, recipe=load_recipe("demo"))
    assert again.html.read_bytes() == made.html.read_bytes()
    assert again.markdown.read_bytes() == made.markdown.read_bytes()


def test_a_speed_from_a_few_steps_is_called_noise(tmp_path: Path, compared: tuple[Comparison, Path]) -> None:
    runs, evaluations = make_comparison(tmp_path, seeds=(0,), steps=3)
    short = compare(runs, evaluations, tmp_path / "report", recipe=load_recipe("demo"))
    assert "1 step timed: samples per second and the ratio to DAPO are noise" in re.sub(
        r"\s+", " ", short.table
    )
    assert "are noise" not in compared[0].table


def test_ablation_variants_get_table_d(tmp_path: Path) -> None:
    runs = []
    for variant in ("hard", "soft", "all"):
        runs.append(make_training(tmp_path / "train", "appo", 0, variant=variant))
        make_evaluation(tmp_path / "evaluation", f"appo.{variant}-seed0", 0.7)
    made = compare(runs, tmp_path / "evaluation", tmp_path / "report", recipe=load_recipe("demo"))
    text = made.markdown.read_text()
    assert "Ablation of APPO (as Table D)" in text
    assert "APPO (hard)" in text
    assert "soft: 50.5/51.3/49.3" in text


def test_a_method_without_attention_or_evaluation_leaves_a_gap_not_a_zero(tmp_path: Path) -> None:
    runs, evaluations = make_comparison(tmp_path, seeds=(0,), algorithms=("grpo", "dapo"))
    (runs[0] / "groups.jsonl").unlink()
    shutil.rmtree(evaluations / "grpo-seed0")
    made = compare(runs, evaluations, tmp_path / "report", recipe=load_recipe("demo"))
    row = next(line for line in made.table.splitlines() if line.strip().startswith("GRPO"))
    assert "→ –" in row
    assert "(n=1)" in made.table
    assert "± " not in row
    assert "One seed has no deviation." in made.markdown.read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "train/appo-seed0/summary.json").unlink(),
            r"summary\.json: is missing; the training did not",
        ),
        (lambda f: (f / "train/appo-seed0/summary.json").write_text("{"), r"summary\.json: is not JSON"),
        (lambda f: (f / "train/appo-seed0/metrics.jsonl").unlink(), r"metrics\.jsonl: is missing"),
        (lambda f: (f / "train/appo-seed0/metrics.jsonl").write_text("{\n{}\n"), r"line 1 is not JSON"),
        (lambda f: shutil.rmtree(f / "evaluation"), r"holds no evaluation"),
        (
            lambda f: (f / "evaluation/appo-seed0/key_moment.metrics.json").write_text("{}"),
            r"accuracy is missing",
        ),
        (
            lambda f: (f / "evaluation/appo-seed0/key_moment.jsonl").write_text('{"id": "x"}\n'),
            r"item 'x' has no score",
        ),
    ],
)
def test_broken_outputs_are_refused_with_their_name(tmp_path: Path, spoil: Any, message: str) -> None:
    runs, evaluations = make_comparison(tmp_path, seeds=(0,), steps=3)
    spoil(tmp_path)
    with pytest.raises(ReportError, match=message):
        compare(runs, evaluations, tmp_path / "report", recipe=load_recipe("demo"))


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = make_training(tmp_path / "a", "appo", 0, steps=3)
    other = make_training(tmp_path / "b", "appo", 0, steps=3)
    with pytest.raises(ReportError, match="a seed counts once"):
        read_trainings([one, other])
    with pytest.raises(ReportError, match="none given"):
        read_trainings([])
    strange = make_training(tmp_path / "c", "dapo", 0, steps=3, manifest_digest="1" * 64)
    make_evaluation(tmp_path / "evaluation", "appo-seed0", 0.5)
    with pytest.raises(ReportError, match="2 different manifests"):
        compare([one, strange], tmp_path / "evaluation", tmp_path / "report", recipe=load_recipe("demo"))


def test_a_cut_off_last_line_is_what_a_kill_leaves(tmp_path: Path) -> None:
    run = make_training(tmp_path, "appo", 0, steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert len(read_trainings([run])[0].steps) == 3


def test_names_and_order() -> None:
    assert split_checkpoint("pa_grpo-seed12") == ("pa_grpo", 12)
    assert split_checkpoint("appo.hard-seed0") == ("appo.hard", 0)
    assert split_checkpoint("warm_start") is None
    assert ordered(["zeta", "appo.soft", "appo", "dapo", "grpo"]) == [
        "grpo",
        "dapo",
        "appo",
        "appo.soft",
        "zeta",
    ]


def test_text_from_outside_is_escaped() -> None:
    table = Table("x", "a <b> | c", ("", "<i>"), (("<script>alert(1)</script>", "a|b"),))
    assert "<script>" not in to_html(table)
    assert "a\\|b" in to_markdown(table)
    assert with_spread(None) == "–"


@pytest.mark.slow
def test_means_reach_mlflow_on_the_parents_and_predictions_on_the_children(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from appo.reports.experiment import fetch_experiment
    from appo.tracking import log_training, start_training

    recipe = load_recipe("demo")
    runs, evaluations = make_comparison(tmp_path, algorithms=("dapo", "appo"), steps=4)
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        digest = summary["manifest_digest"]
        (run / "checkpoint").mkdir()
        with start_training(
            recipe,
            tmp_path,
            algorithm=summary["algorithm"],
            seed=summary["seed"],
            model="warm",
            manifest_digest=summary["manifest_digest"],
        ) as tracker:
            # A run whose id came too late for its summary is found by its tags.
            summary["mlflow_run_id"] = None if summary["seed"] == 1 else tracker.run_id
            log_training(tracker, run, manifest_path=tmp_path / "manifest.jsonl", manifest_digest=digest)
        (run / "summary.json").write_text(json.dumps(summary))
    made = compare(runs, evaluations, tmp_path / "report", recipe=recipe)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    first = json.loads((runs[0] / "summary.json").read_text())["mlflow_run_id"]
    assert len(client.get_metric_history(first, "key_moment/accuracy")) == 1
    assert (
        client.get_metric_history(first, "samples_per_second") == []
    )  # a curve of the steps, not of the end
    compare(runs, evaluations, tmp_path / "report", recipe=recipe)  # run again: the same parents, new points
    numbers = json.loads(made.numbers.read_text())["methods"]
    experiment = client.get_experiment_by_name("demo").experiment_id
    for label in ("dapo", "appo"):
        (parent,) = client.search_runs(
            [experiment], f"tags.`appo.role` = 'parent' AND tags.`appo.algorithm` = '{label}'"
        )
        expected = numbers[label]["accuracy"]["key_moment"]
        for part in ("mean", "std", "n"):
            assert parent.data.metrics[f"key_moment/accuracy_{part}"] == pytest.approx(
                expected[part], abs=1e-12
            )
        assert parent.data.metrics["samples_per_second_n"] == 2
        children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
        assert all("key_moment/accuracy" in run.data.metrics for run in children)
        assert len(children) == 2
    child = client.get_run(json.loads((runs[0] / "summary.json").read_text())["mlflow_run_id"])
    table = json.loads(
        Path(client.download_artifacts(child.info.run_id, "predictions/key_moment.json")).read_text()
    )
    assert len(table["data"]) == 128
    listed = {e["path"] for e in json.loads(child.data.tags["mlflow.loggedArtifacts"])}
    assert listed == {"completions.json", "predictions/key_moment.json"}
    comparisons = client.search_runs([experiment], "tags.`appo.role` = 'comparison'")
    assert {a.path for a in client.list_artifacts(comparisons[0].info.run_id)} >= {"report.html", "report.md"}

    # Each checkpoint is a model with its score, and the best one is registered, once.
    models = client.search_logged_models(
        [experiment], order_by=[{"field_name": "metrics.`key_moment/accuracy`"}]
    )
    assert len(models) == 4
    (version,) = client.search_model_versions("name = 'demo-best'")
    best = client.get_model_version_by_alias("demo-best", "best")
    top = max(a for m in numbers.values() for a in m["accuracy_by_seed"]["key_moment"].values())
    assert best.version == version.version
    assert float(best.tags["key_moment.accuracy"]) == pytest.approx(top, abs=1e-6)
    assert Path(best.source).parent.name == best.tags["appo.checkpoint"]
    scores = [m.value for model in models for m in model.metrics if m.key == "key_moment/accuracy"]
    assert max(scores) == pytest.approx(top, abs=1e-12)

    # From the experiment alone, in another folder, the same comparison comes out again.
    fetched = fetch_experiment("demo", tmp_path / "elsewhere", recipe=recipe, run_dir=tmp_path)
    again = compare(fetched.runs, fetched.evaluations, tmp_path / "again", recipe=recipe)
    assert again.table == made.table
    fresh = json.loads(again.numbers.read_text())
    assert fresh["methods"] == numbers
    assert fresh["differences"] == json.loads(made.numbers.read_text())["differences"]
    # A run that somebody deleted in MLflow meanwhile is missing there; the others still get theirs.
    client.delete_run(child.info.run_id)
    before = len(client.search_runs([experiment], "tags.`appo.role` = 'comparison'"))
    compare(runs, evaluations, tmp_path / "report", recipe=recipe)
    comparisons = client.search_runs([experiment], "tags.`appo.role` = 'comparison'")
    assert len(comparisons) == before + 1
    assert {run.info.status for run in comparisons} == {"FINISHED"}
    with pytest.raises(ReportError, match=r"unknown in this MLflow store; there are .*demo"):
        fetch_experiment("demmo", tmp_path / "no", recipe=recipe, run_dir=tmp_path)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_a_line_ends_at_its_line_feed_alone(tmp_path, sign):
    """A response may hold what Unicode counts as line ends; JSON leaves them as they are."""
    from appo.reports.results import read_lines
    from appo.tracking.outputs import _groups

    path = tmp_path / "groups.jsonl"
    record = {"completions": [f"one{sign}two"]}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n" + json.dumps(record)[:9], encoding="utf-8")
    assert read_lines(path) == [record]
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert _groups(path) == [record]
