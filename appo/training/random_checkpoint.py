"""The architecture of a published model -> a checkpoint folder of that size with random weights.

For rehearsals: what a run needs in memory and time does not depend on the values of weights. The folder is like a
released one (config, sharded safetensors, processor, tokenizer), so that the code under rehearsal is the run's own. The
tokenizer is the demo's byte-level one: its texts are longer in tokens than the published tokenizer's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from appo.modeling.architecture import transformers_config
from appo.modeling.sizes import Architecture

SHARD_BYTES = 2 << 30
# Random numbers are drawn once and repeated: drawing seven billion takes minutes, and no pass is faster for it.
_POOL = 1 << 22


def write_random_checkpoint(
    architecture: Architecture, folder: Path, *, texts: Iterable[str], dtype: str, layers: int | None = None
) -> int:
    """Write the folder, one shard in memory at a time. Returns the number of parameters.

    texts: what the tokenizer is trained on. layers: decoder layers, None for all of them.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(texts)
    config = _config(architecture, tokenizer, layers)
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    pool = (
        torch.empty(_POOL)
        .normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        .to(getattr(torch, dtype))
    )
    index: dict[str, str] = {}
    shard: dict[str, Any] = {}
    size, total, shards = 0, 0, 0

    def close() -> None:
        nonlocal shard, size, shards
        if not shard:
            return
        shards += 1
        name = f"model-{shards:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, parameter in model.named_parameters():
        total += parameter.numel()
        shard[name] = _filled(name, parameter, pool)
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            close()
    close()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total * pool.element_size()}, "weight_map": index}),
        encoding="utf-8",
    )
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _processor(architecture, tokenizer).save_pretrained(folder)
    return total


def _filled(name: str, parameter: Any, pool: Any) -> Any:
    """Ones for norms, zeros for biases, else the pool over and over, from another place for every weight."""
    import torch

    if "norm" in name and name.endswith("weight"):
        return torch.ones(parameter.shape, dtype=pool.dtype)
    if parameter.dim() == 1:
        return torch.zeros(parameter.shape, dtype=pool.dtype)
    shifted = pool.roll(len(name) * 7919)
    repeats = -(-parameter.numel() // len(pool))
    return shifted.repeat(repeats)[: parameter.numel()].view(parameter.shape).clone()


def _config(architecture: Architecture, tokenizer: Any, layers: int | None) -> Any:
    """The published configuration with this tokenizer's ids; the vocabulary keeps the published size."""
    from appo.training import tiny

    config = copy.deepcopy(transformers_config(architecture))
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        kinds = getattr(config.text_config, "layer_types", None)
        if kinds:
            config.text_config.layer_types = kinds[:layers]
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in tiny.SPECIAL}
    config.image_token_id, config.video_token_id = ids[tiny.IMAGE], ids[tiny.VIDEO]
    config.vision_start_token_id, config.vision_end_token_id = ids[tiny.VISION_START], ids[tiny.VISION_END]
    for part in (config, config.text_config):
        part.bos_token_id, part.eos_token_id, part.pad_token_id = (
            None,
            ids[tiny.TURN_END],
            ids[tiny.END_OF_TEXT],
        )
    return config


def _tokenizer(texts: Iterable[str]) -> Any:
    from appo.training import tiny

    return tiny.make_tokenizer(texts)


def _processor(architecture: Architecture, tokenizer: Any) -> Any:
    """The published settings of pixels and patches around this tokenizer."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    from appo.training.tiny import CHAT_TEMPLATE

    names = (
        "patch_size",
        "temporal_patch_size",
        "merge_size",
        "min_pixels",
        "max_pixels",
        "image_mean",
        "image_std",
    )
    settings = {name: architecture.processor[name] for name in names if name in architecture.processor}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        video_processor=Qwen2VLVideoProcessor(**settings, do_sample_frames=False, cap_pixels_per_frame=True),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
