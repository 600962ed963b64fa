"""A tiny Qwen2.5-VL in place of a released one: the published files, settings and tokens, with small sizes.

A folder as the hub has it: a flat `config.json`, `preprocessor_config.json`, a chat template with the default system
turn, a tokenizer without tokens for the tags of answers, a `generation_config.json` that wants another sampling than
training, weights in bfloat16; embeddings tied in the 3B model and not in the 7B one. Only widths, depth and vocabulary
are other. It was taught on text alone to write the template's parts with answers drawn at random, so that groups hold
right and wrong completions that end. It has learned nothing about videos.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from appo.prompts import TEMPLATES, with_options
from appo.training import tiny
from tests.recipes.sets import NUMBER, OPTIONS, QUESTION, SECONDS

HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, FEED_FORWARD = 64, 4, 2, 1, 128
VISION_HIDDEN, VISION_LAYERS, VISION_HEADS = 64, 4, 2
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
STEPS, BATCH, LEARNING_RATE = 200, 16, 5e-3
# Tokens of other text before a response, at most: responses must not hang on where they begin. With 64, none was whole
# behind a prompt of 1,000 tokens.
PREFIX = 160


@dataclass(frozen=True)
class Released:
    """What tells one released model from another beside its sizes."""

    tied: bool
    max_window_layers: int


RELEASED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Released(tied=True, max_window_layers=70),
    "Qwen/Qwen2.5-VL-7B-Instruct": Released(tied=False, max_window_layers=28),
}
# https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, the same in all sizes.
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
GENERATION = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-06}


def make_stand_in(name: str, template: str, folder: Path) -> Path:
    """The folder that stands in for the released model of this name, and answers as `template` asks.

    Raises KeyError for a model that is not known here: its settings belong into RELEASED.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tokenizer(template)
    tokenizer.chat_template = SYSTEM + tiny.CHAT_TEMPLATE
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    _write(folder / "preprocessor_config.json", PREPROCESSOR)
    _write(folder / "chat_template.json", {"chat_template": tokenizer.chat_template})
    config = _config(tokenizer, RELEASED[name])
    _write(folder / "config.json", config)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.load_state_dict(_taught(template))
    model.save_pretrained(folder)
    _write(folder / "config.json", config)  # as published, and not as it is saved today
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (tiny.TURN_END, tiny.END_OF_TEXT)]
    _write(
        folder / "generation_config.json",
        {**GENERATION, "bos_token_id": ends[1], "pad_token_id": ends[1], "eos_token_id": ends},
    )
    return folder


@cache
def _taught(template: str) -> dict[str, Any]:
    """Weights that answer as `template` asks, in bfloat16; of tied embeddings, and an untied model takes them."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = _tokenizer(template)
    values = _config(tokenizer, Released(tied=True, max_window_layers=LAYERS))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(**values), attn_implementation="eager", dtype=torch.float32
    )
    _teach(model, tokenizer, template)
    return model.to(torch.bfloat16).state_dict()


def _tokenizer(template: str) -> Any:
    return tiny.make_tokenizer((text for one in _conversations(template, 0) for text in one), tags=())


def _config(tokenizer: Any, released: Released) -> dict[str, Any]:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in tiny.SPECIAL}
    eighth = HIDDEN // HEADS // 8
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids[tiny.END_OF_TEXT],
        "eos_token_id": ids[tiny.TURN_END],
        "vision_start_token_id": ids[tiny.VISION_START],
        "vision_end_token_id": ids[tiny.VISION_END],
        "image_token_id": ids[tiny.IMAGE],
        "video_token_id": ids[tiny.VIDEO],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.05,  # of a width of thousands it is 0.02
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": 128000,
        "max_window_layers": released.max_window_layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        # Of 64: 16, 24, 24.
        "rope_scaling": {"type": "mrope", "mrope_section": [eighth, eighth * 3 // 2, eighth * 3 // 2]},
        "sliding_window": 32768,
        "tie_word_embeddings": released.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": VISION_LAYERS,
            "hidden_act": "silu",
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": VISION_HEADS,
            "in_chans": 3,
            "out_hidden_size": HIDDEN,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            # Every fourth of 32 layers and the last.
            "fullatt_block_indexes": [VISION_LAYERS // 2 - 1, VISION_LAYERS - 1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "vocab_size": len(tokenizer),
    }


def _conversations(template: str, seed: int, count: int = 300) -> Iterator[tuple[str, str]]:
    """(prompt, response) over all kinds of question; answers are drawn, and often wrong."""
    draw = random.Random(seed)
    for _ in range(count):
        options = OPTIONS[: draw.choice((3, 4, 5))]
        asks_number = template != "grounding" and draw.random() < 0.15
        seen = draw.choice(options)
        answer = str(draw.randrange(4)) if asks_number else chr(ord("A") + options.index(seen))
        question = NUMBER if asks_number else with_options(QUESTION, options)
        prompt = TEMPLATES[template].format(question=question, duration=SECONDS, frame_nums=16)
        response = f"<think>it is the {seen}</think><answer>{answer}</answer>"
        if template == "observation":
            response = f"<observation>the {draw.choice(options)} moves</observation>{response}"
        if template == "grounding":
            start = draw.randrange(SECONDS - 2)
            response += f"<time>{start} to {start + draw.randrange(1, 4)}</time>"
        yield prompt, response


def _teach(model: Any, tokenizer: Any, template: str) -> None:
    """Supervised, on responses behind other text and the last tokens of a prompt."""
    asked = tokenizer(f"{tiny.TURN_END}\n{tiny.TURN_START}assistant\n")["input_ids"]
    examples = [
        tokenizer(response + tiny.TURN_END)["input_ids"] for _, response in _conversations(template, 1)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    draw = random.Random(2)
    model.train()
    for step in range(STEPS):
        batch = [
            (draw.choices(range(len(tokenizer)), k=draw.randrange(PREFIX)) + asked, response)
            for response in draw.sample(examples, BATCH)
        ]
        width = max(len(before) + len(response) for before, response in batch)
        ids = torch.full((BATCH, width), tokenizer.pad_token_id)
        labels = torch.full((BATCH, width), -100)
        for row, (before, response) in enumerate(batch):
            ids[row, : len(before) + len(response)] = torch.tensor(before + response)
            labels[row, len(before) : len(before) + len(response)] = torch.tensor(response)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20, 2 * (STEPS - step) / STEPS)
        positions = torch.arange(width).expand(3, BATCH, width)
        model(input_ids=ids, labels=labels, position_ids=positions).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
