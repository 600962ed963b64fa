"""Submitting and scheduling, against a stand-in for the server (tests/pipelines/fake_kfp.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appo import cli, plan
from appo.config import load_recipe
from pipelines import cluster
from tests.pipelines.fake_kfp import FakeKfp


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKfp]:
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp's client keeps a context file there
    fake = FakeKfp()
    yield fake
    fake.stop()


def order(**changes: object) -> cluster.Order:
    return cluster.Order(**{"pipeline": "compare_policies", "recipe": "demo", **changes})


def appo(*words: str) -> str:
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_a_submitted_run_carries_the_pipeline_and_the_checked_recipe(server: FakeKfp) -> None:
    client = cluster.connect(server.url, "appo")
    wanted = order(overrides=["training.learning_rate=1e-6"], mlflow={"experiment_name": "videos"})
    run_id = cluster.submit(client, wanted, name="first", namespace="appo")
    (run,) = server.runs
    assert run["run_id"] == run_id
    assert run["display_name"] == "first"
    assert run["service_account"] == "appo-launcher"
    assert run["plugins_input"] == {"mlflow": {"experiment_name": "videos"}}
    assert run["experiment_id"] == server.experiments["appo"]
    assert "exec-train" in run["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
    assert "kubernetes" in run["pipeline_spec"]["platform_spec"]["platforms"]
    given = run["runtime_config"]["parameters"]
    assert plan.resolve(given["recipe"]) == load_recipe("demo", ["training.learning_rate=1e-6"])
    assert set(given) <= set(run["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"])


def test_a_shipped_recipe_goes_by_name(server: FakeKfp) -> None:
    assert order().arguments()["recipe"] == "demo"


def test_the_token_reaches_the_server(server: FakeKfp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_TOKEN", "token-of-a-user")
    cluster.connect(server.url, "appo")
    assert "Bearer token-of-a-user" in server.tokens


def test_a_schedule_is_made_once_changed_by_replacing_and_deleted(server: FakeKfp) -> None:
    def apply(cron: str, **changes: object) -> str:
        client = cluster.connect(server.url, "appo")
        return cluster.apply_schedule(client, order(**changes), name="weekly", cron=cron, namespace="appo")

    for name in ("a", "b", "c"):  # others, over two pages, that must stay
        cluster.apply_schedule(
            cluster.connect(server.url, "appo"), order(), name=name, cron="0 0 5 * * *", namespace="appo"
        )
    assert apply("0 0 3 * * 1") == "created"
    assert apply("0 0 3 * * 1") == "unchanged"
    before = next(s for s in server.schedules.values() if s["display_name"] == "weekly")
    assert apply("0 0 4 * * 1") == "replaced"
    assert apply("0 0 4 * * 1", overrides=["training.max_steps=9"]) == "replaced"
    weekly = [s for s in server.schedules.values() if s["display_name"] == "weekly"]
    assert len(weekly) == 1
    assert weekly[0]["recurring_run_id"] != before["recurring_run_id"]
    assert weekly[0]["max_concurrency"] == "1"
    assert weekly[0]["no_catchup"] is True
    assert weekly[0]["trigger"]["cron_schedule"]["cron"] == "0 0 4 * * 1"
    assert len(server.schedules) == 4

    client = cluster.connect(server.url, "appo")
    assert cluster.delete_schedule(client, "weekly", namespace="appo") == 1
    assert cluster.delete_schedule(client, "weekly", namespace="appo") == 0
    assert sorted(s["display_name"] for s in server.schedules.values()) == ["a", "b", "c"]


def test_a_replacement_that_fails_leaves_the_old_schedule(server: FakeKfp) -> None:
    client = cluster.connect(server.url, "appo")
    cluster.apply_schedule(client, order(), name="weekly", cron="0 0 3 * * 1", namespace="appo")
    server.refuse = "recurringruns"
    with pytest.raises(cluster.ClusterError, match=r"schedule weekly.*400.*refused for the test"):
        cluster.apply_schedule(client, order(), name="weekly", cron="0 0 4 * * 1", namespace="appo")
    assert [s["trigger"]["cron_schedule"]["cron"] for s in server.schedules.values()] == ["0 0 3 * * 1"]


def test_a_schedule_that_someone_disabled_is_made_again(server: FakeKfp) -> None:
    client = cluster.connect(server.url, "appo")
    cluster.apply_schedule(client, order(), name="weekly", cron="0 0 3 * * 1", namespace="appo")
    next(iter(server.schedules.values()))["status"] = "DISABLED"
    again = cluster.apply_schedule(client, order(), name="weekly", cron="0 0 3 * * 1", namespace="appo")
    assert again == "replaced"


def test_a_cron_of_five_fields_is_refused(server: FakeKfp) -> None:
    client = cluster.connect(server.url, "appo")
    with pytest.raises(cluster.ClusterError, match="six fields"):
        cluster.apply_schedule(client, order(), name="weekly", cron="0 3 * * 1", namespace="appo")
    assert not server.schedules


def test_a_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(cluster.ClusterError, match=r"127\.0\.0\.1:9.*does not answer"):
        cluster.connect("http://127.0.0.1:9", "appo")


def test_commands_reach_the_server(server: FakeKfp) -> None:
    assert "run: " in appo("pipeline", "submit", "compare_policies", "-r", "demo", "--endpoint", server.url)
    words = ["schedule", "apply", "nightly", "-r", "demo", "--cron", "0 0 1 * * *", "--endpoint", server.url]
    assert "created" in appo(*words)
    assert "unchanged" in appo(*words)
    assert "replaced" in appo(*words, "-P", "data_seed=5")
    (nightly,) = server.schedules.values()
    assert nightly["runtime_config"]["parameters"]["data_seed"] == 5
    assert "nightly" in appo("schedule", "list", "--endpoint", server.url)
    assert "deleted" in appo("schedule", "delete", "nightly", "--endpoint", server.url)
    assert "was not there" in appo("schedule", "delete", "nightly", "--endpoint", server.url)
