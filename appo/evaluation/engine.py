"""Prepared prompts -> responses, by vLLM or by transformers behind one interface.

Both take the very tensors that training makes (`appo.modeling.inputs`), so that frames, seconds per temporal
patch and positions are the same everywhere, and both take another checkpoint's weights without starting
again. Which one runs is a setting; neither stands in for the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from appo.config import Recipe
from appo.errors import UserError
from appo.evaluation.checkpoints import checkpoint_weights, read_config, weights_bytes
from appo.modeling.checkpoints import loading
from appo.modeling.generation import evaluation_sampling, nothing_inherited
from appo.startup import heavy_imports

if TYPE_CHECKING:
    from appo.modeling.inputs import PromptInputs


# On a CPU, threads of so small a model wait for one another longer than they compute: measured with 0.9 M parameters
# on two busy cores, seven checkpoints of 128 items took 92 s with two threads and 23 s with one.
ONE_THREAD_BYTES = 64 << 20


class Prompts(Protocol):
    """Where prepared prompts come from, as `appo.evaluation.prompts.PromptStream`."""

    def take(self, *, wait: bool) -> tuple[str, PromptInputs] | None:
        """The next (id, prompt); None at the end, or when it is not ready and `wait` is false."""
        ...


class EngineError(UserError, RuntimeError):
    """The engine refused a prompt, ran out of memory or died; says what to do. What was written stays."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One response. finish_reason: "stop" or "length". tokens: how many, the end token included."""

    text: str
    finish_reason: str
    tokens: int
    prompt_tokens: int


class Engine(Protocol):
    """Holds one checkpoint's weights at a time."""

    def load(self, path: str) -> None:
        """Take the weights of another checkpoint of the same architecture and tokenizer."""
        ...

    def generate(self, prompts: Prompts, *, seed: int) -> Iterator[tuple[str, Generation]]:
        """(id, response) as they finish, in any order. Raises EngineError."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


def start_engine(recipe: Recipe, path: str, processor: Any) -> Engine:
    """The engine that the recipe names, holding the checkpoint at `path`."""
    kind = VLLMEngine if recipe.evaluation.engine == "vllm" else TransformersEngine
    return kind(recipe, path, processor)


class VLLMEngine:
    """vLLM in this process, so that weights and prompts reach it by reference."""

    def __init__(self, recipe: Recipe, path: str, processor: Any):
        import torch

        try:
            with heavy_imports():
                import vllm  # noqa: F401

                from appo.modeling import vllm_worker
                from appo.modeling.vllm_engine import engine_settings, open_engine
                from appo.modeling.vllm_inputs import UnsupportedByVLLM, check_family
        except ImportError as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}); install it, or choose evaluation.engine=transformers"
            ) from error
        settings = recipe.evaluation
        try:
            check_family(str(read_config(path).get("model_type")))
        except UnsupportedByVLLM as error:
            raise EngineError(
                f"{path}: {error}".partition(";")[0] + "; use evaluation.engine=transformers"
            ) from error
        self._settings, self._tokenizer = settings, processor.tokenizer
        try:
            self._llm = open_engine(
                path,
                **engine_settings(
                    max_model_len=settings.max_model_len,
                    max_num_seqs=settings.max_num_seqs,
                    dtype=recipe.model.dtype,
                    gpu_memory_utilization=settings.gpu_memory_utilization,
                    worker_extension=vllm_worker.NAME,
                ),
            )
        except Exception as error:  # vLLM raises its own and torch's; the reason is in the text
            raise EngineError(f"vLLM could not start with {path}: {_reason(error)}") from error
        self._threads = torch.get_num_threads()
        if not torch.cuda.is_available() and weights_bytes(path) < ONE_THREAD_BYTES:
            torch.set_num_threads(1)

    @property
    def llm(self) -> Any:
        """The `vllm.LLM` itself, for measurements against it."""
        return self._llm

    def load(self, path: str) -> None:
        self._llm.collective_rpc("load_policy", args=(checkpoint_weights(path),))
        # Keys, values and features of the old weights.
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def sampling(self, seed: int) -> Any:
        """The recipe's decoding as vLLM's parameters; ids only, so that both engines decode text alike."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = evaluation_sampling(self._settings, self._tokenizer).for_vllm(seed=seed)
        return SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)

    def generate(self, prompts: Prompts, *, seed: int) -> Iterator[tuple[str, Generation]]:
        """Prompts are added while others are generated: the engine waits for a video only when it has nothing
        else to do."""
        from appo.modeling.vllm_inputs import engine_input

        inner, sampling = self._llm.llm_engine, self.sampling(seed)
        running: set[str] = set()
        try:
            while True:
                while len(running) < 2 * self._settings.max_num_seqs:
                    taken = prompts.take(wait=not running)
                    if taken is None:
                        break
                    name, prompt = taken
                    check_length(prompt, self._settings.max_tokens, self._settings.max_model_len)
                    with _stopping():
                        inner.add_request(name, engine_input(prompt), sampling.clone())
                    running.add(name)
                if not running:
                    return
                with _stopping():
                    outputs = inner.step()
                for output in outputs:
                    if output.finished:
                        running.discard(output.request_id)
                        yield output.request_id, self._generation(output)
        finally:
            if running:
                with suppress(Exception):  # it may be dead
                    inner.abort_request(list(running))

    def _generation(self, output: Any) -> Generation:
        one = output.outputs[0]
        text = self._tokenizer.decode(one.token_ids, skip_special_tokens=True)
        return Generation(text, str(one.finish_reason), len(one.token_ids), len(output.prompt_token_ids))

    def close(self) -> None:
        import gc

        import torch

        core = getattr(self._llm.llm_engine, "engine_core", None)
        if core is not None:
            core.shutdown()
        torch.set_num_threads(self._threads)
        del self._llm
        gc.collect()


class TransformersEngine:
    """`model.generate` in batches: where vLLM cannot be installed, and what vLLM is checked against."""

    BATCH = 16

    def __init__(self, recipe: Recipe, path: str, processor: Any):
        import torch

        self._recipe, self._tokenizer = recipe, processor.tokenizer
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.load(path)

    def load(self, path: str) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        from appo.modeling import cpu_bfloat16, positions

        cpu_bfloat16.install(self._recipe.model.dtype)
        with loading(path):
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=getattr(torch, self._recipe.model.dtype), attn_implementation="sdpa"
            )
        self.model = positions.install(model).to(self._device).eval()

    def generate(self, prompts: Prompts, *, seed: int) -> Iterator[tuple[str, Generation]]:
        import torch

        def remaining() -> Iterator[tuple[str, PromptInputs]]:
            while (taken := prompts.take(wait=True)) is not None:
                yield taken

        stream = remaining()
        while batch := list(islice(stream, self.BATCH)):
            names, inputs = zip(*batch, strict=True)
            for prompt in inputs:
                check_length(
                    prompt, self._recipe.evaluation.max_tokens, self._recipe.evaluation.max_model_len
                )
            torch.manual_seed(seed)
            try:
                yield from zip(names, self._respond(inputs), strict=True)
            except torch.OutOfMemoryError as error:
                raise EngineError(f"out of memory with {len(inputs)} prompts: {_reason(error)}") from error

    def _respond(self, prompts: Any) -> list[Generation]:
        import torch

        from appo.modeling.inputs import vision_kwargs

        sampling = evaluation_sampling(self._recipe.evaluation, self._tokenizer)
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), sampling.pad_token)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = width - len(prompt.ids)
            ids[row, start:], mask[row, start:], types[row, start:] = prompt.ids, 1, prompt.token_types
        with nothing_inherited(self.model):
            sampled = self.model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                mm_token_type_ids=types.to(self._device),
                **vision_kwargs(prompts, self.model, self._device),
                generation_config=sampling.for_transformers(),
            )[:, width:]
        found = []
        for prompt, row in zip(prompts, sampled.tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in sampling.end_tokens), None)
            kept = row if stop is None else row[: stop + 1]
            text = self._tokenizer.decode(kept, skip_special_tokens=True)
            reason = "length" if stop is None else "stop"
            found.append(Generation(text, reason, len(kept), len(prompt.ids)))
        return found

    def close(self) -> None:
        del self.model


def check_length(prompt: PromptInputs, max_tokens: int, longest: int) -> None:
    """Raises EngineError for a prompt that leaves no room for its response, before it is cut or refused."""
    if len(prompt.ids) + max_tokens > longest:
        raise EngineError(
            f"evaluation.max_model_len={longest}: sample {prompt.sample.id} has {len(prompt.ids)} "
            f"prompt tokens and "
            f"evaluation.max_tokens={max_tokens}; raise it, or give fewer or smaller frames"
        )


@contextmanager
def _stopping() -> Iterator[None]:
    """Whatever vLLM raises, of its own (EngineDeadError) or torch's (out of memory), as an EngineError."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"vLLM stopped: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
