"""Rollouts from a `vllm serve` of its own, on other devices than the training.

Nothing of vLLM's server is replaced: its token-in, token-out endpoint carries features beside token ids, and
its `collective_rpc` calls `PolicyWorker`, which reads new weights from a folder that both sides see. So
weights travel over a shared disk and not over NCCL: the price of a server that also runs where there is no
CUDA. `python -m appo.training.vllm_server RECIPE MODEL` starts such a server with the settings that training
expects. Its development endpoints take new weights from anyone who reaches them: bind it inside the cluster
only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from appo.config import Recipe
from appo.errors import UserError, status_of
from appo.modeling import vllm_worker
from appo.modeling.checkpoints import check_model
from appo.modeling.inputs import PromptInputs
from appo.modeling.vllm_inputs import check_length, served_features
from appo.training.vllm_rollouts import Sampled

START_TIMEOUT_S, REQUEST_TIMEOUT_S = 900.0, 3600.0
_CONCURRENT_REQUESTS = 64
_SHARD_BYTES = 2 << 30
_FINAL_ONLY = 2  # of vLLM's RequestOutputKind: by default a request with n > 1 loses members that end early


class ServerError(UserError, RuntimeError):
    """The rollout server does not answer, or not as it should; the message says how to start it."""


class ServedEngine:
    """The engine behind `training.vllm_server_url`, shared by all processes of a training.

    folder: on a disk that the server sees under the same path; weights lie there for a moment. Raises
    ServerError when the server does not come up within `timeout_s`.
    """

    def __init__(self, recipe: Recipe, folder: Path, accelerator: Any, *, timeout_s: float = START_TIMEOUT_S):
        self._url = str(recipe.training.vllm_server_url).rstrip("/")
        self._folder, self._accelerator = folder.absolute(), accelerator
        self._longest = recipe.training.vllm_max_model_len
        self._loads = 0
        self._wait(timeout_s)

    def generate(
        self, prompts: Sequence[PromptInputs], sampling: Sequence[dict[str, Any]]
    ) -> list[list[Sampled]]:
        def ask(place: int) -> list[Sampled]:
            prompt, parameters = prompts[place], sampling[place]
            check_length(prompt, parameters["max_tokens"], self._longest)
            body = {
                "token_ids": prompt.ids.tolist(),
                "features": served_features(prompt),
                "sampling_params": parameters | {"output_kind": _FINAL_ONLY},
            }
            choices = self._post("/inference/v1/generate", body)["choices"]
            if len(choices) != parameters["n"]:
                raise ServerError(
                    f"{self._url}: gave {len(choices)} completions, asked for {parameters['n']}"
                )
            return [
                Sampled(choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]])
                for choice in sorted(choices, key=lambda choice: choice["index"])
            ]

        with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
            return list(pool.map(ask, range(len(prompts))))

    def load_policy(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._loads += 1
        folder = self._folder / f"load-{self._loads}"
        if self._accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _write(weights, folder)
            self._post("/collective_rpc", {"method": "load_policy", "args": [str(folder)]})
            for cache in ("prefix", "encoder"):
                self._post(f"/reset_{cache}_cache", None)
            shutil.rmtree(folder)
        else:
            for _ in weights:  # gathering a parameter is collective
                pass
        self._accelerator.wait_for_everyone()

    def watched(self, prompt: PromptInputs, sampling: dict[str, Any]) -> tuple[list[Sampled], Tensor]:
        found: tuple[list[Sampled], Tensor] | None = None
        for process in range(self._accelerator.num_processes):  # in turn: the server cannot tell them apart
            if process == self._accelerator.process_index:
                self._post("/collective_rpc", {"method": "watch_positions"})
                (completions,) = self.generate([prompt], [sampling])
                answer = self._post("/collective_rpc", {"method": "watched_positions"})
                found = completions, torch.tensor(answer["results"][0]["positions"][0])
            self._accelerator.wait_for_everyone()
        assert found is not None
        return found

    def prefix_cache_counts(self) -> tuple[int, int]:
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=REQUEST_TIMEOUT_S) as answer:
            text = answer.read().decode()
        queries, hits = (
            sum(float(v) for v in re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (\S+)$", text, re.M))
            for name in ("queries", "hits")
        )
        return int(queries), int(hits)

    def close(self) -> None:
        """The server goes on; other trainings may use it."""

    def _wait(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while True:
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=10):
                    return
            except OSError as error:  # urllib's errors are; so is a refused connection
                if time.monotonic() > until:
                    raise ServerError(
                        f"training.vllm_server_url={self._url}: no answer within {timeout_s:g} s "
                        f"({error}); start it with `python -m appo.training.vllm_server RECIPE MODEL`"
                    ) from error
            time.sleep(1.0)

    def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        request = urllib.request.Request(
            self._url + path,
            data=b"" if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(
                f"{self._url}{path}: {error.code} {error.read().decode(errors='replace')[:500]}; the server "
                "must be started by `python -m appo.training.vllm_server`"
            ) from error
        except OSError as error:
            raise ServerError(f"{self._url}{path}: {error}; is the server still up?") from error
        return json.loads(text) if text else None


def serve_command(
    recipe: Recipe, model_path: str, *, host: str, port: int
) -> tuple[list[str], dict[str, str]]:
    """The `vllm serve` that training expects, and the environment variables it needs on top of this
    process's.
    """
    from appo.modeling.vllm_engine import engine_settings, environment

    rows = recipe.training.prompts_per_step * recipe.policy.num_generations
    settings = engine_settings(
        max_model_len=recipe.training.vllm_max_model_len,
        max_num_seqs=rows,
        dtype=recipe.model.dtype,
        gpu_memory_utilization=recipe.training.vllm_server_memory_utilization,
        worker_extension=vllm_worker.NAME,
    )
    # What `vllm serve` runs; that command itself asks for a distribution `vllm`, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
    command += ["--host", host, "--port", str(port), "--enable-scale-out"]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command += [flag] if value else []
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return command, {**environment(), "VLLM_SERVER_DEV_MODE": "1"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Become the server; see the module. Takes `--set` overrides as `appo` does."""
    import argparse

    from appo.config import load_recipe
    from appo.handover import checkpoint_of

    parser = argparse.ArgumentParser(prog="python -m appo.training.vllm_server")
    parser.add_argument("recipe", help="name or file; training.vllm_server_url says where to listen")
    parser.add_argument("model", help="checkpoint folder or hub name that training starts from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--host", default=None, help="address to bind; default: the host of the URL")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, [*options.set, "training.rollout=vllm_server"])
    check_model(options.model)
    place = urlsplit(str(recipe.training.vllm_server_url))
    model = checkpoint_of(options.model)
    command, environment = serve_command(
        recipe, model, host=options.host or place.hostname or "127.0.0.1", port=place.port or 8000
    )
    os.execve(command[0], command, {**os.environ, **environment})


def _write(weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    shard: dict[str, Tensor] = {}
    size = count = 0
    for name, tensor in weights:
        # Copied at once: an adapter is merged only while its weights pass by.
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= _SHARD_BYTES:
            save_file(shard, folder / f"{count:05d}.safetensors")
            shard, size, count = {}, 0, count + 1
    if shard:
        save_file(shard, folder / f"{count:05d}.safetensors")


if __name__ == "__main__":
    sys.exit(status_of(main))
