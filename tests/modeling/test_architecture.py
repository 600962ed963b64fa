"""Sizes read from a configuration against the model that transformers makes of it."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.modeling.architecture import (
    TinyShape,
    UnknownArchitecture,
    architecture_of,
    published,
    read_config,
    tiny_config,
    transformers_config,
)


def built(architecture):
    """The model on torch's meta device: every parameter, no memory."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(transformers_config(architecture))


def counted(model):
    tower = sum(p.numel() for p in model.model.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    head = model.lm_head.weight
    own = 0 if head is model.model.language_model.embed_tokens.weight else head.numel()
    return total - tower - own, own, tower


@pytest.mark.parametrize("name", sorted(published()))
def test_a_published_model_has_the_parameters_that_are_counted(name):
    architecture = published()[name]
    found = architecture.parameters
    assert (found.text, found.head, found.tower) == counted(built(architecture))
    assert architecture.source
    assert architecture.processor["patch_size"] == architecture.tower.patch
    assert architecture.processor["merge_size"] == architecture.tower.merge


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976), ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656)],
)
def test_the_papers_models_have_their_published_size(name, parameters):
    assert architecture_of(f"{name}@66285546d2b821cf421d4f5eb2576359d3770cd3").parameters.total == parameters


QWEN2_VL = {
    "model_type": "qwen2_vl",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 4, "num_heads": 2},
}


def test_the_first_family_is_counted_too():
    architecture = read_config(QWEN2_VL, "small")
    found = architecture.parameters
    assert (found.text, found.head, found.tower) == counted(built(architecture))


@settings(max_examples=10, deadline=None)
@given(
    st.builds(
        TinyShape,
        hidden=st.sampled_from([32, 64, 128]),
        layers=st.integers(1, 3),
        heads=st.just(4),
        key_value_heads=st.sampled_from([1, 2, 4]),
        feed_forward=st.sampled_from([48, 320]),
        vision_hidden=st.sampled_from([32, 64]),
        vision_layers=st.integers(1, 3),
    ),
    st.integers(50, 400),
)
def test_any_tiny_model_has_the_parameters_that_are_counted(shape, vocabulary):
    architecture = read_config(tiny_config(shape, vocabulary, max_positions=128), "tiny")
    found = architecture.parameters
    assert (found.text, found.head, found.tower) == counted(built(architecture))


def test_a_folder_speaks_for_itself(tmp_path):
    from appo.config import Video
    from appo.training import tiny

    tokenizer = tiny.make_tokenizer(["a question"])
    model = tiny.make_model(tokenizer, seed=0)
    tiny.save(model, tiny.make_processor(tokenizer, Video()), tmp_path)
    architecture = architecture_of(str(tmp_path))
    assert architecture.parameters.total == sum(p.numel() for p in model.parameters())
    assert architecture.text.vocabulary == len(tokenizer)
    assert architecture.processor


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "name the folder of a checkpoint"),
        ("{", "is not valid JSON"),
        ("[]", "must hold an object, found list"),
        (json.dumps({"model_type": "llava"}), "model_type='llava'"),
        (json.dumps({**QWEN2_VL, "num_hidden_layers": None} | {"vision_config": {}}), "embed_dim is missing"),
    ],
)
def test_a_folder_without_sizes_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnknownArchitecture, match=message) as refused:
        architecture_of(str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(UnknownArchitecture, match=r"Qwen/Qwen2.5-VL-7B-Instruct"):
        architecture_of("Qwen/Qwen9-VL")


def test_sizes_are_told_without_torch():
    code = (
        "import sys; from appo.modeling.architecture import architecture_of;"
        "architecture_of('Qwen/Qwen2.5-VL-7B-Instruct').parameters;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
