"""Settings -> a vLLM engine in this process, quiet, and without a trace on the process that hosts it.

One place for what vLLM needs here: for rollouts inside training and for evaluation, on the CPU build and on
CUDA.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from appo.modeling import cpu_bfloat16

_CPU_KV_CACHE_GIB = 1
_CPU_BLOCK_TOKENS = (
    32  # the CPU build's default of 128 is longer than a short prompt: no prefix would ever be shared
)
_BATCHED_TOKENS = 8192


def engine_settings(
    *,
    max_model_len: int,
    max_num_seqs: int,
    dtype: str,
    seed: int = 0,
    gpu_memory_utilization: float = 0.9,
    worker_extension: str | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`, as training and evaluation want them on this machine.

    Log-probabilities are of the distribution that is sampled from (after temperature and truncation). Prompts
    may carry features in place of pixels.
    """
    settings: dict[str, Any] = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        # A video is scheduled whole.
        "max_num_batched_tokens": max(_BATCHED_TOKENS, max_model_len),
        "dtype": dtype,
        "seed": seed,
        "limit_mm_per_prompt": {"video": 1, "image": 1},
        "skip_mm_profiling": True,
        "enable_mm_embeds": True,
        "enable_prefix_caching": True,
        "mm_processor_cache_gb": 0,
        # Pixels come normalised by our processor; vLLM would do it once more, silently.
        "mm_device_do_normalize": False,
        "logprobs_mode": "processed_logprobs",
        # Defaults of vLLM, not of a checkpoint's generation_config; see `appo.modeling.generation` for its ends.
        "generation_config": "vllm",
    }
    if worker_extension is not None:
        settings["worker_extension_cls"] = worker_extension
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = gpu_memory_utilization
    else:
        settings |= {
            "enforce_eager": True,
            "block_size": _CPU_BLOCK_TOKENS,
            "kv_cache_memory_bytes": _CPU_KV_CACHE_GIB << 30,
        }
    return settings


def environment() -> dict[str, str]:
    """Environment variables that vLLM reads when an engine starts: no telemetry, no chatter."""
    return {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def open_engine(model_path: str, **settings: Any) -> Any:
    """A `vllm.LLM` that lives in this process, so that weights reach it by reference.

    settings: from `engine_settings`, changed as needed. torch's thread count and random state stay as they
    were.
    """
    # In this process, and without pinning its threads to cores: they are the training's too.
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in {**environment(), **own}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    cpu_bfloat16.install(str(settings.get("dtype")))
    logging.getLogger("vllm").setLevel(logging.ERROR)
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):  # the engine seeds torch's global generator
        engine = LLM(model_path, disable_log_stats=False, use_tqdm_on_load=False, **settings)
    torch.set_num_threads = set_num_threads  # the CPU build takes the function away
    torch.set_num_threads(threads)
    return engine


def generate(engine: Any, inputs: list[Any], sampling: list[Any]) -> list[Any]:
    """Run engine inputs (see `appo.modeling.vllm_inputs`) to their end; `RequestOutput`s in their order."""
    from vllm.sampling_params import RequestOutputKind

    inner = engine.llm_engine
    for parameters in sampling:
        parameters.output_kind = RequestOutputKind.FINAL_ONLY  # all members of a request in one output
    for place, (one, parameters) in enumerate(zip(inputs, sampling, strict=True)):
        inner.add_request(str(place), one, parameters)
    finished: dict[str, Any] = {}
    with _uncompiled():
        while inner.has_unfinished_requests():
            finished |= {output.request_id: output for output in inner.step() if output.finished}
    return [finished[str(place)] for place in range(len(inputs))]


def _uncompiled() -> AbstractContextManager[Any]:
    """On a CPU, leave out the C++ compiler: for one small function of vLLM's sampler it takes ten seconds and
    more, for every vocabulary anew.
    """
    if torch.cuda.is_available():
        return nullcontext()
    from torch import _dynamo

    return _dynamo.config.patch(disable=True)


def prefix_cache_counts(engine: Any) -> tuple[int, int]:
    """Prompt tokens asked for and found in the prefix cache since the engine started."""
    values = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return int(values["vllm:prefix_cache_queries"]), int(values["vllm:prefix_cache_hits"])


def close_engine(engine: Any) -> None:
    """Give the engine's memory back, so that another one may start in this process."""
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    engine.llm_engine.engine_core.shutdown()
    destroy_model_parallel()
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
        destroy_distributed_environment()
