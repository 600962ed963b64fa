"""A few texts -> a tiny Qwen2.5-VL with its own tokenizer and processor, untrained.

The demo's stand-in for a pretrained checkpoint: same architecture, same special tokens, same files, so that
transformers, TRL and vLLM load the folder like a released one. `warm_start` trains it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from appo.config import Video
from appo.modeling import positions
from appo.modeling.architecture import TinyShape, tiny_config
from appo.prompts import ANSWER, OBSERVATION, THINK, TIME

# Names as in Qwen2.5-VL's tokenizer; vLLM and the processor look for the vision tokens by name.
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO)
# One token each instead of three: a third off every rollout. Not special, so that decoding keeps them.
TAGS = tuple(f"<{close}{tag}>" for tag in (THINK, ANSWER, TIME, OBSERVATION) for close in ("", "/"))
MAX_MERGES = 768
MAX_POSITIONS = 32768

# Without a default system turn: every token of the prompt is paid for in each of the demo's rollouts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str], *, tags: Sequence[str] = TAGS) -> Any:
    """A byte-level BPE trained on `texts`: their frequent words are one token each, any other text is spelled.

    tags: become a token each; Qwen's own tokenizer has none of them.
    """
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    base = Qwen2Tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MAX_MERGES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Tags become tokens of their own below; left in, they would be merged with the words beside them.
    apart = re.compile("|".join(map(re.escape, (*SPECIAL, *tags))))
    pieces = (piece for text in texts for piece in apart.split(text))
    base.backend_tokenizer.train_from_iterator(pieces, trainer)
    trained = json.loads(base.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[(left, right) for left, right in trained["merges"]],
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        additional_special_tokens=list(SPECIAL[1:]),
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(tokenizer: Any, video: Video) -> Any:
    """A Qwen2_5_VLProcessor whose size limits are `video`'s: frames sampled and scaled by them pass unchanged."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    limits = {"min_pixels": video.min_pixels, "max_pixels": video.max_pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        # Said outright because the default changes in transformers 5.22.
        video_processor=Qwen2VLVideoProcessor(**limits, do_sample_frames=False, cap_pixels_per_frame=True),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Any, *, seed: int, shape: TinyShape | None = None) -> Any:
    """A Qwen2_5_VLForConditionalGeneration in float32 with random weights from `seed`.

    Raises ValueError when the heads do not divide the hidden size into a multiple of 8 dimensions each.
    """
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    sizes = tiny_config(shape or TinyShape(), len(tokenizer), max_positions=MAX_POSITIONS)
    sizes["text_config"] |= {"eos_token_id": ids[TURN_END], "pad_token_id": ids[END_OF_TEXT]}
    config = Qwen2_5_VLConfig(
        text_config=sizes["text_config"],
        vision_config=sizes["vision_config"],
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids[TURN_END], ids[END_OF_TEXT]], pad_token_id=ids[END_OF_TEXT]
    )
    return positions.install(model)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write model, tokenizer, processor, chat template and generation settings as one loadable folder."""
    from transformers.utils import logging

    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # for a single shard that is written in milliseconds
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
