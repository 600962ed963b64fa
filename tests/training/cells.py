"""One launch of the matrix: every algorithm, prefix and adapter of one layout and type, on fixed completions.

Run as a script by `accelerate launch` (or alone, for one process). What rollouts would draw is fixed, so that every cell
of the matrix scores and trains on the same tokens with the same rewards, and log-probabilities, gradients and updates
can be compared between layouts and types.

    python -m tests.training.cells JOB      JOB: JSON with manifest, model, out, layout, dtype, cells, steps
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ALGORITHMS = ("grpo", "dapo", "appo", "pa_grpo")
# A rank's step of Adam at the paper's learning rate is what bfloat16 weights could not take.
LEARNING_RATE = 1e-6


def name_of(algorithm: str, shared_prefix: bool, lora: bool) -> str:
    return f"{algorithm}-{'shared' if shared_prefix else 'plain'}-{'lora' if lora else 'full'}"


def overrides(layout: str, dtype: str, shared_prefix: bool, lora: bool, steps: int) -> list[str]:
    found = [
        f"model.dtype={dtype}",
        f"training.distributed={'ddp' if layout == 'one' else layout}",
        f"training.shared_prefix={str(shared_prefix).lower()}",
        f"training.learning_rate={LEARNING_RATE}",
        f"training.max_steps={steps}",
        "training.save_every=1000",
        "policy.perception_weights=null",
    ]
    return found + (["model.lora={rank: 4}"] if lora else [])


def fix_rollouts(cls: Any) -> None:
    """Completions are a function of the sample and the member; so are the judge's verdicts and spans."""
    import torch

    from appo.training.sampling import stream_seed

    def roll_out(self, num_generations):
        found = []
        for place, prompt in enumerate(self.rollouts.prompts):
            member = (self.accelerator.process_index * len(self.rollouts.prompts) + place) % num_generations
            generator = torch.Generator().manual_seed(stream_seed(len(prompt.sample.id), member))
            length = 3 + int(torch.randint(6, (1,), generator=generator))
            found.append(torch.randint(20, 200, (length,), generator=generator).tolist())
        return found, None

    cls._roll_out = roll_out

    def masks(pieces, num_tokens):
        return {"observation": (torch.arange(num_tokens) < 3).expand(len(pieces), -1)}

    import appo.policy.judge
    import appo.training.rewarding
    import appo.training.trainer
    from tests.training.conftest import pseudo_accuracy

    appo.training.trainer.tag_masks = masks
    appo.policy.judge.perception_rewards = lambda _judge, texts, _samples: [
        float(sum(text.encode()) % 2) for text in texts
    ]
    appo.training.rewarding.reward_functions = lambda _: {"accuracy": pseudo_accuracy}


def run_cell(job: dict[str, Any], algorithm: str, shared_prefix: bool, lora: bool) -> None:
    """Train one cell; the first process writes its log-probabilities, gradient norms and weights before and after."""
    import torch

    from appo.config import load_recipe
    from appo.training import run
    from appo.training.layouts import whole_tensor
    from appo.training.trainer import VideoGRPOTrainer
    from tests.cpu_layouts import assert_ran
    from tests.training.conftest import OVERRIDES

    recipe = load_recipe(
        "demo", [*OVERRIDES, *overrides(job["layout"], job["dtype"], shared_prefix, lora, job["steps"])]
    )
    name = name_of(algorithm, shared_prefix, lora)
    seen: dict[str, Any] = {"logps": [], "grad": {}}

    def masters(trainer) -> dict[str, torch.Tensor]:
        if trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param

            return {
                n: safe_get_full_fp32_param(p).clone().cpu()
                for n, p in trainer._policy().named_parameters()
                if p.requires_grad
            }
        return {
            n: whole_tensor(p, torch.float32).clone().cpu()
            for n, p in trainer._policy().named_parameters()
            if p.requires_grad
        }

    class Watched(VideoGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if self._loss_inputs is not None and self.state.global_step == 0:
                padded = torch.zeros(len(found[0]), 8)
                padded[:, : found[0].shape[1]] = found[0].detach().float().cpu()
                seen["logps"].append(self.accelerator.gather(padded))
            return found

        def training_step(self, *args, **kwargs):
            if "before" not in seen:
                assert_ran(self, job["layout"])
                seen["before"] = masters(self)
                seen["types"] = sorted({str(p.dtype) for p in self._policy().parameters()})
            return super().training_step(*args, **kwargs)

    fix_rollouts(Watched)
    original, run_trainer = VideoGRPOTrainer, "appo.training.trainer.VideoGRPOTrainer"
    sys.modules["appo.training.trainer"].VideoGRPOTrainer = Watched
    kept: list[Any] = []
    make = Watched.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        kept.append(self)

    Watched.__init__ = init
    out = Path(job["out"]) / name
    try:
        run.train(
            recipe,
            algorithm=algorithm,
            seed=0,
            manifest_path=Path(job["manifest"]),
            model_path=job["model"],
            out=out,
            progress=False,
        )
    finally:
        sys.modules["appo.training.trainer"].VideoGRPOTrainer = original
    trainer = kept[0]
    after = masters(trainer)
    if trainer.is_world_process_zero():
        torch.save(
            {
                "logps": torch.cat(seen["logps"]),
                "before": seen["before"],
                "after": after,
                "types": seen["types"],
                "reference": None
                if trainer.ref_model is None
                else sorted({str(p.dtype) for p in trainer.ref_model.parameters()}),
            },
            out / "cell.pt",
        )
    trainer.accelerator.free_memory()
    del run_trainer


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    if job["layout"] != "one":
        from tests.cpu_layouts import install

        install()
    import appo.training.trainer  # noqa: F401  - named in sys.modules below

    for algorithm, shared_prefix, lora in job["cells"]:
        run_cell(job, algorithm, shared_prefix, lora)


if __name__ == "__main__":
    main(sys.argv[1])
