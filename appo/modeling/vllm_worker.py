"""What a vLLM worker learns for training: to take the policy's weights, and to say which positions it used.

vLLM mixes this class into its worker (`worker_extension_cls`), in the training's own process and behind `vllm
serve` alike; its methods are called through `collective_rpc`. Arguments and results are plain values where a
server is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

NAME = "appo.modeling.vllm_worker.PolicyWorker"


class PolicyWorker:
    """Mixed into vLLM's worker, which has `model_runner`."""

    model_runner: Any

    def load_policy(self, weights: Iterable[tuple[str, Tensor]] | str) -> None:
        """Put new weights into the running engine. weights: (name, tensor) pairs, or a folder of safetensors
        files.
        """
        if isinstance(weights, str):
            weights = read_weights(Path(weights))
        model = self.model_runner.get_model()
        if next(model.parameters()).is_cuda:
            model.load_weights(weights)
        else:
            # The CPU build packs weights after loading; vLLM's reload unpacks and packs again. It may hold a
            # tensor until its layer is complete, while a merged adapter is taken out again: hence copies.
            self.model_runner.reload_weights(weights_iterator=((name, t.clone()) for name, t in weights))

    def watch_positions(self) -> None:
        """From now on remember the rotary positions of each prompt that is started."""
        model = self.model_runner.get_model()
        original = model.get_mrope_input_positions
        self._watched: list[list[list[int]]] = []

        def remembering(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            self._watched.append(found[0].tolist())
            return found

        model.get_mrope_input_positions = remembering

    def watched_positions(self) -> dict[str, list[list[list[int]]]]:
        """Positions (3, P) of each prompt since `watch_positions`, which ends."""
        del self.model_runner.get_model().get_mrope_input_positions  # the class's own is back
        return {"positions": self._watched}


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight in a folder of safetensors files, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors file is no dict
                yield name, tensors.get_tensor(name)
