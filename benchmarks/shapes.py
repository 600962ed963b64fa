"""A named size -> a Qwen2.5-VL with random weights and prompts with random pixels: what the benchmarks run
on.

Speed and memory do not depend on the values of weights, so nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from appo.data.schema import VideoSample
from appo.modeling import features, loading
from appo.modeling.attention import register
from appo.modeling.features import base_model
from appo.modeling.inputs import PromptInputs, Vision
from appo.modeling.positions import TEXT, VIDEO, rope_positions

# Special tokens stand at the start of the vocabulary here: small vocabularies have no room for Qwen's
# numbers.
PAD, EOS, START, END, IMAGE_PAD, VIDEO_PAD, FIRST_WORD = 0, 1, 2, 3, 4, 5, 6
PATCH, MERGE = 14, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of model and step. frames: raw frames; side: pixels; text: prompt tokens beside the video;
    completion: N, the longest completion; generations: G; lora: rank of adapters, 0 for full fine-tuning.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    full_attention: tuple[int, ...]
    frames: int
    side: int = 224
    text: int = 100
    completion: int = 512
    generations: int = 8
    groups: int = 1
    dtype: str = "bfloat16"
    checkpointing: bool = True
    lora: int = 0

    @property
    def patches(self) -> int:
        """Patches of a video that enter the tower."""
        return self.frames // 2 * (self.side // PATCH) ** 2

    @property
    def grid(self) -> tuple[int, int, int]:
        """Temporal patches, rows and columns of patches of a video."""
        return self.frames // 2, self.side // PATCH, self.side // PATCH

    @property
    def visual_tokens(self) -> int:
        return self.patches // MERGE**2

    @property
    def prompt(self) -> int:
        return self.visual_tokens + self.text + 2


_TOWER = {
    "vision_hidden": 1280,
    "vision_intermediate": 3420,
    "vision_layers": 32,
    "vision_heads": 16,
    "full_attention": (7, 15, 23, 31),
}
SHAPES = {
    shape.name: shape
    for shape in (
        # The paper's two settings (Qwen2.5-VL-3B with 30 frames, 7B with 16), sizes as in the released
        # config.json.
        Shape(
            name="3b", hidden=2048, intermediate=11008, layers=36, heads=16, key_value_heads=2,
            vocabulary=151_936, tied=True, frames=30, **_TOWER,
        ),
        Shape(
            name="7b", hidden=3584, intermediate=18944, layers=28, heads=28, key_value_heads=4,
            vocabulary=152_064, tied=False, frames=16, **_TOWER,
        ),
        # 3B's proportions at what two cores manage: prompt to completion, tower to text, head to body.
        Shape(
            name="cpu", hidden=384, intermediate=2048, layers=8, heads=6, key_value_heads=2, vocabulary=8_192,
            tied=True, vision_hidden=192, vision_intermediate=512, vision_layers=8, vision_heads=6,
            full_attention=(1, 3, 5, 7), frames=8, text=40, completion=96, dtype="float32",
            checkpointing=False,
        ),
        Shape(
            name="tiny", hidden=128, intermediate=256, layers=4, heads=4, key_value_heads=2, vocabulary=1024,
            tied=True, vision_hidden=64, vision_intermediate=128, vision_layers=2, vision_heads=4,
            full_attention=(1,), frames=6, side=56, text=16, completion=12, dtype="float32",
            checkpointing=False,
        ),
    )
}  # fmt: skip


def build_model(shape: Shape, device: torch.device) -> Any:
    """The model prepared as for training: our attention, a frozen tower apart, rows on demand, TRL's fused head.

    In bfloat16, full fine-tuning has float32 parameters under autocast; under LoRA only the adapters are float32.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from trl.trainer.utils import add_fused_lm_head

    head_dim = shape.hidden // shape.heads
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "max_position_embeddings": 32_768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
            },
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "window_size": 112,
            "fullatt_block_indexes": list(shape.full_attention),
            "tokens_per_second": 2,
        },
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config,
            dtype=getattr(torch, shape.dtype) if shape.lora else torch.float32,
            attn_implementation=register(),
        )
    loading.prepare(model)
    features.detach_tower(model, getattr(torch, shape.dtype))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if shape.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(
            model, LoraConfig(r=shape.lora, lora_alpha=2 * shape.lora, target_modules=targets)
        )
    if shape.checkpointing:
        if shape.lora:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def sharpened(model: Any) -> Any:
    """The text layers' matrices three times as large, for comparisons: as initialised, attention is all but uniform."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "language_model" in name:
                weight.mul_(3.0)
    return model


def build_prompts(shape: Shape, model: Any, *, seed: int = 0) -> list[PromptInputs]:
    """shape.groups prompts: half of the text, the video, the rest; random pixels and words."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor([[shape.frames // 2, shape.side // PATCH, shape.side // PATCH]])
    before = shape.text // 2
    kinds = torch.full((shape.prompt,), TEXT)
    kinds[before + 1 : before + 1 + shape.visual_tokens] = VIDEO
    frame_of_token = torch.full((shape.prompt,), -1)
    frame_of_token[kinds == VIDEO] = torch.arange(shape.frames // 2).repeat_interleave(
        shape.visual_tokens // (shape.frames // 2)
    )
    vision = base_model(model).config.vision_config
    positions = rope_positions(
        kinds,
        iter([(VIDEO, tuple(grid[0].tolist()), 1.0)]),
        merge_size=vision.spatial_merge_size,
        tokens_per_second=vision.tokens_per_second,
    )
    prompts = []
    for number in range(shape.groups):
        ids = torch.randint(FIRST_WORD, shape.vocabulary, (shape.prompt,), generator=generator)
        ids[before], ids[before + 1 + shape.visual_tokens] = START, END
        ids[kinds == VIDEO] = VIDEO_PAD
        pixels = torch.randn(shape.patches, 3 * 2 * PATCH**2, generator=generator)
        prompts.append(
            PromptInputs(
                sample=VideoSample(str(number), "random", "free-form", "question", "answer", video="random"),
                text="",
                ids=ids,
                token_types=kinds,
                frame_of_token=frame_of_token,
                positions=positions,
                num_frames=shape.frames // 2,
                video=Vision(pixels, grid),
                image=None,
                seconds_per_grid=torch.ones(1),
                timestamps_s=(),
            )
        )
    return prompts


def completions(shape: Shape, *, seed: int = 1) -> list[list[torch.Tensor]]:
    """G completions for each group, lengths spread evenly between N/2 and N: what padding costs is in the
    figures.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(shape.completion // 2, shape.completion, shape.generations).long().tolist()
    return [
        [torch.randint(FIRST_WORD, shape.vocabulary, (n,), generator=generator) for n in lengths]
        for _ in range(shape.groups)
    ]


def resized(shape: Shape, **sizes: Any) -> Shape:
    """The shape with some sizes replaced; None keeps its own."""
    return replace(shape, **{name: value for name, value in sizes.items() if value is not None})
