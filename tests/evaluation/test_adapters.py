"""Checkpoints that are only LoRA adapters, as training with `model.lora` saves them: merged once, then evaluated."""

from __future__ import annotations

import json
import shutil

import pytest

from appo.evaluation.checkpoints import CheckpointError, checkpoint_weights
from appo.modeling.adapters import AdapterError, is_adapter, whole_checkpoint


def test_a_whole_checkpoint_is_left_as_it_is(small_set):
    assert whole_checkpoint(str(small_set.models[0])) == str(small_set.models[0])


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "{manifest}"])
def test_what_is_no_checkpoint_is_refused_before_anything_starts(small_set, tmp_path, name):
    import appo.evaluation.run as run

    said = r"(holds no config\.json|no such folder, and no hub name); name a checkpoint folder"
    with pytest.raises(CheckpointError, match=said):
        run.evaluate(
            small_set.recipe(),
            checkpoints={"a": name.format(manifest=small_set.manifest.parent)},
            manifest_path=small_set.manifest,
            out=tmp_path,
        )


def test_merged_weights_are_base_plus_adapters_and_made_once(adapters, small_set, monkeypatch):
    import torch

    import appo.modeling.adapters as module

    folder, adapted = adapters
    assert is_adapter(folder)
    merged = whole_checkpoint(str(folder))
    monkeypatch.setattr(module, "_merge", None)
    assert whole_checkpoint(str(folder)) == merged
    before, after = dict(checkpoint_weights(str(small_set.models[0]))), dict(checkpoint_weights(merged))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for layer, block in enumerate(adapted.base_model.model.model.language_model.layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            (name,) = [n for n in changed if n.endswith(f"layers.{layer}.self_attn.{part}.weight")]
            projection = getattr(block.self_attn, part)
            up, down = projection.lora_B["default"].weight, projection.lora_A["default"].weight
            expected = before[name] + projection.scaling["default"] * (up @ down).detach()
            torch.testing.assert_close(after[name], expected)
            changed.remove(name)
    assert not changed  # neither the tower nor the head


def test_an_interrupted_merge_leaves_nothing_behind(adapters, monkeypatch):
    import appo.modeling.adapters as module

    folder, _ = adapters
    before = sorted(path.name for path in folder.iterdir())

    def stopped(folder, origin, out):
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_merge", stopped)
    with pytest.raises(KeyboardInterrupt):
        whole_checkpoint(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_adapters_whose_base_has_moved(adapters, small_set, tmp_path):
    folder, _ = adapters
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/elsewhere/base"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"adapters of /elsewhere/base, which is not here.*model\.path="):
        whole_checkpoint(str(folder))
    found = whole_checkpoint(str(folder), lambda: str(small_set.models[0]))
    assert (tmp_path / "checkpoint" / found / "config.json").is_file()
    # Another base gives another merged checkpoint, not the one that is there.
    assert whole_checkpoint(str(folder), lambda: str(small_set.models[1])) != found


def test_adapters_that_do_not_fit_are_refused(adapters):
    from safetensors.torch import load_file, save_file

    folder, _ = adapters
    weights = load_file(folder / "adapter_model.safetensors")
    first = min(weights)
    missing = {name: tensor for name, tensor in weights.items() if name != first}
    save_file(missing, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"do not fit .* is in only one of the two"):
        whole_checkpoint(str(folder))
    save_file(missing | {first: weights[first][:2]}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="do not fit"):
        whole_checkpoint(str(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"lacks adapter_model\.safetensors"):
        whole_checkpoint(str(folder))
    assert not list(folder.glob("*merg*"))


def test_adapters_are_evaluated_as_their_merged_checkpoint(adapters, small_set, tmp_path):
    """Through the whole of `appo evaluate` with transformers; vLLM takes the merged folder in test_engine.py."""
    import appo.evaluation.run as run

    folder, _ = adapters
    merged = tmp_path / "merged"
    shutil.copytree(whole_checkpoint(str(folder)), merged)
    recipe = small_set.recipe("evaluation.engine=transformers")
    out = tmp_path / "out"
    run.evaluate(
        recipe,
        checkpoints={"adapters": str(folder), "merged": str(merged), "base": str(small_set.models[0])},
        manifest_path=small_set.manifest,
        out=out,
        progress=False,
    )
    adapted, whole, base = (
        (out / name / "key_moment.jsonl").read_text() for name in ("adapters", "merged", "base")
    )
    assert adapted == whole
    assert adapted.split("\n")[1] != base.split("\n")[1]
