"""The name of a checkpoint -> its architecture: sizes of text layers, head and vision tower (`sizes`).

Free of torch, so that a plan is made before anything is loaded. Published models are facts of `architectures/*.json`,
copied from their config.json; a folder speaks for itself. `transformers_config` gives the same sizes to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from appo.errors import UserError
from appo.modeling.sizes import Architecture, Text, Tower
from appo.storage import StorageError, is_s3, open_binary

CONFIG, PROCESSOR = "config.json", ("preprocessor_config.json", "processor_config.json")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class UnknownArchitecture(UserError, ValueError):
    """A checkpoint whose sizes cannot be told: its name, what is missing, the remedy."""


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Sizes of the demo's model (`appo.training.tiny`); the defaults give 0.9 million parameters."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 256
    vision_hidden: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_feed_forward: int = 128
    # Larger than Qwen's 0.02, which suits thousands of hidden units: at 128 it makes learning start late.
    initializer_range: float = 0.05


def tiny_config(shape: TinyShape, vocabulary: int, *, max_positions: int) -> dict[str, Any]:
    """The configuration of a tiny Qwen2.5-VL, as config.json has it; the ids of special tokens are left out.

    Raises ValueError when the heads do not divide the hidden size into a multiple of 8 dimensions each.
    """
    head_dim = shape.hidden // shape.heads
    if shape.hidden % shape.heads or head_dim % 8:
        raise ValueError(
            f"hidden={shape.hidden}, heads={shape.heads}: need a multiple of 8 dimensions a head"
        )
    # Sections of time, height, width sum to half of head_dim; time gets half, a demo frame is one token wide.
    sections = [head_dim // 4, head_dim // 8, head_dim // 8]
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.feed_forward,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "max_position_embeddings": max_positions,
            "initializer_range": shape.initializer_range,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            "bos_token_id": None,
        },
        "vision_config": {
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_feed_forward,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": [shape.vision_layers - 1],
            "tokens_per_second": 2,
            "initializer_range": shape.initializer_range,
        },
    }


@cache
def published() -> dict[str, Architecture]:
    """Architectures of published models by their name on the hub."""
    found = {}
    for file in sorted((resources.files("appo.modeling") / "architectures").iterdir(), key=lambda f: f.name):
        facts = json.loads(file.read_text(encoding="utf-8"))
        found[facts["model"]] = read_config(
            facts["config"],
            facts["model"],
            processor=facts["processor"],
            source=facts["source"],
            unverified=facts["unverified"],
        )
    return found


def architecture_of(path: str) -> Architecture:
    """Of a checkpoint: a folder, an `s3://` URI or a name on the hub, with or without its @REVISION.

    Nothing is asked of the hub: the name is one of `published`, or in the hub's cache on this machine. Raises
    UnknownArchitecture.
    """
    folder = Path(path)
    if is_s3(path) or folder.is_dir():
        return _in_folder(path)
    name, _, revision = path.partition("@")
    if name in published():
        return published()[name]
    cached = _in_hub_cache(name, revision)
    if cached is not None:
        return _in_folder(cached, name)
    raise UnknownArchitecture(
        f"model.path={path!r}: is no folder, not in the hub's cache here, and none of the models whose sizes are known "
        f"({', '.join(published())}); name a folder with its {CONFIG}"
    )


def transformers_config(architecture: Architecture) -> Any:
    """The same architecture as transformers knows it: build it with `AutoModelForImageTextToText.from_config`."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[architecture.model_type].from_dict(dict(architecture.config))


def read_config(
    config: Mapping[str, Any],
    model: str,
    *,
    processor: Mapping[str, Any] | None = None,
    source: str = CONFIG,
    unverified: tuple[str, ...] | list[str] = (),
) -> Architecture:
    """The sizes in a config.json, with the text's own keys at its top or in `text_config`.

    Raises UnknownArchitecture for another family or a size that is missing.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnknownArchitecture(
            f"{model}: model_type={kind!r} in {source}: sizes are known for {', '.join(FAMILIES)}"
        )
    try:
        text, tower = _text(kind, config), _tower(kind, config["vision_config"])
    except KeyError as error:
        raise UnknownArchitecture(
            f"{model}: {error.args[0]} is missing in {source}; take a whole config.json, as the publisher has it"
        ) from error
    return Architecture(model, kind, text, tower, config, processor or {}, source, tuple(unverified))


def _text(kind: str, config: Mapping[str, Any]) -> Text:
    text = config.get("text_config") or config
    heads = text["num_attention_heads"]
    return Text(
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        key_value_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        biases=bool(text.get("attention_bias", False)) if kind == "qwen3_vl" else True,
        head_norms=kind == "qwen3_vl",
    )


def _tower(kind: str, vision: Mapping[str, Any]) -> Tower:
    first = kind == "qwen2_vl"  # which calls the tower's width embed_dim, and the features' hidden_size
    width = vision["embed_dim" if first else "hidden_size"]
    windows = kind == "qwen2_5_vl"
    return Tower(
        hidden=width,
        intermediate=int(width * vision["mlp_ratio"]) if first else vision["intermediate_size"],
        layers=vision["depth"],
        heads=vision["num_heads"],
        out=vision["hidden_size" if first else "out_hidden_size"],
        patch=vision.get("patch_size", 14),
        temporal=vision.get("temporal_patch_size", 2),
        merge=vision.get("spatial_merge_size", 2),
        channels=vision.get("in_channels", vision.get("in_chans", 3)),
        gated=windows,
        centred_norms=not windows,
        patch_bias=kind == "qwen3_vl",
        full_layers=tuple(vision["fullatt_block_indexes"]) if windows else None,
        window=vision.get("window_size", 112) if windows else 0,
        positions=vision.get("num_position_embeddings", 0) if kind == "qwen3_vl" else 0,
        deepstack=len(vision.get("deepstack_visual_indexes", ())) if kind == "qwen3_vl" else 0,
    )


def _in_folder(folder: str, model: str | None = None) -> Architecture:
    place = folder.rstrip("/")
    try:
        config = _json(f"{place}/{CONFIG}")
    except StorageError as error:
        raise UnknownArchitecture(
            f"model.path={folder!r}: {error}; name the folder of a checkpoint"
        ) from error
    processor = next((found for name in PROCESSOR if (found := _json_or_none(f"{place}/{name}"))), None)
    return read_config(config, model or folder, processor=processor, source=f"{place}/{CONFIG}")


def _json_or_none(path: str) -> dict[str, Any] | None:
    try:
        return _json(path)
    except StorageError:
        return None


def _json(path: str) -> dict[str, Any]:
    """Raises StorageError where the file cannot be had, UnknownArchitecture where it is damaged."""
    with open_binary(path) as file:
        data = file.read()
    try:
        found = json.loads(data)
    except ValueError as error:
        raise UnknownArchitecture(f"{path}: is not valid JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise UnknownArchitecture(f"{path}: must hold an object, found {type(found).__name__}")
    return found


def _in_hub_cache(name: str, revision: str) -> str | None:
    """The folder of a snapshot on this machine; nothing is asked of the hub."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CONFIG, revision=revision or None)
    return str(Path(found).parent) if isinstance(found, str) else None
