"""Prompts -> groups of completions with vLLM, from the weights as they are after the last update.

Between the trainer and an engine, which lives in the training's own process (`ColocatedEngine`) or behind
`vllm serve` (`appo.training.vllm_server`). TRL's own vLLM path passes images only. What the engine gets are the
weights that would be published: whole, in `model.dtype`, adapters merged. A group is one request with n = G: its
prompt is prefilled once, the other members find it in the prefix cache. The sampled tokens' log-probabilities go
back to TRL, whose importance-sampling correction makes up for what differs between the two engines; APPO reads its
attention in the scoring pass that this correction needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from appo.config import Recipe
from appo.modeling import vllm_worker
from appo.modeling.inputs import PromptInputs
from appo.modeling.vllm_inputs import check_family, check_length, engine_input, engine_positions
from appo.training.agreement import CHECK_COMPLETIONS, CHECK_TOKENS, check_logps, check_positions
from appo.training.layouts import published_weights

LOGPROBS = {"logprobs": 0}  # of the sampled token alone


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion, its end token included, and the log-probability of each token as it was drawn."""

    tokens: list[int]
    logps: list[float]


class Engine(Protocol):
    """A vLLM engine somewhere. Sampling parameters are keyword arguments of `vllm.SamplingParams`."""

    def generate(
        self, prompts: Sequence[PromptInputs], sampling: Sequence[dict[str, Any]]
    ) -> list[list[Sampled]]:
        """`n` completions for each prompt."""
        ...

    def load_policy(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace the weights; what was cached of the old ones is dropped. Every process calls it with all
        weights.
        """
        ...

    def watched(self, prompt: PromptInputs, sampling: dict[str, Any]) -> tuple[list[Sampled], Tensor]:
        """Completions of one prompt, and the (3, P) rotary positions that it was run with."""
        ...

    def prefix_cache_counts(self) -> tuple[int, int]:
        """Prompt tokens asked for and found in the prefix cache so far."""
        ...

    def close(self) -> None: ...


class VLLMRollouts:
    """What the trainer calls in place of transformers' generate. `engine` may be shared by trainings that
    follow one another.
    """

    def __init__(self, trainer: Any, engine: Engine):
        self._config = trainer._policy().config
        check_family(self._config.model_type)
        self._trainer, self._engine = trainer, engine
        self._loaded_step: int | None = None
        self._checked = False

    def roll_out(
        self, prompts: Sequence[PromptInputs], seeds: Sequence[int], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Completions and their log-probabilities, group after group. seeds: one for each completion.

        Raises RolloutMismatch when vLLM numbers the tokens of any prompt otherwise than the policy does, or, before the
        first of them, disagrees with it about a prompt's log-probabilities.
        """
        self._synchronise()
        for prompt in prompts:
            check_positions(prompt, engine_positions(prompt, self._config), "vLLM")
        if not self._checked:
            self._check(prompts[0])
            self._checked = True
        queries, hits = self._engine.prefix_cache_counts()
        # vLLM gives member i of a request its seed + i.
        settings = self._trainer.sampling
        sampling = [
            settings.for_vllm(n=num_generations, seed=seed >> 1) | LOGPROBS
            for seed in seeds[::num_generations]
        ]
        found = self._engine.generate(prompts, sampling)
        more_queries, more_hits = self._engine.prefix_cache_counts()
        share = (more_hits - hits) / max(1, more_queries - queries)
        self._trainer._metrics["train"]["rollout/prefix_cache_hit_share"].append(share)
        flat = [completion for group in found for completion in group]
        return [completion.tokens for completion in flat], [completion.logps for completion in flat]

    def close(self) -> None:
        self._engine.close()

    def _synchronise(self) -> None:
        step = self._trainer.state.global_step
        if self._loaded_step != step:
            with self._trainer.phases("weight_sync"):
                self._engine.load_policy(published_weights(self._trainer._policy(), self._trainer.dtype))
            self._loaded_step = step

    def _check(self, prompt: PromptInputs) -> None:
        """Compare positions and log-probabilities of one prompt in vLLM and in the policy."""
        trainer = self._trainer
        sampling = trainer.sampling.untruncated(CHECK_TOKENS).for_vllm(n=CHECK_COMPLETIONS, seed=0)
        found, positions = self._engine.watched(prompt, sampling | LOGPROBS)
        check_positions(prompt, positions, "vLLM")
        tokens, logps = [one.tokens for one in found], [one.logps for one in found]
        check_logps(trainer, trainer.model, prompt, tokens, logps, "vLLM")


class ColocatedEngine:
    """An engine in the training's own process, one per process, on the same device."""

    def __init__(self, model_path: str, recipe: Recipe, *, max_num_seqs: int):
        from appo.modeling.vllm_engine import engine_settings, open_engine

        training = recipe.training
        settings = engine_settings(
            max_model_len=training.vllm_max_model_len,
            max_num_seqs=max_num_seqs,
            dtype=recipe.model.dtype,
            gpu_memory_utilization=training.vllm_gpu_memory_utilization,
            worker_extension=vllm_worker.NAME,
        )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Every process runs an engine of its own inside the training's process group.
            settings["distributed_executor_backend"] = "external_launcher"
        self._longest = training.vllm_max_model_len
        self._llm = open_engine(model_path, **settings)

    def generate(
        self, prompts: Sequence[PromptInputs], sampling: Sequence[dict[str, Any]]
    ) -> list[list[Sampled]]:
        from vllm import SamplingParams

        from appo.modeling.vllm_engine import generate

        for prompt, parameters in zip(prompts, sampling, strict=True):
            check_length(prompt, parameters["max_tokens"], self._longest)
        outputs = generate(
            self._llm, [engine_input(p) for p in prompts], [SamplingParams(**s) for s in sampling]
        )
        return [
            [
                Sampled(
                    list(one.token_ids),
                    [
                        chosen[token].logprob
                        for token, chosen in zip(one.token_ids, one.logprobs, strict=True)
                    ],
                )
                for one in sorted(output.outputs, key=lambda one: one.index)
            ]
            for output in outputs
        ]

    def load_policy(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._llm.collective_rpc("load_policy", args=(weights,))
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()  # features of an unfrozen tower are old now

    def watched(self, prompt: PromptInputs, sampling: dict[str, Any]) -> tuple[list[Sampled], Tensor]:
        self._llm.collective_rpc("watch_positions")
        (found,) = self.generate([prompt], [sampling])
        (watched,) = self._llm.collective_rpc("watched_positions")
        return found, torch.tensor(watched["positions"][0])

    def prefix_cache_counts(self) -> tuple[int, int]:
        from appo.modeling.vllm_engine import prefix_cache_counts

        return prefix_cache_counts(self._llm)

    def close(self) -> None:
        from appo.modeling.vllm_engine import close_engine

        close_engine(self._llm)


def rollouts_for(recipe: Recipe, model_path: str, folder: Path) -> Callable[[Any], VLLMRollouts]:
    """What makes the trainer's rollouts, once the trainer stands. folder: where weights for a server are
    left.
    """

    def open_rollouts(trainer: Any) -> VLLMRollouts:
        rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        if recipe.training.rollout == "vllm_colocate":
            return VLLMRollouts(trainer, ColocatedEngine(model_path, recipe, max_num_seqs=rows))
        from appo.training.vllm_server import ServedEngine

        return VLLMRollouts(trainer, ServedEngine(recipe, folder, trainer.accelerator))

    return open_rollouts
