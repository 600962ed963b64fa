"""A model below an `s3://` prefix, on a real S3 server (SeaweedFS): whole with its marker, or refused by name."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from appo.folders import COMPLETE, publish_folder
from appo.modeling.checkpoints import CheckpointError, fetched, stored_problem
from appo.objectstore import put_file
from tests.data_room.stores import FaultyProxy
from tests.errors.conftest import answer, is_a_mistake, make_model

pytestmark = pytest.mark.slow
INDEX = "model.safetensors.index.json"


@pytest.fixture
def location(s3: FaultyProxy, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)  # `place` has cleared it
    monkeypatch.setenv("APPO_SCRATCH", str(place / "scratch"))
    return f"s3://data/{uuid.uuid4()}/model"


def put(folder: Path, location: str, *, but: str = "") -> None:
    """Every file but one, and no marker: what a copy by hand, or one that was cut off, leaves."""
    for path in sorted(folder.iterdir()):
        if path.name != but:
            put_file(f"{location}/{path.name}", path)


def test_a_published_model_is_whole_and_fetched(location: str, tmp_path: Path) -> None:
    publish_folder(make_model(tmp_path / "model", shards=2), location)
    assert stored_problem(location) is None
    assert (Path(fetched(location)) / "model-1.safetensors").is_file()
    found = answer("validate", "demo", "-s", f"model.path={location}")
    assert found.status == 0, found


@pytest.mark.parametrize(
    ("but", "said"),
    [
        ("", f"has no {COMPLETE}, so its upload did not end; upload it whole"),
        ("model-1.safetensors", f"{INDEX} names 2 files, and model-1.safetensors is not there"),
        ("tokenizer.json", "has no tokenizer"),
        ("config.json", "holds no config.json"),
    ],
)
def test_a_partial_one_is_refused_by_name(location: str, tmp_path: Path, but: str, said: str) -> None:
    put(make_model(tmp_path / "model", shards=2), location, but=but)
    with pytest.raises(CheckpointError) as refused:
        fetched(location)
    assert str(refused.value).startswith(f"{location}: {said}")
    train = answer("train", "-r", "demo", "-m", "manifest.jsonl", "-o", "out", "--model", location)
    is_a_mistake(train, said)
    checked = answer("validate", "demo", "-s", f"model.path={location}")
    assert (checked.status, said in checked.output) == (2, True)


def test_fewer_bytes_than_its_index_says_or_none_are_refused(location: str, tmp_path: Path) -> None:
    assert "nothing is stored there" in str(stored_problem(location))
    folder = make_model(tmp_path / "model", shards=2)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": 10**9}}))
    publish_folder(folder, location)
    assert "1,000,000,000" in str(stored_problem(location))


def test_a_store_that_is_away_is_a_problem_here_and_none_from_afar(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from appo import checks, objectstore
    from appo.config import load_recipe

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    objectstore.client.cache_clear()
    recipe = load_recipe("demo", [f"model.path={location}"])
    with pytest.raises(checks.CheckFailed, match=r"not reached in 6 attempts.*AWS_ENDPOINT_URL"):
        checks.refuse(checks.here(recipe), checks.FROM_AFAR)
    outcomes = {one.check.name: one for one in checks.run_checks(checks.submitted(recipe), checks.FROM_AFAR)}
    assert "the first step asks it" in outcomes["model in the store"].skipped
