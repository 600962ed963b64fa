"""One small key-moment set and two tiny models with different weights, shared by the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from appo.config import Recipe, load_recipe

OVERRIDES = (
    "data.key_moment.train=2",
    "data.key_moment.validation=2",
    "data.key_moment.test=12",
    "data.key_moment.easy_train=2",
    "evaluation.max_tokens=12",
    "evaluation.max_num_seqs=4",
)


@dataclass(frozen=True)
class SmallSet:
    """models: two folders of the same architecture whose weights all differ."""

    manifest: Path
    models: tuple[Path, Path]

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe("demo", [*OVERRIDES, *overrides])


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> SmallSet:
    import torch

    from appo.data.assemble import assemble
    from appo.data.manifest import read_manifest
    from appo.data.messages import prompt_messages
    from appo.training import tiny

    folder = tmp_path_factory.mktemp("evaluated")
    recipe = load_recipe("demo", list(OVERRIDES))
    manifest = assemble(recipe, folder / "data", progress=False).manifest
    texts = [prompt_messages(s, "bare")[0]["content"][-1]["text"] for s in read_manifest(manifest).samples]
    tokenizer = tiny.make_tokenizer(texts)
    models = []
    for seed in (0, 1):
        model = tiny.make_model(tokenizer, seed=seed)
        with torch.no_grad():  # as initialised, every input gives nearly the same logits
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0 if "language_model" in name or "lm_head" in name else 1.5)
        tiny.save(model, tiny.make_processor(tokenizer, recipe.video), folder / f"model{seed}")
        models.append(folder / f"model{seed}")
    return SmallSet(manifest, (models[0], models[1]))


@pytest.fixture
def adapters(small_set, tmp_path):
    """(folder, the adapted model) on model 0; as of a training that went some way: both halves of each adapter
    differ from zero."""
    import torch
    from peft import get_peft_model

    from appo.modeling.loading import load_policy, load_processor
    from appo.training.run import _lora

    recipe = small_set.recipe("model.lora={rank: 4}")
    model = get_peft_model(load_policy(str(small_set.models[0]), recipe.model), _lora(recipe))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(tmp_path / "checkpoint")
    load_processor(str(small_set.models[0])).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", model
