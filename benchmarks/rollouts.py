"""Samples per second of the whole training step, rollouts with transformers and with vLLM, taking turns:
`python -m benchmarks.rollouts MANIFEST MODEL`.

Each turn is a short training of its own from the same weights; the engine lives through all of them, and the
first turn of transformers runs before it exists, which shows what an engine in the process costs the rest of
a step. Steps at the start of a turn are left out; figures are medians over the others.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from appo.config import Recipe, load_recipe

WARM_UP_STEPS = 2
PHASES = ("rollout", "weight_sync", "scoring", "weights", "update")
ARMS = {"before the engine": "transformers", "transformers": "transformers", "vLLM": "vllm_colocate"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollouts")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("model", help="checkpoint to start from")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--algorithm", default="appo")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    args = parser.parse_args(argv)
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps {args.steps}: the first {WARM_UP_STEPS} of a turn do not count")
    recipe = load_recipe(args.recipe, [*args.set, f"training.max_steps={args.steps}"])
    found = measure(recipe, args)
    print(json.dumps({"machine": machine(), "arms": found}, indent=2))
    print(table(found))
    return 0


def measure(recipe: Recipe, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians by arm: step_s, samples_per_second, tokens, and the seconds of each phase."""
    from appo.training import vllm_rollouts
    from appo.training.run import train

    engine: Any = None

    def shared(*given: Any, **settings: Any) -> Any:
        nonlocal engine
        engine = engine or colocated(*given, **settings)
        return engine

    colocated, vllm_rollouts.ColocatedEngine = vllm_rollouts.ColocatedEngine, shared  # type: ignore[misc, assignment]
    close, vllm_rollouts.VLLMRollouts.close = vllm_rollouts.VLLMRollouts.close, lambda self: None  # type: ignore[method-assign]
    lines: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    try:
        for turn, arm in enumerate(["before the engine", *["vLLM", "transformers"] * args.turns]):
            chosen = recipe.training.model_copy(update={"rollout": ARMS[arm]})
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                train(
                    recipe.model_copy(update={"training": chosen}),
                    algorithm=args.algorithm,
                    seed=turn,
                    manifest_path=args.manifest,
                    model_path=args.model,
                    out=out,
                    progress=False,
                )
                steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            lines[arm] += steps[WARM_UP_STEPS:]
    finally:
        vllm_rollouts.ColocatedEngine = colocated  # type: ignore[misc]
        vllm_rollouts.VLLMRollouts.close = close  # type: ignore[method-assign]
        if engine is not None:
            engine.close()
    return {arm: _medians(steps) for arm, steps in lines.items()}


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    names = ["step_s", "samples_per_second", "tokens_per_second", "completions/mean_length"]
    names += [f"phase/{phase}_s" for phase in PHASES]
    names += ["rollout/prefix_cache_hit_share", "sampling/importance_sampling_ratio/min"]
    return {n: statistics.median(s[n] for s in steps) for n in names if all(n in s for s in steps)}


def table(found: dict[str, dict[str, float]]) -> str:
    """One row an arm, seconds by phase."""
    head = f"{'rollouts':<18}{'samples/s':>11}{'step s':>9}" + "".join(f"{p:>13}" for p in PHASES)
    rows = [
        f"{arm:<18}{one['samples_per_second']:>11.2f}{one['step_s']:>9.3f}"
        + "".join(f"{one.get(f'phase/{p}_s', 0.0):>13.3f}" for p in PHASES)
        for arm, one in found.items()
    ]
    return "\n".join([head, *rows])


def machine() -> str:
    """Processor or GPU, threads and versions."""
    import transformers
    import trl
    import vllm

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return (
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, trl {trl.__version__}, vllm {vllm.__version__}"
    )


if __name__ == "__main__":
    sys.exit(main())
