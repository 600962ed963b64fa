"""Names of models on the hub: what is one, which commit it means, and what is said where it means none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appo import hub, steps
from appo.errors import SettingError
from appo.hub import HubName
from tests.hub_server import Hub

ONE, OTHER = "1" * 40, "2" * 39 + "a"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", HubName("Qwen/Qwen2.5-VL-7B-Instruct")),
        ("Qwen/Qwen2.5-VL-7B-Instruct@abc123", HubName("Qwen/Qwen2.5-VL-7B-Instruct", "abc123")),
        ("org/name@refs/pr/7", HubName("org/name", "refs/pr/7")),
        ("s3://bucket/models/a@b", None),
        ("/models/a@b", None),
        ("./models/a@b", None),
        ("models/of/mine@b", None),
        ("checkpoint", None),
    ],
)
def test_what_is_a_name_on_the_hub(path: str, name: HubName | None) -> None:
    assert hub.hub_name(path) == name
    assert name is None or str(name) == path


def test_a_folder_is_a_folder_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "tuned@home").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.hub_name("runs/tuned@home") is None
    assert hub.pinned("runs/tuned@home") == "runs/tuned@home"
    assert hub.told("runs/tuned@home") == {"model": "runs/tuned@home", "commit": None}


@pytest.mark.parametrize("path", ["org/name@", "org/name@a b", "org/name@@a"])
def test_what_can_be_no_revision_is_refused_in_the_first_step(path: str) -> None:
    with pytest.raises(SettingError, match=f"model '{path}': .*ORG/NAME@REVISION"):
        steps.validate("demo", [f"model.path={path}"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    commits = {}
    for commit in (ONE, OTHER):
        commits[commit] = tmp_path / commit
        commits[commit].mkdir()
        (commits[commit] / "config.json").write_text(json.dumps({"commit": commit}))
        (commits[commit] / "weights.bin").write_text("in a format that is not read")
    with Hub("org/name", commits, {"main": ONE, "v2": OTHER}) as hub:
        yield hub


def asked(call: str, cache: Path, endpoint: str = "http://127.0.0.1:9", *, offline: bool = False) -> str:
    """What `call` of appo.hub returns in a process of its own: the hub's client reads its variables once."""
    code = f"from appo import hub\nfrom appo.handover import checkpoint_of\nprint({call})"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_HOME": str(cache),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("path", "commit"),
    [
        ("org/name", ONE),
        ("org/name@main", ONE),
        ("org/name@v2", OTHER),
        (f"org/name@{OTHER}", OTHER),
        (f"org/name@{OTHER[:8]}", OTHER),
    ],
)
def test_a_name_means_a_commit(server: Hub, tmp_path: Path, path: str, commit: str) -> None:
    assert asked(f"hub.pinned({path!r})", tmp_path / "cache", server.address) == f"org/name@{commit}"


def test_a_commit_is_fetched_once_and_is_there_without_the_hub(server: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = Path(asked("checkpoint_of('org/name@v2')", cache, server.address))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]  # the only format that is read
    assert json.loads((folder / "config.json").read_text()) == {"commit": OTHER}
    for path in ("org/name@v2", f"org/name@{OTHER}", f"org/name@{OTHER[:8]}"):
        assert asked(f"hub.pinned({path!r})", cache, offline=True) == f"org/name@{OTHER}"
        assert Path(asked(f"checkpoint_of({path!r})", cache, offline=True)) == folder
    # Neither another revision that the cache lacks nor the start of a branch's name is taken for it.
    for path in ("org/name", "org/name@v", f"org/name@{ONE}", "other/name"):
        said = asked(f"hub.pinned({path!r})", cache, offline=True)
        assert f"HubError: model '{path}': HF_HUB_OFFLINE=1 is set" in said
        assert "hf download" in said


def test_what_the_hub_does_not_have_is_named(server: Hub, tmp_path: Path) -> None:
    def said(path: str, endpoint: str = server.address) -> str:
        return asked(f"hub.pinned({path!r})", tmp_path / "cache", endpoint)

    assert "HubError: model 'org/name@v3': org/name has no revision 'v3'" in said("org/name@v3")
    assert "has no such model, or it is private; there is no folder" in said("runs/name")
    assert "cannot be asked" in said("org/name", "http://127.0.0.1:9")
    assert "set HF_HUB_OFFLINE=1 to take what the local cache holds" in said("org/name", "http://127.0.0.1:9")
    server.gated = True
    assert "HubError: model 'org/name': is gated; accept its terms" in said("org/name")
