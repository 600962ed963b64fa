"""Folders of steps on a real S3 server (SeaweedFS): published and fetched whole, mirrored while they grow."""

from __future__ import annotations

import shutil
import time
import uuid
from pathlib import Path

import pytest

from appo.folders import COMPLETE, Mirror, fetch_folder, local_folder, publish_folder
from appo.objectstore import list_objects
from tests.data_room.stores import Fault, FaultyProxy

pytestmark = pytest.mark.slow


@pytest.fixture
def location(s3: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("APPO_SCRATCH", str(tmp_path / "scratch"))
    return f"s3://data/{uuid.uuid4()}/train/appo-seed0"


def forget(location: str) -> Path:
    """What a new pod starts with: nothing."""
    shutil.rmtree(local_folder(location))
    return local_folder(location)


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> None:
    place = folder / "checkpoints" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(f"weights {step}".encode() * 1000)
    if whole:
        (place / "COMPLETE").write_text(f"{step}\n")


def names(location: str) -> set[str]:
    return {name for name, _ in list_objects(location)}


def test_what_one_step_publishes_the_next_one_fetches(location: str) -> None:
    folder = local_folder(location)
    (folder / "shards").mkdir()
    (folder / "shards" / "0.parquet").write_bytes(bytes(range(256)) * 1000)
    (folder / "manifest.jsonl").write_text("{}\n")
    publish_folder(folder, location)

    forget(location)
    fetched = fetch_folder(location)
    assert (fetched / "shards" / "0.parquet").read_bytes() == bytes(range(256)) * 1000
    assert (fetched / "manifest.jsonl").read_text() == "{}\n"


def test_a_folder_whose_publishing_was_cut_off_is_not_taken_for_whole(location: str, s3: FaultyProxy) -> None:
    folder = local_folder(location)
    for name in ("a", "b"):
        (folder / name).write_text(name)
    s3.faults.append(
        Fault("error500", lambda method, path: method == "PUT" and path.endswith("/b"), times=100)
    )
    with pytest.raises(OSError, match="/b"):
        publish_folder(folder, location)
    assert names(location) == {"a"}
    forget(location)
    with pytest.raises(FileNotFoundError, match="not complete"):
        fetch_folder(location)


def test_a_part_of_a_published_folder_is_whole_by_its_marker(location: str) -> None:
    """A champion is the checkpoint in a training's folder, and evaluated from there."""
    folder = local_folder(location)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text("{}")
    publish_folder(folder, location)
    assert (fetch_folder(f"{location}/checkpoint") / "config.json").read_text() == "{}"


def test_a_new_pod_continues_from_the_newest_whole_checkpoint(location: str) -> None:
    folder = local_folder(location)
    with Mirror(folder, location, interval_s=60) as mirror:
        checkpoint(folder, 40)
        checkpoint(folder, 80)
        checkpoint(folder, 120, whole=False)  # the pod dies while it writes this one
        (folder / "metrics.jsonl").write_text('{"step": 80}\n')
        mirror.push()
    assert "checkpoints/checkpoint-120/model.safetensors" not in names(location)
    assert COMPLETE not in names(location)

    folder = forget(location)
    with Mirror(folder, location, interval_s=60):
        found = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert found == ["checkpoint-80"]
        weights = folder / "checkpoints" / "checkpoint-80" / "model.safetensors"
        assert weights.read_bytes() == b"weights 80" * 1000
        assert (folder / "metrics.jsonl").read_text() == '{"step": 80}\n'


def test_the_marker_of_a_checkpoint_arrives_after_its_weights(location: str, s3: FaultyProxy) -> None:
    folder = local_folder(location)
    with Mirror(folder, location, interval_s=60):
        checkpoint(folder, 40)
    puts = [path for method, path, _ in s3.requests if method == "PUT" and "checkpoint-40" in path]
    assert puts[-1].endswith("COMPLETE")
    assert any(path.endswith("model.safetensors") for path in puts[:-1])


def test_nothing_is_sent_twice_and_a_file_that_grew_is_sent_again(location: str, s3: FaultyProxy) -> None:
    folder = local_folder(location)
    with Mirror(folder, location, interval_s=60) as mirror:
        (folder / "metrics.jsonl").write_text("one\n")
        mirror.push()
        before = len(s3.requests)
        mirror.push()
        assert len(s3.requests) == before
        (folder / "metrics.jsonl").write_text("one\ntwo\n")
    forget(location)
    with Mirror(folder, location, interval_s=60):
        assert (folder / "metrics.jsonl").read_text() == "one\ntwo\n"


def test_an_outage_in_mid_training_costs_nothing(location: str, s3: FaultyProxy) -> None:
    """The thread goes on after a failed upload; what it could not send arrives at the next interval."""
    folder = local_folder(location)
    s3.faults.append(Fault("error500", lambda method, path: method == "PUT", times=12))
    with Mirror(folder, location, interval_s=0.05):
        checkpoint(folder, 40)
        end = time.monotonic() + 20
        while "checkpoints/checkpoint-40/COMPLETE" not in names(location) and time.monotonic() < end:
            time.sleep(0.1)
    assert s3.faults[0].hits == 12
    assert "checkpoints/checkpoint-40/COMPLETE" in names(location)


def test_a_local_folder_is_its_own_place(tmp_path: Path) -> None:
    folder = local_folder(str(tmp_path / "run"))
    (folder / "a").write_text("a")
    publish_folder(folder, str(folder))
    assert fetch_folder(str(folder)) == folder
    assert not (folder / COMPLETE).exists()
    with pytest.raises(FileNotFoundError, match="run that step again"):
        fetch_folder(str(tmp_path / "gone"))
