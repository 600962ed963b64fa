"""One prompt -> what vLLM's engine takes, past vLLM's own processor: nothing is tokenized or scaled a second
time.

The tensors of `PromptInputs` themselves are handed over: token ids with their placeholders already expanded,
features (or pixels, where the tower trains), grid and seconds per temporal patch. So the rollout sees what
scoring and loss see. The same items travel in process (`engine_input`) and to `vllm serve`
(`served_features`).
"""

from __future__ import annotations

import hashlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from appo.errors import SettingError, UserError
from appo.modeling.inputs import PromptInputs, Vision
from appo.modeling.positions import IMAGE, VIDEO

# Families whose visual tokens of one video stand in one unbroken run, which is what a placeholder range says.
FAMILIES = ("qwen2_vl", "qwen2_5_vl")


class UnsupportedByVLLM(UserError, ValueError):
    """A model whose videos this module cannot hand to vLLM."""


def check_family(model_type: str) -> None:
    """Raise UnsupportedByVLLM, by name, for a family whose placeholders are laid out otherwise."""
    if model_type not in FAMILIES:
        raise UnsupportedByVLLM(
            f"model_type={model_type!r}: rollouts with vLLM carry videos for {', '.join(FAMILIES)}; "
            "use training.rollout=transformers"
        )


def check_length(prompt: PromptInputs, max_tokens: int, longest: int) -> None:
    """Raise SettingError where a prompt and its completion are longer than the engine was made for."""
    needed = len(prompt.ids) + max_tokens
    if needed > longest:
        raise SettingError(
            f"training.vllm_max_model_len={longest}: sample {prompt.sample.id} has {len(prompt.ids)} prompt "
            f"tokens and may draw {max_tokens}; raise it to {needed} or more"
        )


def engine_input(prompt: PromptInputs) -> Any:
    """An engine input of vLLM, for `LLMEngine.add_request`."""
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    visions = _visions(prompt)
    ids = prompt.ids.tolist()
    if not visions:
        return tokens_input(ids)
    return mm_input(
        prompt_token_ids=ids,
        mm_kwargs=MultiModalKwargsItems({kind: [_item(kind, v, prompt)] for kind, v in visions.items()}),
        mm_hashes={kind: [content_key(kind, v, prompt)] for kind, v in visions.items()},
        mm_placeholders={kind: [PlaceholderRange(*_range(prompt, kind))] for kind in visions},
    )


def served_features(prompt: PromptInputs) -> dict[str, Any] | None:
    """The `features` of a request to `/inference/v1/generate`; None for a prompt without video and image."""
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

    visions = _visions(prompt)
    if not visions:
        return None
    places = {kind: _range(prompt, kind) for kind in visions}
    return {
        "mm_hashes": {kind: [content_key(kind, v, prompt)] for kind, v in visions.items()},
        "mm_placeholders": {kind: [{"offset": o, "length": n}] for kind, (o, n) in places.items()},
        "kwargs_data": {kind: [encode_mm_kwargs_item(_item(kind, v, prompt))] for kind, v in visions.items()},
    }


def engine_positions(prompt: PromptInputs, config: Any) -> Tensor:
    """The (3, P) rotary positions that vLLM's own code makes of what it is handed; no engine is asked.

    config: the model's, of one of FAMILIES. A fraction of a millisecond a thousand tokens, so that every prompt can be
    compared.
    """
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    family = _family(config.model_type)
    features = [
        MultiModalFeatureSpec(
            data=_item(kind, vision, prompt),
            modality=kind,
            identifier=kind,
            mm_position=PlaceholderRange(*_range(prompt, kind)),
        )
        for kind, vision in _visions(prompt).items()
    ]
    # Both methods read the configuration only, which a stand-in has without weights.
    model = SimpleNamespace(config=config)
    model.iter_mm_grid_thw = partial(family.iter_mm_grid_thw, model)
    positions: Tensor = family.get_mrope_input_positions(model, prompt.ids.tolist(), features)[0]
    return positions


def _family(model_type: str) -> Any:
    if model_type == "qwen2_vl":
        from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

        return Qwen2VLForConditionalGeneration
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


def content_key(kind: str, vision: Vision, prompt: PromptInputs) -> str:
    """What vLLM knows an item by, in its encoder cache and its prefix cache: equal keys mean equal keys and
    values.

    Seconds are in it because the features of a video do not know them, and the rotary positions do.
    """
    digest = hashlib.sha256(f"{kind} {vision.grid_thw.tolist()} {prompt.seconds_per_grid.tolist()} ".encode())
    if vision.key is not None:
        digest.update(vision.key.encode())
    else:
        digest.update(vision.tower_input.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _visions(prompt: PromptInputs) -> dict[str, Vision]:
    found = {"video": prompt.video, "image": prompt.image}
    return {kind: vision for kind, vision in found.items() if vision is not None}


def _range(prompt: PromptInputs, kind: str) -> tuple[int, int]:
    places = (prompt.token_types == (VIDEO if kind == "video" else IMAGE)).nonzero().flatten()
    first, length = int(places[0]), len(places)
    if int(places[-1]) - first + 1 != length:
        raise UnsupportedByVLLM(
            f"sample {prompt.sample.id}: its {kind} tokens are interrupted; "
            "rollouts with vLLM need one run of them"
        )
    return first, length


def _item(kind: str, vision: Vision, prompt: PromptInputs) -> Any:
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem

    pixels = "pixel_values_videos" if kind == "video" else "pixel_values"
    name = pixels if vision.features is None else f"{kind}_embeds"
    rows = torch.tensor([len(vision.tower_input)])
    elements: dict[str, tuple[Any, Tensor]] = {
        name: (MultiModalFieldConfig.flat_from_sizes(kind, rows), vision.tower_input),
        f"{kind}_grid_thw": (MultiModalFieldConfig.batched(kind, keep_on_cpu=True), vision.grid_thw),
    }
    if kind == "video" and len(prompt.seconds_per_grid):  # Qwen2-VL takes none, and vLLM would use them
        seconds = prompt.seconds_per_grid
        elements["second_per_grid_ts"] = (MultiModalFieldConfig.batched(kind, keep_on_cpu=True), seconds)
    return MultiModalKwargsItem(
        {key: config.build_elems(key, tensor)[0] for key, (config, tensor) in elements.items()}
    )
