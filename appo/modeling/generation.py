"""Recipe and tokenizer -> how tokens are drawn: the one place that makes sampling settings, for both engines.

Rollouts, the agreement check, the look at held-out groups, `appo explain` and evaluation all take theirs from here.
Nothing comes from a checkpoint's generation_config: the repetition penalty of 1.05 that Qwen2.5-VL is published with
would be in what is sampled, and not in the probabilities that the loss is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.config import Evaluation, Recipe


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one completion is drawn.

    max_tokens, min_tokens: of a completion, its end token included. end_tokens: what ends it. suppressed: tokens that
    are never drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 cut nothing off; repetition_penalty 1 does
    nothing.
    """

    max_tokens: int
    end_tokens: tuple[int, ...]
    pad_token: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppressed: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def untruncated(self, max_tokens: int) -> Sampling:
        """A few tokens of the whole distribution, whose log-probabilities a pass without truncation gives too."""
        return replace(self, max_tokens=max_tokens, top_p=1.0, top_k=0, min_p=0.0, suppressed=())

    def for_transformers(self, *, drawn_elsewhere: bool = False) -> Any:
        """A GenerationConfig; give it to `generate` inside `nothing_inherited`.

        drawn_elsewhere: temperature and truncation (`warpers`) and the draw itself are done by logits processors.
        """
        from transformers import GenerationConfig

        drawing: dict[str, Any] = {"do_sample": False}
        if not drawn_elsewhere and not self.greedy:
            drawing = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "min_p": self.min_p or None,
            }
        return GenerationConfig(
            max_new_tokens=self.max_tokens,
            min_new_tokens=self.min_tokens or None,
            repetition_penalty=self.repetition_penalty,
            suppress_tokens=list(self.suppressed) or None,
            eos_token_id=list(self.end_tokens),
            pad_token_id=self.pad_token,
            use_cache=True,
            disable_compile=True,
            **drawing,
        )

    def warpers(self) -> list[Any]:
        """transformers' processors for temperature, top-k, top-p and min-p, in its own order."""
        from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        found: list[Any] = []
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            found.append(MinPLogitsWarper(self.min_p))
        return found

    def for_vllm(self, *, seed: int, n: int = 1) -> dict[str, Any]:
        """Keyword arguments of `vllm.SamplingParams`, plain values as a server takes them too.

        vLLM adds the ends of a checkpoint's generation_config to those it is given, whatever its own setting of that
        name says: hence `ignore_eos`, after which `stop_token_ids` alone end a completion.
        """
        return {
            "n": n,
            "seed": seed,
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(self.end_tokens),
            "ignore_eos": True,
            "logit_bias": dict.fromkeys(self.suppressed, -100.0) or None,
            "detokenize": False,
        }


def rollout_sampling(recipe: Recipe, model: Any, tokenizer: Any) -> Sampling:
    """Of a training's rollouts, and of all that shows what they are like."""
    return Sampling(
        max_tokens=recipe.policy.max_completion_length,
        end_tokens=end_tokens(tokenizer),
        pad_token=tokenizer.pad_token_id,
        temperature=recipe.policy.temperature,
        top_p=recipe.policy.top_p,
        suppressed=tuple(placeholder_tokens(model)),
    )


def evaluation_sampling(settings: Evaluation, tokenizer: Any) -> Sampling:
    """Of a benchmark's responses."""
    return Sampling(
        max_tokens=settings.max_tokens,
        end_tokens=end_tokens(tokenizer),
        pad_token=tokenizer.pad_token_id,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=max(0, settings.top_k),  # vLLM's -1 says the same
        repetition_penalty=settings.repetition_penalty,
    )


def end_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end and padding tokens: Qwen's <|im_end|> and <|endoftext|>, which its models end with too."""
    found = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return tuple(sorted(found))


def placeholder_tokens(model: Any) -> list[int]:
    """Image and video tokens: sampled in a completion they would stand for features that do not exist."""
    names = ("image_token_id", "video_token_id")
    return [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]


@contextmanager
def nothing_inherited(model: Any) -> Iterator[None]:
    """While inside, `model.generate` finds no settings beside those that it is given.

    transformers fills what a GenerationConfig leaves open from `model.generation_config`, which comes with a checkpoint.
    That one is published again with the trained weights, and therefore put back.
    """
    from transformers import GenerationConfig

    holder = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept, holder.generation_config = holder.generation_config, GenerationConfig()
    try:
        yield
    finally:
        holder.generation_config = kept


def save_with_its_settings(model: Any, folder: Path, **kwargs: Any) -> None:
    """`model.save_pretrained(folder, **kwargs)`, with the generation_config that the checkpoint came with.

    transformers loads odd settings with a warning and refuses to write them: at the end of a training, for settings that
    it never used.
    """
    kept = getattr(model, "generation_config", None)
    if kept is None or hasattr(model, "peft_config"):  # adapters are saved without one
        model.save_pretrained(folder, **kwargs)
        return
    with nothing_inherited(model):
        model.save_pretrained(folder, **kwargs)
    kept.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
