"""Pixels -> visual features, computed once per video and frozen vision tower, wherever they are asked for
again.

Between the prompts of `appo.training.store` and the tower. What identifies features is what they are computed
from: the pixels, and the tower's weights, configuration and precision. The pixels go by the names of the file
(SHA-256), of its sampling and of the processor's settings where these are known, so that a hit needs no frame;
else by their own hash. Nothing that changes any of them can meet an old entry. Two tiers, both bounded in
bytes: memory, and a folder or `s3://` prefix that outlives the process and is shared by seeds, algorithms and
machines.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from appo.errors import SettingError
from appo.modeling import features as vision_features
from appo.modeling.feature_files import FeatureFiles, open_files, why_not
from appo.modeling.inputs import PromptInputs, Vision
from appo.storage import StorageError

if TYPE_CHECKING:
    from appo.config import Recipe

# Raise it when the same pixels and weights would give other features, or the file's layout changes.
_FORMAT = "appo.features/2"


@dataclass
class CacheCounts:
    """How often features were found in memory, found in the folder or bucket, and computed; entries thrown
    away.
    """

    memory: int = 0
    stored: int = 0
    computed: int = 0
    corrupt: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """features: (tokens, width). facts: what a prompt needs of the pixels that it no longer has, as JSON values;
    `grid_thw`, and under a name whatever the caller of `encode` added.
    """

    features: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grid_thw(self) -> Tensor:
        """(1, 3) before merging, as the processor gave it."""
        return torch.tensor(self.facts["grid_thw"])


class FeatureCache:
    """Visual features by content. Tensors are on the CPU: a step moves its own prompts' features only."""

    def __init__(self, revision: str, *, memory_bytes: int, files: FeatureFiles | None = None):
        self.revision, self.counts = revision, CacheCounts()
        self._memory_limit, self._files = memory_bytes, files
        self._memory: OrderedDict[str, Encoded] = OrderedDict()
        self._memory_bytes = 0

    def encode(
        self,
        inputs: PromptInputs,
        model: Any,
        keys: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> PromptInputs:
        """The same prompt with features in place of pixels; `Vision.key` names them for `restore`.

        keys: "video" and "image" -> a key from `named`; without one the pixels are hashed. facts: of a named video,
        kept beside its features.
        """
        keys = keys or {}
        return replace(
            inputs,
            video=self._encoded(inputs.video, "video", model, keys.get("video"), facts or {}),
            image=self._encoded(inputs.image, "image", model, keys.get("image"), {}),
        )

    def restore(self, inputs: PromptInputs) -> PromptInputs | None:
        """A prompt stripped by `stripped`, with its features; None when one is no longer at hand."""
        found: dict[str, Any] = {}
        for kind in ("video", "image"):
            vision: Vision | None = getattr(inputs, kind)
            if vision is not None:
                entry = self.find(vision.key) if vision.key else None
                if entry is None:
                    return None
                found[kind] = replace(vision, features=entry.features)
        return replace(inputs, **found)

    def find(self, key: str) -> Encoded | None:
        """What is known by a key, from memory or storage, or None."""
        if (found := self._memory.get(key)) is not None:
            self._memory.move_to_end(key)
            self.counts.memory += 1
            return found
        if (found := self._load(key)) is not None:
            self.counts.stored += 1
            self._remember(key, found)
        return found

    def named(self, kind: str, pixels: str) -> str:
        """Hex SHA-256 over a name of the pixels (equal names, equal pixels) and the tower's revision."""
        return hashlib.sha256(f"{_FORMAT} {self.revision} named {kind} {pixels}".encode()).hexdigest()

    def key(self, kind: str, vision: Vision) -> str:
        """Hex SHA-256 over the pixels, their grid and the tower's revision."""
        digest = hashlib.sha256(f"{_FORMAT} {self.revision} {kind} ".encode())
        digest.update(json.dumps([vision.grid_thw.tolist(), str(vision.pixels.dtype)]).encode())
        digest.update(_bytes(vision.pixels))
        return digest.hexdigest()

    def _encoded(
        self, vision: Vision | None, kind: str, model: Any, name: str | None, facts: Mapping[str, Any]
    ) -> Vision | None:
        if vision is None or vision.features is not None:
            return vision
        key = name or self.key(kind, vision)
        entry = self.find(key)
        if entry is None:
            features = torch.cat(vision_features.encode(model, vision.pixels, vision.grid_thw)).cpu()
            # Pixels of two files may be equal; what else is known of the files need not be.
            entry = Encoded(features, {"grid_thw": vision.grid_thw.tolist(), **(facts if name else {})})
            self.counts.computed += 1
            self._remember(key, entry)
            self._store(key, entry)
        # A slice would keep all pixels alive.
        return Vision(vision.pixels[:0].clone(), vision.grid_thw, entry.features, key)

    def _remember(self, key: str, entry: Encoded) -> None:
        self._memory[key] = entry
        self._memory_bytes += entry.features.nbytes
        while self._memory_bytes > self._memory_limit and len(self._memory) > 1:
            _, dropped = self._memory.popitem(last=False)
            self._memory_bytes -= dropped.features.nbytes

    def _load(self, key: str) -> Encoded | None:
        if self._files is None:
            return None
        try:
            data = self._files.get(key)
            if data is None:
                return None
            entry = unpacked(data, key)
            if entry is None:
                self.counts.corrupt += 1
                self._files.remove(key)
            return entry
        except StorageError as error:
            self._give_up(error)
            return None

    def _store(self, key: str, entry: Encoded) -> None:
        if self._files is None:
            return
        try:
            self._files.put(key, packed(entry, key))
        except StorageError as error:
            self._give_up(error)

    def _give_up(self, error: StorageError) -> None:
        # Features can always be computed again; a full disk or a lost bucket is no reason to lose a training.
        warnings.warn(f"feature cache: {error}; going on in memory only", stacklevel=2)
        self._files = None


def open_cache(recipe: Recipe, model: Any) -> FeatureCache | None:
    """The recipe's cache for this model, or None where features may not be kept (see `feature_files.why_not`).

    Reads the tower's weights once, before anything shards them. Raises StorageError for an unusable folder.
    """
    if why_not(recipe):
        return None
    training = recipe.training
    files = None
    if training.feature_cache_dir is not None:
        files = open_files(training.feature_cache_dir, int(training.feature_cache_gib * 2**30))
    return FeatureCache(
        tower_revision(model), memory_bytes=int(training.feature_cache_memory_gib * 2**30), files=files
    )


def describe(recipe: Recipe) -> str:
    """The start-up line's part about visual features."""
    if reason := why_not(recipe):
        return f"vision features not kept ({reason})"
    place = recipe.training.feature_cache_dir
    return "vision features computed once, kept in " + ("memory" if place is None else f"memory and {place}")


def tower_revision(model: Any) -> str:
    """Hex SHA-256 of the vision tower's configuration and weights (names, shapes, precision, bytes).

    Raises SettingError when a weight of the tower would still be trained.
    """
    tower = vision_features.base_model(model).visual
    if trained := [name for name, weight in tower.named_parameters() if weight.requires_grad]:
        raise SettingError(
            f"vision tower: {trained[0]} is trained, so features change; freeze it (model.freeze_vision)"
        )
    config = tower.config.to_diff_dict()
    for runtime in ("_name_or_path", "transformers_version", "dtype", "_attn_implementation"):
        config.pop(runtime, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        digest.update(_bytes(weight))
    return digest.hexdigest()


def packed(entry: Encoded, key: str) -> bytes:
    """A safetensors file that carries its key, its facts and a checksum of all of it."""
    from safetensors.torch import save

    # One label: safetensors writes several in any order, and equal entries should be equal files.
    return save({"features": entry.features.contiguous()}, metadata={"appo": _label(entry, key)})


def unpacked(data: bytes, key: str) -> Encoded | None:
    """The entry of `packed`, or None when anything about the file is not as it was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        size = int.from_bytes(data[:8], "little")
        label = json.loads(data[8 : 8 + size])["__metadata__"]["appo"]
        entry = Encoded(load(data)["features"], json.loads(label)["facts"])
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return entry if label == _label(entry, key) else None


def _label(entry: Encoded, key: str) -> str:
    facts = dict(entry.facts)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(_bytes(entry.features))
    return json.dumps({"key": key, "facts": facts, "sha256": digest.hexdigest()}, sort_keys=True)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
