"""Small random models of each supported family, and a padded batch with a video (and an image) for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.modeling import attention, features, positions

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END, PAD = 64, 60, 61, 62, 63, 0
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def build(
    family: str, *, implementation: str = attention.NAME, sliding_window: int | None = None, layers: int = 4
) -> Any:
    """A float32 model with grouped-query attention (4 heads, 2 key-value heads), weights by a fixed seed."""
    import transformers as tf

    attention.register()
    text: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "pad_token_id": PAD,
    }
    if sliding_window is not None:
        text |= {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 1}
    tokens = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
        config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
        kind: Any = tf.Qwen2VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
        config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        kind = tf.Qwen2_5_VLForConditionalGeneration
    else:
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 14,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        }
        config = tf.Qwen3VLConfig(text_config=text | {"head_dim": 16}, vision_config=vision, **tokens)
        kind = tf.Qwen3VLForConditionalGeneration
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=implementation).float().eval()
    with torch.no_grad():  # the default initialisation is so small that attention would be all but uniform
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "language_model" in name:
                parameter.mul_(4.0)
    return features.install(positions.install(model))


@dataclass
class Prompt:
    ids: Tensor
    types: Tensor
    frames: Tensor
    pixels_video: Tensor
    grid_video: Tensor
    pixels_image: Tensor | None
    grid_image: Tensor | None
    seconds: float
    num_frames: int


def prompt(family: str, *, frames: int, text: int, image: bool, seed: int) -> Prompt:
    """[text, (image), video of `frames` patches on a 4x4 grid, text]; Qwen3-VL gets a token before each frame."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(1, 50, (count,), generator=generator).tolist()

    ids, kinds, of_frame = words(3), [0] * 3, [-1] * 3

    def add(token: int, kind: int, count: int, frame: int) -> None:
        ids.append(VISION_START), kinds.append(0), of_frame.append(-1)
        ids.extend([token] * count), kinds.extend([kind] * count), of_frame.extend([frame] * count)
        ids.append(VISION_END), kinds.append(0), of_frame.append(-1)

    if image:
        add(IMAGE, 1, 4, -1)
    if family == "qwen3_vl":
        for t in range(frames):
            ids += words(1)
            kinds.append(0)
            of_frame.append(-1)
            add(VIDEO, 2, 4, t)
    else:
        add(VIDEO, 2, 4 * frames, -2)
        of_frame = [i for i in of_frame if i != -2]
        at = ids.index(VIDEO)
        of_frame[at:at] = [t for t in range(frames) for _ in range(4)]
    ids += words(text)
    kinds += [0] * text
    of_frame += [-1] * text
    patch = 3 * 2 * 14 * 14
    if family == "qwen3_vl":
        patch = 3 * 2 * 14 * 14
    return Prompt(
        ids=torch.tensor(ids),
        types=torch.tensor(kinds),
        frames=torch.tensor(of_frame),
        pixels_video=torch.randn(frames * 16, patch, generator=generator),
        grid_video=torch.tensor([[frames, 4, 4]]),
        pixels_image=torch.randn(16, patch, generator=generator) if image else None,
        grid_image=torch.tensor([[1, 4, 4]]) if image else None,
        seconds=1.5,
        num_frames=frames,
    )


def rope(model: Any, p: Prompt) -> Tensor:
    extra = (
        {"second_per_grid_ts": torch.tensor([p.seconds])} if model.config.model_type == "qwen2_5_vl" else {}
    )
    found, _ = model.model.get_rope_index(
        p.ids.unsqueeze(0),
        p.types.unsqueeze(0),
        image_grid_thw=p.grid_image,
        video_grid_thw=p.grid_video,
        **extra,
    )
    return found[:, 0]


def padded_inputs(model: Any, prompts: list[Prompt], completions: list[list[Tensor]]) -> dict[str, Any]:
    """Left-padded prompts, right-padded completions: one row per completion, as TRL lays them out."""
    width = max(len(p.ids) for p in prompts)
    tail = max(len(c) for group in completions for c in group)
    ids, mask, types, frames, pixels, grids, images, image_grids, seconds = [], [], [], [], [], [], [], [], []
    for p, group in zip(prompts, completions, strict=True):
        for c in group:
            before, after = width - len(p.ids), tail - len(c)
            ids.append(torch.cat([torch.full((before,), PAD), p.ids, c, torch.full((after,), PAD)]))
            mask.append(
                torch.cat([torch.zeros(before), torch.ones(len(p.ids) + len(c)), torch.zeros(after)]).long()
            )
            types.append(torch.cat([torch.zeros(before).long(), p.types, torch.zeros(tail).long()]))
            frames.append(torch.cat([torch.full((before,), -1), p.frames, torch.full((tail,), -1)]))
            pixels.append(p.pixels_video), grids.append(p.grid_video), seconds.append(p.seconds)
            if p.pixels_image is not None:
                images.append(p.pixels_image), image_grids.append(p.grid_image)
    inputs: dict[str, Any] = {
        "input_ids": torch.stack(ids),
        "attention_mask": torch.stack(mask),
        "mm_token_type_ids": torch.stack(types),
        "pixel_values_videos": torch.cat(pixels),
        "video_grid_thw": torch.cat(grids),
    }
    if model.config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    if images:
        inputs |= {"pixel_values": torch.cat(images), "image_grid_thw": torch.cat(image_grids)}
    return {"inputs": inputs, "frames": torch.stack(frames), "width": width, "tail": tail}
