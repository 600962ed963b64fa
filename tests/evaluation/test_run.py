"""Whole evaluations: stopped and continued, several seeds, several processes, videos that fail."""

from __future__ import annotations

import io
import json
import sys

import pytest

import appo.evaluation.parallel as parallel
import appo.evaluation.run as run
from appo.data.video import VideoError
from appo.evaluation.engine import EngineError, Generation
from appo.evaluation.predictions import PredictionError


class Scripted:
    """Not an engine: answers by rule, so that what surrounds engines can be tested in milliseconds. Real engines
    are in test_engine.py."""

    def __init__(self, recipe, path, processor):
        self.path = path

    def load(self, path):
        self.path = path

    def generate(self, prompts, *, seed):
        held = []
        while (taken := prompts.take(wait=True)) is not None:
            held.append(taken)
        for name, prompt in reversed(held):  # finishing in another order than asked
            letter = "ABCD"[(sum(name.encode()) + seed * (name[-1] == "3") + len(self.path)) % 4]
            yield (
                name,
                Generation(f"<think>\u2028</think><answer>{letter}</answer>", "stop", 3, len(prompt.ids)),
            )

    def close(self):
        pass


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(run, "start_engine", Scripted)


def evaluate(small_set, out, *overrides, names=("a", "b")):
    checkpoints = dict(zip(names, map(str, small_set.models), strict=False))
    return run.evaluate(
        small_set.recipe(*overrides),
        checkpoints=checkpoints,
        manifest_path=small_set.manifest,
        out=out,
        progress=False,
    )


@pytest.mark.usefixtures("scripted")
def test_files_are_in_item_order_with_everything_a_table_needs(small_set, tmp_path):
    results = evaluate(small_set, tmp_path)
    header, *records = [
        json.loads(line) for line in (tmp_path / "a/key_moment.jsonl").read_text().splitlines()
    ]
    assert header["kind"] == "header"
    assert header["decoding"]["top_k"] == 1
    (opened,) = run.open_sets(small_set.recipe(), small_set.manifest)
    assert [record["id"] for record in records] == [item.id for item in opened.benchmark.items]
    assert len(records) == 12
    for key in ("prompt", "response", "finish_reason", "tokens", "timestamps_s", "parsed", "answer", "score"):
        assert key in records[0]
    assert len(records[0]["timestamps_s"]) == 16
    assert results["a"]["key_moment"]["accuracy"] == sum(record["score"] for record in records) / 12
    assert json.loads((tmp_path / "b/key_moment.metrics.json").read_text()) == results["b"]["key_moment"]


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("kept", [0, 1, 5, 12])
def test_stopping_after_any_item_changes_nothing(small_set, tmp_path, kept):
    whole = evaluate(small_set, tmp_path / "whole", names=("a",))
    lines = (tmp_path / "whole/a/key_moment.jsonl").read_bytes().split(b"\n")
    cut = tmp_path / "cut/a/key_moment.jsonl"
    cut.parent.mkdir(parents=True)
    cut.write_bytes(b"\n".join(lines[: kept + 1]) + b"\n" + lines[kept][:20])
    assert evaluate(small_set, tmp_path / "cut", names=("a",)) == whole
    assert cut.read_bytes() == (tmp_path / "whole/a/key_moment.jsonl").read_bytes()


def test_a_finished_evaluation_starts_no_engine(small_set, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "start_engine", Scripted)
    first = evaluate(small_set, tmp_path)
    monkeypatch.setattr(run, "start_engine", None)
    assert evaluate(small_set, tmp_path) == first


@pytest.mark.usefixtures("scripted")
def test_other_settings_or_weights_are_not_mixed_into_a_file(small_set, tmp_path):
    evaluate(small_set, tmp_path, names=("a",))
    with pytest.raises(PredictionError, match=r"other settings \(decoding\)"):
        evaluate(small_set, tmp_path, "evaluation.temperature=0.5", names=("a",))
    with pytest.raises(PredictionError, match=r"other settings \(weights\)"):
        evaluate(small_set, tmp_path, names=("x", "a"))


@pytest.mark.usefixtures("scripted")
def test_seeds_give_mean_deviation_and_agreement(small_set, tmp_path):
    found = evaluate(small_set, tmp_path, "evaluation.seeds=3", names=("a",))["a"]["key_moment"]
    single = [
        json.loads((tmp_path / f"a/seeds/{seed}/key_moment.metrics.json").read_text())["accuracy"]
        for seed in range(3)
    ]
    mean = sum(single) / 3
    assert found["accuracy"] == pytest.approx(mean)
    assert found["accuracy/std"] == pytest.approx((sum((s - mean) ** 2 for s in single) / 2) ** 0.5)
    row = f"| a | {100 * mean:.1f} ± {100 * found['accuracy/std']:.3f} |"
    assert (tmp_path / "seeds.md").read_text() == f"| | key_moment |\n|---|---|\n{row}\n"
    lines = [json.loads(line) for line in (tmp_path / "a/key_moment.seeds.jsonl").read_text().splitlines()]
    differing = [line["id"] for line in lines if not line["agree"]]
    assert differing == [line["id"] for line in lines if line["id"].endswith("3")]
    assert found["agreement"] == pytest.approx(1 - len(differing) / 12)


def test_table_e_has_a_column_a_level_and_per_cent():
    from appo.evaluation.seeds import over_seeds, table

    runs = [
        {"accuracy": 0.5, "official/level/L1/accuracy": level, "official/level/L2/accuracy": 0.25}
        for level in (0.5, 0.52, 0.54)
    ]
    plain = [{"accuracy": 0.125}] * 3
    assert table({"appo": {"seed_bench_r1": over_seeds(runs), "mvbench": over_seeds(plain)}}) == (
        "| | seed_bench_r1 L1 | seed_bench_r1 L2 | mvbench |\n|---|---|---|---|\n"
        "| appo | 52.0 ± 2.000 | 25.0 ± 0.000 | 12.5 ± 0.000 |\n"
    )


@pytest.mark.usefixtures("scripted")
def test_failing_videos_are_counted_named_and_stop_the_run_above_the_rate(small_set, tmp_path, monkeypatch):
    from appo.evaluation.prompts import PromptMaker

    make = PromptMaker.make

    def failing(self, sample, frames, template):
        if sample.id.endswith("2"):
            raise VideoError(sample.video, "is empty (0 bytes)")
        return make(self, sample, frames, template)

    monkeypatch.setattr(PromptMaker, "make", failing)
    with pytest.raises(VideoError, match=r"is empty.*; \d of 12 items of key_moment have no video"):
        evaluate(small_set, tmp_path, names=("a",))
    metrics = evaluate(small_set, tmp_path, "data.max_reject_rate=0.5", names=("a",))["a"]["key_moment"]
    assert metrics["missing_rate"] > 0
    records = [json.loads(line) for line in (tmp_path / "a/key_moment.jsonl").read_text().splitlines()[1:]]
    assert {r["id"][-1] for r in records if r.get("error")} == {"2"}
    monkeypatch.setattr(PromptMaker, "make", make)  # the file is back: the items are tried again
    assert evaluate(small_set, tmp_path, names=("a",))["a"]["key_moment"]["missing_rate"] == 0.0


class Here:
    """In place of a process: what one would do, in this one, when it is waited for; `job` as it travels."""

    def __init__(self, job, log):
        self.job, self.returncode = json.dumps(job), None

    def poll(self):
        if self.returncode is None:
            stdin, sys.stdin = sys.stdin, io.StringIO(self.job)
            try:
                parallel.main()
            finally:
                sys.stdin = stdin
            self.returncode = 0
        return self.returncode

    def wait(self):
        return self.returncode


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(("count", "left_by"), [(2, 5), (5, 2), (8, 0)])
def test_any_number_of_shares_merges_to_the_bytes_of_one(small_set, tmp_path, monkeypatch, count, left_by):
    """Also when a killed run of another number of processes left parts, one of them cut in the middle of a line."""
    monkeypatch.setattr(parallel, "_start", Here)
    monkeypatch.setattr(parallel, "POLL_S", 0.0)
    one = evaluate(small_set, tmp_path / "one")
    out = tmp_path / "many/a"
    out.mkdir(parents=True)
    lines = (tmp_path / "one/a/key_moment.jsonl").read_bytes().split(b"\n")
    for part in range(left_by):
        mine = [lines[0], *lines[1 + part : 7 : left_by]]
        text = b"\n".join(mine) + b"\n" + lines[7 + part][:9]
        (out / f"key_moment.part{part}of{left_by}.jsonl").write_bytes(text)
    assert evaluate(small_set, tmp_path / "many", f"evaluation.data_parallel={count}") == one
    for name in "ab":
        whole = (tmp_path / f"one/{name}/key_moment.jsonl").read_bytes()
        assert (tmp_path / f"many/{name}/key_moment.jsonl").read_bytes() == whole
        files = sorted(path.name for path in (tmp_path / f"many/{name}").iterdir())
        assert files == ["key_moment.jsonl", "key_moment.metrics.json"]


@pytest.mark.slow
def test_processes_merge_to_the_bytes_of_one(small_set, tmp_path):
    """Real processes with transformers. All but one item come from a part that a killed run left: a process that
    has something to do takes six seconds to import transformers, and a second one would show nothing new."""
    one = evaluate(small_set, tmp_path / "one", "evaluation.engine=transformers", names=("a",))
    file = tmp_path / "one/a/key_moment.jsonl"
    whole = file.read_bytes()
    lines = whole.split(b"\n")
    out = tmp_path / "two/a"
    out.mkdir(parents=True)
    (out / "key_moment.part1of5.jsonl").write_bytes(b"\n".join(lines[:12]) + b"\n" + lines[12][:9])
    both = ("evaluation.engine=transformers", "evaluation.data_parallel=2")
    assert evaluate(small_set, tmp_path / "two", *both, names=("a",)) == one
    assert (out / "key_moment.jsonl").read_bytes() == whole
    assert sorted(path.name for path in out.iterdir()) == ["key_moment.jsonl", "key_moment.metrics.json"]


def test_a_failing_process_is_reported_and_nothing_finished_is_lost(small_set, tmp_path, monkeypatch):
    """The process is real; what it runs is a stand-in that fails at once, as a GPU without memory would."""
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\ncat > /dev/null\necho torch.OutOfMemoryError: CUDA out of memory >&2\nexit 3\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(parallel.sys, "executable", str(program))
    with pytest.raises(
        EngineError, match=r"(?s)process 0 of 2 ended with 3: .*out of memory.*0 finished.*continue"
    ):
        evaluate(small_set, tmp_path / "out", "evaluation.data_parallel=2", names=("a",))


def test_the_command_ends_with_status_2_and_the_engines_last_words(small_set, tmp_path, monkeypatch, capsys):
    import appo.cli

    class Dying(Scripted):
        def generate(self, prompts, *, seed):
            found = super().generate(prompts, seed=seed)
            yield next(found)
            raise EngineError("vLLM stopped: CUDA out of memory")

    monkeypatch.setattr(run, "start_engine", Dying)
    command = ["evaluate", str(small_set.models[0]), "--recipe", "demo", "--out", str(tmp_path)]
    command += ["--manifest", str(small_set.manifest)]
    monkeypatch.setattr(sys, "argv", ["appo", *command])
    with pytest.raises(SystemExit) as ended:
        appo.cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "out of memory\n1 finished responses are kept" in said
    assert "give the same command again to continue" in said
    assert "Traceback" not in said
