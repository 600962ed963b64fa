"""A model folder is looked at as a whole before anything is loaded: what is missing is named, with the remedy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from appo.modeling.checkpoints import (
    CheckpointError,
    check_model,
    is_hub_name,
    loading,
    model_problem,
)
from tests.errors.conftest import make_model


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]  # type: ignore[func-returns-value]


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data)  # type: ignore[func-returns-value]


def cut(name: str, by: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])  # type: ignore[func-returns-value]


INDEX = "model.safetensors.index.json"
BROKEN = {
    "no config": (without("config.json"), "holds no config.json; name a checkpoint folder"),
    "config cut off": (write("config.json", b'{"a":'), "one of its .json files is not JSON"),
    "config a list": (write("config.json", b"[]"), "config.json holds no JSON object"),
    "another family": (write("config.json", b'{"model_type": "llava"}'), "model_type='llava' in its config.json"),
    "no family": (write("config.json", b"{}"), "model_type=None in its config.json: must be one of qwen2_vl"),
    "no chat template": (without("chat_template.jinja"), "has no chat template (chat_template.jinja)"),
    "no index": (without(INDEX), "has config.json and no weights (model.safetensors, or model.safetensors.index"),
    "a shard missing": (without("model-1.safetensors"), f"{INDEX} names 3 files, and model-1.safetensors is not there"),
    "shards missing": (
        without("model-1.safetensors", "model-2.safetensors"), "model-1.safetensors and 1 more are not there",
    ),
    "an empty index": (write(INDEX, b'{"weight_map": {}}'), f"{INDEX} names no files"),
    "a shard cut off": (cut("model-2.safetensors", 3), "model-2.safetensors has"),
    "a shard empty": (write("model-0.safetensors", b""), "model-0.safetensors is cut off"),
    "a shard of text": (write("model-0.safetensors", b"<html>" * 40), "model-0.safetensors is cut off or no safe"),
    "git's placeholder": (
        write("model-0.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "git's placeholder of a file that was not fetched",
    ),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer (tokenizer.json, or vocab.json and merges.txt)"),
    "no processor": (without("preprocessor_config.json"), "has no processor of images and videos"),
}  # fmt: skip


def test_a_whole_folder_is_whole(tmp_path: Path) -> None:
    assert model_problem(str(make_model(tmp_path / "one"))) is None
    assert model_problem(str(make_model(tmp_path / "three", shards=3))) is None
    other = make_model(tmp_path / "other")  # files as some publishers name them
    without("tokenizer.json", "preprocessor_config.json", "model.safetensors")(other)
    without("chat_template.jinja")(other)
    for name in ("vocab.json", "merges.txt", "processor_config.json", "pytorch_model.bin"):
        (other / name).write_text("{}")
    (other / "tokenizer_config.json").write_text('{"chat_template": "..."}')
    check_model(str(other))


@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_folder_lacks_is_named(kind: str, tmp_path: Path) -> None:
    spoil, said = BROKEN[kind]
    folder = make_model(tmp_path / "model", shards=3)
    spoil(folder)
    with pytest.raises(CheckpointError) as refused:
        check_model(str(folder))
    assert str(refused.value).startswith(f"{folder}: ")
    assert said in str(refused.value)
    assert ";" in str(refused.value) or "(git lfs pull)" in str(refused.value)  # the remedy


def test_adapters_alone_will_do_for_evaluation_only(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    check_model(str(tmp_path), adapters=True)
    with pytest.raises(CheckpointError, match=r"LoRA adapters alone; name the merged-\* folder"):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", True),
        ("Qwen/Qwen2.5-VL-7B-Instruct@cc59489", True),
        ("checkpoint", False),
        ("runs/demo/checkpoint", False),
        ("/Qwen/model", False),
        ("./Qwen/model", False),
        ("~/model", False),
        ("here/model", False),  # a slip in the name of a folder's folder
        ("owner/other", True),  # beside models that are kept here as the hub names them
    ],
)
def test_hub_names_are_told_from_folders(
    path: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    make_model(tmp_path / "owner" / "model")
    assert is_hub_name(path) == known
    assert (model_problem(path) is None) == known


def test_what_cannot_be_loaded_is_said_with_its_path(tmp_path: Path) -> None:
    for error, said in (
        (
            OSError("We couldn't connect to\nthe hub"),
            "the hub does not give it (We couldn't connect to the hub)",
        ),
        (ValueError("no such repository"), "name a folder, or see that the hub is reached"),
    ):
        with pytest.raises(CheckpointError) as refused, loading("owner/name"):
            raise error
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)
    with (
        pytest.raises(CheckpointError, match=r"transformers cannot read it: bad; fetch"),
        loading(str(tmp_path)),
    ):
        raise ValueError("bad")
    with pytest.raises(CheckpointError, match="weights have other sizes than"), loading("x"):
        raise RuntimeError("You set `ignore_mismatched_sizes` to `False`")
    with pytest.raises(RuntimeError, match="out of memory"), loading(str(tmp_path)):
        raise RuntimeError("CUDA error: out of memory")
    with pytest.raises(TypeError), loading(str(tmp_path)):  # a defect of ours stays what it is
        raise TypeError


def test_nothing_heavy_is_imported_to_look(tmp_path: Path) -> None:
    code = (
        "import sys; from appo.modeling.checkpoints import check_model; check_model(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'safetensors', 'huggingface_hub') if m in sys.modules])"
    )
    model = make_model(tmp_path / "model", shards=2)
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
