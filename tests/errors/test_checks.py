"""The list of checks: who runs which of them, what each finds, and that nothing is asked or opened before its time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from appo import checks, steps
from appo.checks import registry
from appo.config import load_recipe
from appo.errors import UserError
from pipelines import cluster
from tests.errors.conftest import answer, is_a_mistake, make_model
from tests.pipelines.fake_kfp import FakeKfp

ROOT = Path(__file__).parents[2]


@pytest.fixture
def empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of its own for a test that adds checks."""
    monkeypatch.setattr(registry, "_CHECKS", {})


def subject(*overrides: str, recipe: str = "demo", **more: object) -> checks.Subject:
    return checks.Subject(load_recipe(recipe, overrides), **more)  # type: ignore[arg-type]


def found(name: str, given: checks.Subject) -> list[str]:
    """What one check says, run as if everything it may need were here."""
    (outcome,) = checks.run_checks(given, tuple(checks.NEEDS), only=[name])
    return list(outcome.problems)


# The list ---------------------------------------------------------------------------------------------------------


def test_each_check_has_a_name_a_need_and_a_remedy() -> None:
    listed = checks.checks()
    assert len({one.name for one in listed}) == len(listed) >= 14
    assert {one.needs for one in listed} == set(checks.NEEDS)
    assert all(one.remedy for one in listed)
    order = [list(checks.NEEDS).index(one.needs) for one in listed]
    assert order == sorted(order)  # what is cheap refuses first
    assert set(checks.OF_DATA) | set(checks.OF_TRAINING) <= {one.name for one in listed}


def test_a_check_is_one_function(empty_list: None) -> None:
    @checks.check("new", needs="nothing", remedy="change it")
    def new(given: checks.Subject) -> Iterator[str | UserError]:
        yield f"name={given.recipe.name}: is too short"
        yield UserError("a.b=1: is wrong; set it to 2")

    (outcome,) = checks.run_checks(subject(), checks.ALONE)
    assert outcome.problems == ("name=demo: is too short; change it", "a.b=1: is wrong; set it to 2")
    assert outcome.line() == f"{'new':<22} problem: name=demo: is too short; change it (and 1 more)"
    with pytest.raises(checks.CheckFailed) as refused:
        checks.refuse(subject(), checks.ALONE)
    assert str(refused.value).splitlines() == list(outcome.problems)
    with pytest.raises(ValueError, match="'new': is already registered"):
        checks.check("new", needs="nothing", remedy="x")(new)


def test_what_a_check_needs_decides_whether_it_runs(empty_list: None) -> None:
    asked: list[str] = []

    def add(name: str, needs: checks.Need, *problems: str) -> None:
        @checks.check(name, needs=needs, remedy="r")
        def one(_: checks.Subject) -> Iterator[str]:
            asked.append(name)
            yield from problems

    add("server", "server")
    add("gpu", "gpu")
    add("files", "files", "a: missing")
    add("nothing", "nothing")
    lines = [
        outcome.line().split(maxsplit=1)[1] for outcome in checks.run_checks(subject(), checks.FROM_AFAR)
    ]
    assert asked == ["nothing", "files"]
    assert lines[:3] == ["ok", "problem: a: missing; r", "skipped (needs a GPU)"]
    assert lines[3].startswith("skipped (no server is asked before")
    asked.clear()
    checks.run_checks(subject(), ("nothing", "server"))
    assert asked == ["nothing", "server"]


def test_a_check_that_breaks_is_a_defect(empty_list: None) -> None:
    @checks.check("broken", needs="nothing", remedy="r")
    def broken(_: checks.Subject) -> Iterator[str]:
        yield from ()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checks.refuse(subject(), checks.ALONE)


# Each of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("seeds", ["training.seeds=[1, 1, 2, 2]"], "training.seeds: 1 is given twice; a seed counts once"),
        ("seeds", ["training.seeds=[]"], "training.seeds=[]: none is given; name at least one"),
        ("algorithms", ["algorithms=[]"], "algorithms=[]: none is given; name at least one"),
        (
            "rewards",
            ["policy.reward_weights={acuracy: 1}"],
            "policy.reward_weights.acuracy: no such reward; known",
        ),
        (
            "rewards",
            ["policy.reward_weights={accuracy: 0}"],
            "leaves the reward advantage of grpo without any",
        ),
        ("rewards", ["policy.overlong_buffer=21"], "policy.overlong_buffer=21: is longer than a completion"),
        ("source", ["data.source=none"], "data.source='none': unknown; known are jsonl, key_moment"),
        ("source", ["data.quotas={none: 1}"], "data.quotas, none: no sample comes from this source"),
        (
            "benchmarks",
            ["evaluation.benchmarks=[mvbench, MVBench]"],
            "mvbench is given twice; name each once",
        ),
        (
            "records",
            ["data.source=video_r1"],
            "data.annotations=null: source video_r1 reads the publisher's records",
        ),
        ("records", ["data.root=/no/where"], "data.root=/no/where: no such file or folder; name an existing"),
        ("records", ["data.leakage={mvbench: /no}"], "data.leakage, mvbench=/no: no such file or folder"),
        (
            "benchmark files",
            ["evaluation.benchmarks=[nextqa]"],
            "evaluation.annotations=null: the publishers' files",
        ),
        (
            "benchmark files",
            ["evaluation.annotations=/no"],
            "evaluation.annotations=/no: no such folder; name the",
        ),
        ("benchmark files", ["evaluation.videos=/no"], "evaluation.videos=/no: no such folder; name the"),
        (
            "model",
            ["model.path=/no"],
            "model.path=/no: no such folder, and no hub name; name a checkpoint",
        ),
    ],
)
def test_what_a_check_finds(name: str, overrides: list[str], said: str) -> None:
    assert found(name, subject()) == []
    (first, *_) = found(name, subject(*overrides))
    assert said in first


def test_quotas_are_looked_up_in_ones_own_records(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"video": "a.mp4", "question": "?", "answer": "1", "source": "mine"}\n'
    )
    own = ["data.source=jsonl", f"data.annotations={tmp_path}/q.jsonl"]
    assert found("names in the records", subject(*own, "data.quotas={mine: 1}")) == []
    (problem,) = found("names in the records", subject(*own, "data.quotas={yours: 1}"))
    assert "data.quotas, yours: no sample comes from this source; there are mine" in problem


GROUPS = ["policy.num_generations=4", "training.prompts_per_step=6"]


@pytest.mark.parametrize(
    ("processes", "overrides", "said"),
    [
        (1, [], None),
        (3, [], None),  # two groups each
        (12, [], None),  # half a group each, which APPO's weights do not mind
        (5, [], "must divide evenly over 5 processes"),
        (4, [], "4 processes would hold 6 completions each, which cuts groups of 4 unevenly"),
        (12, ["policy.dynamic_sampling=true"], "policy.dynamic_sampling=true needs whole groups on each"),
        (12, ["algorithms=[appo, pa_grpo]"], "algorithm pa_grpo needs whole groups on each"),
        (6, ["algorithms=[pa_grpo]", "policy.dynamic_sampling=true"], None),
        (1, ["training.gradient_accumulation_steps=5"], "5 accumulation steps"),
        (None, ["training.gradient_accumulation_steps=5"], None),  # who only shows a recipe does not know
    ],
)
def test_groups_over_processes(processes: int | None, overrides: list[str], said: str | None) -> None:
    problems = found("groups", subject(*GROUPS, *overrides, processes=processes))
    assert bool(problems) == (said is not None)
    assert said is None or said in problems[0]


def test_variants_are_checked_each_by_itself() -> None:
    (problem,) = found("variants", subject(variants=("no colon",)))
    assert "variant 'no colon': write it as name:" in problem
    good = "good: perception.k1=2"
    assert found("rewards", subject(variants=(good,))) == []
    (problem,) = found("rewards", subject(variants=("bad: policy.overlong_buffer=99", good)))
    assert problem.startswith("variant bad: policy.overlong_buffer=99")


def test_a_type_that_a_gpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock of torch.cuda: a GPU without bfloat16 (a V100) cannot be had here."""
    import contextlib
    import types

    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    sold = types.SimpleNamespace(total_memory=32 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: sold)
    (problem,) = found("dtype", subject("model.dtype=bfloat16"))
    assert problem.startswith(
        "model.dtype=bfloat16: GPU 0 (Tesla V100) does not compute in it; set model.dtype"
    )
    assert found("dtype", subject("model.dtype=float32")) == []
    monkeypatch.setattr("appo.checks.gpus", lambda: 1)
    with pytest.raises(checks.CheckFailed, match="Tesla V100"):  # where a training starts, too
        checks.before_training(load_recipe("demo", ["model.dtype=bfloat16"]), algorithm="appo", processes=1)


PAPER = "qwen2.5_vl_7b_video_r1_34k"
TOO_LARGE = ("training.distributed=ddp",)


def fits(name: str, *overrides: str, recipe: str = PAPER) -> list[str]:
    return found(name, checks.submitted(load_recipe(recipe, overrides)))


def test_a_layout_that_the_cluster_cannot_hold_is_refused_with_the_figure_and_the_way_out() -> None:
    (problem,) = fits("fits the cluster", *TOO_LARGE)
    assert problem.startswith("training.distributed=ddp on 16 GPUs of 80 GiB: ")
    needed = float(problem.split(": ")[1].split()[0])
    assert needed > 80
    remedy = problem.rpartition("; set ")[2]
    assert remedy == "training.distributed=fsdp2"
    assert fits("fits the cluster", *TOO_LARGE, remedy) == []
    assert fits("fits the cluster") == []
    (small,) = fits("fits the cluster", "cluster.gpu_memory_gib=8")
    assert "on 16 GPUs of 8 GiB" in small
    (none,) = fits("fits the cluster", "cluster.gpu_memory_gib=2")
    assert none.endswith("; take more GPUs, or larger ones (appo plan counts what each would hold)")
    with pytest.raises(checks.CheckFailed, match="on 16 GPUs of 80 GiB"):
        checks.refuse(checks.submitted(load_recipe(PAPER, TOO_LARGE)), checks.ALONE)


def test_a_variant_that_the_cluster_cannot_hold_is_named() -> None:
    variants = ("all: training.distributed=fsdp2", "copies: training.distributed=ddp")
    (problem,) = found("fits the cluster", checks.submitted(load_recipe(PAPER), variants))
    assert problem.startswith("variant copies: training.distributed=ddp on 16 GPUs of 80 GiB: ")


def test_modules_that_cannot_be_adapted_are_refused_by_name() -> None:
    lora = ("model.lora.target_modules=[q_proj, qkv]",)
    (problem,) = fits("fits the cluster", *lora)
    assert problem.startswith(
        "model.lora.target_modules: 'qkv' is none of the text layers' products (q_proj,"
    )
    # A step that does not divide is another check's.
    assert fits("fits the cluster", "training.prompts_per_step=3") == []


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["cluster.gpu_memory_gib=null"], "cluster.gpu_memory_gib is not given"),
        (["cluster.gpus_per_node=0"], "the recipe asks for no GPU"),
        (["model.path=Qwen/Nobody-Knows"], "another check asks"),
        (["model.path=null", "model.warm_start={}"], "the model is made here, and tiny"),
    ],
)
def test_what_cannot_be_known_is_skipped_with_the_reason(overrides: list[str], reason: str) -> None:
    given = checks.submitted(load_recipe(PAPER, overrides))
    (outcome,) = checks.run_checks(given, checks.FROM_AFAR, only=["fits the cluster"])
    assert (outcome.problems, outcome.skipped) == ((), reason)
    shown = checks.Subject(load_recipe(PAPER, TOO_LARGE))  # `recipe show` does not know where it will run
    (outcome,) = checks.run_checks(shown, checks.ALONE, only=["fits the cluster"])
    assert outcome.skipped == "where it will run is not known yet"


def test_a_model_whose_sizes_stand_in_its_folder_is_looked_at_where_files_are(tmp_path: Path) -> None:
    from appo.modeling.architecture import published

    config = dict(published()["Qwen/Qwen2.5-VL-7B-Instruct"].config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = (f"model.path={tmp_path}", *TOO_LARGE)
    (problem,) = fits("model folder fits", *own)
    assert problem.endswith("set training.distributed=fsdp2")
    recipe = load_recipe(PAPER, own)
    given = checks.submitted(recipe)
    outcomes = {one.check.name: one for one in checks.run_checks(given, checks.ALONE)}
    assert outcomes["model folder fits"].skipped == "needs files"
    assert outcomes["fits the cluster"].skipped == "another check asks"
    (tmp_path / "config.json").unlink()
    (outcome,) = checks.run_checks(given, checks.FROM_AFAR, only=["model folder fits"])
    assert "config.json" in outcome.skipped  # what it lacks is said by "model"
    pods = checks.submitted(load_recipe(PAPER, ["model.path=/cache/model"]))
    (outcome,) = checks.run_checks(pods, checks.FROM_AFAR, only=["model folder fits"])
    assert outcome.skipped == "only pods see /cache/model"


def test_a_layout_that_this_machines_gpus_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock of torch.cuda: two GPUs of 24 GiB."""
    import contextlib
    import types

    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=24 * 2**30)
    )
    recipe = load_recipe("qwen2.5_vl_3b_video_r1_34k")
    (problem,) = found("fits the GPUs", checks.Subject(recipe, processes=2))
    assert problem.startswith("training.distributed=fsdp2 on 2 GPUs of 24 GiB: ")
    assert "; set " in problem
    monkeypatch.setattr("appo.checks.machine.gpus", lambda: 2)
    (outcome,) = checks.run_checks(checks.here(recipe), checks.ALONE, only=["fits the cluster"])
    assert outcome.skipped == "the GPUs of this machine are asked themselves"
    monkeypatch.setattr("appo.checks.gpus", lambda: 2)
    monkeypatch.setattr("appo.training.launch._has_gpu", lambda: True)
    with pytest.raises(checks.CheckFailed, match="on 2 GPUs of 24 GiB"):  # where a training starts, too
        checks.before_training(recipe, algorithm="appo", processes=2)
    lora = load_recipe("qwen2.5_vl_3b_lora_2gpu")
    assert found("fits the GPUs", checks.Subject(lora, processes=2)) == []


def test_a_layout_that_cannot_run_is_refused_wherever_a_training_would_start(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process cannot shard, and a machine without a GPU cannot either; nothing is decoded or loaded before."""
    sharded = ["training.distributed=fsdp2"]
    recipe = load_recipe("demo", sharded)
    one = "training.distributed=fsdp2: shards over processes, and there is one; set training.distributed=ddp"
    assert found("layout", checks.Subject(recipe, processes=1)) == [one]
    assert found("layout", checks.Subject(recipe, processes=2)) == []  # on some machine
    assert found("layout", checks.submitted(load_recipe(PAPER))) == []
    (none,) = found("layout", checks.Subject(recipe, processes=2, trains_here=True))
    assert none.endswith("needs GPUs, and this machine has none; set training.distributed=ddp")
    monkeypatch.setenv("KFP_RUN_ID", "run")  # the first step's pod needs no GPU
    assert found("layout", checks.here(load_recipe("demo", [*sharded, "cluster.gpus_per_node=2"]))) == []
    monkeypatch.delenv("KFP_RUN_ID")
    is_a_mistake(answer("pipeline", "run", "-r", "demo", "-f", "run", "-s", *sharded), one)
    assert not (place / "run").exists()
    with pytest.raises(checks.CheckFailed, match="there is one"):
        checks.before_training(recipe, algorithm="appo", processes=1)
    from appo.training.launch import LayoutError
    from appo.training.run import train

    with pytest.raises(LayoutError, match="there is one"):
        train(recipe, algorithm="appo", seed=0, manifest_path=tmp_path, model_path="", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Who runs them, and when ------------------------------------------------------------------------------------------


def test_a_place_that_only_pods_see_is_left_to_them() -> None:
    """The very folders that a training's pods mount."""
    runtime = yaml.safe_load((ROOT / "k8s/components/training-runtime/runtime.yaml").read_text())
    text = yaml.safe_dump(runtime)
    for folder in checks.POD_FOLDERS:
        assert f"mountPath: {folder}\n" in text
    recipe = load_recipe("demo", ["model.path=/cache/model", "evaluation.annotations=/cache/benchmarks"])
    outcomes = {one.check.name: one for one in checks.run_checks(checks.submitted(recipe), checks.FROM_AFAR)}
    assert outcomes["model"].skipped == "only pods see /cache/model"
    assert not [one for one in outcomes.values() if one.problems]
    with pytest.raises(checks.CheckFailed, match=r"model\.path=/cache/model: no such folder"):
        checks.refuse(checks.at_home(recipe), checks.FROM_AFAR)
    (problem,) = found("model", checks.submitted(load_recipe("demo", ["model.path=/data/model"])))
    assert problem.endswith("(pods see s3:// addresses, /cache and /scratch)")


def test_processes_are_those_of_the_place_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("demo", ["cluster.gpus_per_node=8", "cluster.nodes=2"])
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    monkeypatch.setattr("appo.checks.gpus", lambda: 3)
    assert [checks.submitted(recipe).processes, checks.here(recipe).processes] == [16, 3]
    monkeypatch.setenv("KFP_RUN_ID", "run")  # the first step of a run on a cluster
    assert checks.here(recipe).processes == 16
    assert checks.here(recipe).elsewhere == checks.POD_FOLDERS


SPOILT = [
    "model.path={0}/model",
    "data.root={0}/none",
    "evaluation.annotations={0}/none",
    "data.leakage={{a: {0}/no}}",
]


@pytest.fixture
def spoilt(place: Path) -> list[str]:
    """Settings that name nothing but what is missing or broken."""
    make_model(place / "model")
    (place / "model" / "model.safetensors").unlink()
    return [word for setting in SPOILT for word in ("-s", setting.format(place))]


def test_compile_and_show_touch_no_file(
    spoilt: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_a_mistake(answer("pipeline", "run", "-r", "demo", "-f", "run", *spoilt), "model.path", "data.root")
    ran: list[str] = []
    for name, one in list(registry._CHECKS.items()):
        if one.needs != "nothing":

            def find(_: object, name: str = name) -> Iterator[str]:
                ran.append(name)
                yield "touched"

            monkeypatch.setitem(registry._CHECKS, name, registry.Check(name, one.needs, one.remedy, find))
    shown = answer("recipe", "show", "demo", *spoilt)
    assert shown.status == 0, shown.text
    assert yaml.safe_load(shown.output)["model"]["path"] == f"{place}/model"
    compiled = answer("pipeline", "compile", "-r", "demo", "-o", "made.yaml", *spoilt)
    assert compiled.status == 0, compiled.text
    assert ran == []
    assert answer("validate", "demo").status == 2
    assert {"model", "records", "benchmark files"} <= set(ran)


def test_compile_and_show_refuse_what_needs_no_file(place: Path) -> None:
    twice = ("-s", "training.seeds=[1, 1]")
    is_a_mistake(answer("recipe", "show", "demo", *twice), "training.seeds")
    is_a_mistake(answer("pipeline", "compile", "-r", "demo", "-o", "made.yaml", *twice), "training.seeds")
    assert not (place / "made.yaml").exists()


@pytest.fixture
def server(place: Path) -> Iterator[FakeKfp]:
    fake = FakeKfp()
    yield fake
    fake.stop()


TOO_LARGE_FOR_A_CLUSTER = [
    *("-s", "model.path=Qwen/Qwen2.5-VL-7B-Instruct"),
    *("-s", "cluster.gpus_per_node=8"),
    *("-s", "cluster.gpu_memory_gib=24"),
]
SUBMIT = ["pipeline", "submit", "compare_policies"]
APPLY = ["schedule", "apply", "nightly", "--cron", "0 0 1 * * *"]


@pytest.mark.parametrize("command", [SUBMIT, APPLY], ids=["submit", "apply"])
def test_a_server_is_not_asked_about_what_cannot_run(
    command: list[str], server: FakeKfp, spoilt: list[str]
) -> None:
    command = [*command, "-r", "demo", "--endpoint", server.url]
    mistakes = (
        (["-s", "training.seeds=[1, 1]"], "training.seeds"),
        (spoilt, "model.path"),
        (["-s", "training.lr=1"], "unknown key"),
        (["-s", "cluster.gpus_per_node=3"], "3 processes"),
        (["-s", "evaluation.benchmarks=[none]"], "'none': unknown"),
        (TOO_LARGE_FOR_A_CLUSTER, "training.distributed=ddp on 8 GPUs of 24 GiB"),
        (["-P", "data_seed=-5"], "data_seed=-5"),
        (["-P", "overrides=[model.path=/no]"], "model.path=/no"),
        (["-P", "frames=8"], "has none of this name"),
    )
    for wrong, said in mistakes[: None if "submit" in command else 2]:
        is_a_mistake(answer(*command, *wrong), said)
    assert server.log == []
    assert answer(*command).status == 0
    assert server.log


def test_a_schedule_with_another_cron_asks_no_server(server: FakeKfp) -> None:
    is_a_mistake(
        answer("schedule", "apply", "n", "-r", "demo", "--cron", "1", "--endpoint", server.url), "cron"
    )
    assert server.log == []


def test_the_first_step_runs_what_it_can(spoilt: list[str]) -> None:
    with pytest.raises(checks.CheckFailed, match=r"model\.path"):
        steps.validate("demo", [word for word in spoilt if word != "-s"])


def test_the_first_step_of_a_cluster_asks_its_store(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    from appo import objectstore

    objectstore.client.cache_clear()
    with pytest.raises(checks.CheckFailed, match="no complete S3 credentials"):
        steps.validate("demo", ["model.path=s3://bucket/model"])
    order = cluster.Order("compare_policies", "demo", overrides=["model.path=s3://bucket/model"])
    order.check()  # from a desk without credentials that is no verdict


def test_validate_prints_a_line_for_each(place: Path) -> None:
    good = answer("validate", "demo")
    lines = good.output.splitlines()
    assert (good.status, len(lines)) == (0, len(checks.checks()))
    assert {line.split()[-1] for line in lines if "skipped" not in line} == {"ok"}
    bad = answer("validate", "demo", "-s", "training.seeds=[1, 1]", "-s", "model.path=/no")
    is_a_mistake(bad, "2 of", "seeds, model")
    assert sum("problem: " in line for line in bad.output.splitlines()) == 2
