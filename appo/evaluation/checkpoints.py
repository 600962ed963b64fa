"""Checkpoint folders as engines meet them: which fit one engine, how large they are, their weights one by one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appo.modeling.checkpoints import CheckpointError, check_model, loading

if TYPE_CHECKING:
    from torch import Tensor

# Entries of a config.json that say how and by whom it was saved.
BOOKKEEPING = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"})


def read_config(path: str) -> Mapping[str, Any]:
    """A checkpoint's config.json; of a hub name, through transformers."""
    file = Path(path) / "config.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    check_model(path)
    from transformers import AutoConfig

    with loading(path):
        return dict(AutoConfig.from_pretrained(path).to_dict())


def same_architecture(one: str, other: str) -> bool:
    """Whether two checkpoints differ in their weights alone, so that one engine can hold either."""
    from transformers import AutoConfig

    def essence(path: str) -> Any:
        read_config(path)  # says what is missing
        # As transformers understands it: a hub's file leaves out what a saved one writes down.
        with loading(path):
            return _without(AutoConfig.from_pretrained(path).to_dict(), BOOKKEEPING)

    return essence(one) == essence(other)


def _without(values: Any, keys: frozenset[str]) -> Any:
    """Nested dictionaries without these keys, at every depth."""
    if not isinstance(values, Mapping):
        return values
    return {name: _without(value, keys) for name, value in values.items() if name not in keys}


def weights_bytes(path: str) -> int:
    """Size of a checkpoint folder's weights; a hub name's is not known, and taken for large."""
    files = list(Path(path).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else sys.maxsize


def checkpoint_weights(path: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight; a head tied to the embedding is named too, or a running engine would
    keep the old one."""
    from safetensors import safe_open

    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: holds no *.safetensors; name a whole checkpoint, adapters merged")
    names: set[str] = set()
    embedding: Tensor | None = None
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                names.add(name)
                if name.endswith("embed_tokens.weight"):
                    embedding = tensor
                yield name, tensor
    if "lm_head.weight" not in names and embedding is not None:
        yield "lm_head.weight", embedding
