"""A recipe, a manifest and a model -> a trained checkpoint with its metrics: one training, start to end.

The same function runs in the demo, in a pod's `accelerate launch` and in a TrainJob. It continues from the newest
whole checkpoint of its output folder, so that running it again is always safe.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appo import hub
from appo.config import Recipe
from appo.data.frames import open_frames
from appo.data.manifest import Manifest, read_manifest
from appo.data.schema import VideoSample
from appo.policy import PolicySettings, settings_for
from appo.rewards import RewardFunction
from appo.startup import heavy_imports
from appo.storage import write_atomic

STEPS_TO_WARM_UP = 2  # left out of the throughput: first calls allocate and choose kernels
GROUPS_LOOKED_AT = 32


class Interrupted(RuntimeError):
    """Training was asked to stop and has saved; run it again to continue."""


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a training was and what came of it; written as summary.json beside the checkpoint."""

    algorithm: str
    seed: int
    recipe_digest: str
    manifest_digest: str
    base_model: str
    base_commit: str | None
    processes: int
    steps: int
    resumed_from: int
    wall_s: float
    samples_per_second: float | None
    step_s: float | None
    reward_start: float | None
    reward_end: float | None
    rollout_accuracy_start: float
    rollout_accuracy_end: float
    crucial_hit_rate_start: float | None
    crucial_hit_rate_end: float | None
    groups_looked_at: int
    active_parts: tuple[str, ...]
    mlflow_run_id: str | None


def train(
    recipe: Recipe,
    *,
    algorithm: str,
    seed: int,
    manifest_path: Path,
    model_path: str,
    out: Path,
    model_name: str = "",
    tracker: Any = None,
    progress: bool = True,
) -> TrainSummary:
    """Train `model_path` on the manifest's train split; see the module for what lies in `out` afterwards.

    model_path: a folder. model_name: where its weights come from (`ORG/NAME@COMMIT`, an s3:// prefix); default: there.

    Raises ValueError for settings that do not fit together, Interrupted after a SIGTERM (a checkpoint was saved).
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"algorithm": algorithm})})
    settings = settings_for(recipe.policy)
    manifest = read_manifest(manifest_path)
    session = _Session.open(recipe, settings, manifest, model_path, seed, out, tracker, progress)
    trainer, recorder = session.trainer, session.recorder
    looked_at = _samples_to_look_at(manifest)
    before = session.look(looked_at, out / "groups.jsonl", step=0)

    from appo.training.records import let_torch_load_to_numbered_cpus, newest_checkpoint

    checkpoint = newest_checkpoint(out / "checkpoints")
    resumed_from = 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    if checkpoint is not None:
        session.say(f"continuing from step {resumed_from}")
        let_torch_load_to_numbered_cpus()
        trainer._step = resumed_from * trainer.args.gradient_accumulation_steps
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.engine is not None:
        trainer.engine.close()
    if session.stop.stopped:
        raise Interrupted(
            f"{out}: stopped at step {trainer.state.global_step}, checkpoint saved; run again to continue"
        )

    trainer.save_model(str(out / "checkpoint"))
    session.processor.save_pretrained(str(out / "checkpoint"))
    base = hub.told(model_name or model_path)
    if trainer.is_world_process_zero():
        write_atomic(out / "checkpoint" / "base_model.json", json.dumps(base, indent=2) + "\n")
    after = session.look(looked_at, out / "groups.jsonl", step=trainer.state.global_step)
    timed = recorder.history[STEPS_TO_WARM_UP:]
    summary = TrainSummary(
        algorithm=algorithm,
        seed=seed,
        recipe_digest=recipe.digest,
        manifest_digest=manifest.digest,
        base_model=str(base["model"]),
        base_commit=base["commit"],
        processes=trainer.accelerator.num_processes,
        steps=trainer.state.global_step,
        resumed_from=resumed_from,
        wall_s=time.perf_counter() - began,
        samples_per_second=_median(line["samples_per_second"] for line in timed),
        step_s=_median(line["step_s"] for line in timed),
        reward_start=_mean(line.get("reward") for line in recorder.history[:5]),
        reward_end=_mean(line.get("reward") for line in recorder.history[-5:]),
        rollout_accuracy_start=_accuracy(before),
        rollout_accuracy_end=_accuracy(after),
        crucial_hit_rate_start=_hit_rate(before),
        crucial_hit_rate_end=_hit_rate(after),
        groups_looked_at=len(looked_at),
        active_parts=tuple(session.parts),
        mlflow_run_id=getattr(tracker, "run_id", None),
    )
    if trainer.is_world_process_zero():
        write_atomic(out / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")
    return summary


@dataclass
class _Session:
    """The parts of one training, wired."""

    recipe: Recipe
    seed: int
    algorithm: str
    trainer: Any
    processor: Any
    store: Any
    recorder: Any
    stop: Any
    rewards: dict[str, RewardFunction]
    parts: list[str]
    progress: bool

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        settings: PolicySettings,
        manifest: Manifest,
        model_path: str,
        seed: int,
        out: Path,
        tracker: Any,
        progress: bool,
    ) -> _Session:
        with heavy_imports():
            from transformers import PrinterCallback

            from appo.modeling.feature_cache import open_cache
            from appo.modeling.loading import load_policy, load_processor
            from appo.training.arguments import quiet, training_arguments, training_rows
            from appo.training.perceiving import Perceiver, layers_to_read
            from appo.training.records import StepRecorder, StopOnSignal, WholeCheckpoints
            from appo.training.rewarding import task_rewards, trl_rewards
            from appo.training.store import PromptStore
            from appo.training.trainer import VideoGRPOTrainer

        quiet()
        processor = load_processor(model_path)
        model = load_policy(model_path, recipe.model)
        samples = manifest.split("train")
        cache = open_cache(recipe, model)
        store = PromptStore(manifest.samples, open_frames(manifest, recipe), processor, recipe, cache=cache)
        rewards = task_rewards(recipe)
        arguments = training_arguments(recipe, settings, out / "checkpoints", seed, num_prompts=len(samples))
        functions, arguments.reward_weights = trl_rewards(recipe, settings, rewards, store)
        bar = f"{algorithm_label(settings)} seed {seed}" if progress else None
        recorder = StepRecorder(
            out / "metrics.jsonl",
            prompts_per_step=recipe.training.prompts_per_step,
            tracker=tracker,
            progress=bar,
        )
        stop = StopOnSignal()
        perceiver = None
        if settings.uses_perception_weights:
            perceiver = Perceiver(recipe, layers_to_read(recipe, model))
        trainer = VideoGRPOTrainer(
            model=model,
            reward_funcs=functions,
            args=arguments,
            train_dataset=training_rows(samples),
            processing_class=processor,
            callbacks=[recorder, WholeCheckpoints(), stop],
            peft_config=_lora(recipe),
            recipe=recipe,
            settings=settings,
            store=store,
            perceiver=perceiver,
            engine=_engine(recipe, model_path, out),
        )
        trainer.remove_callback(PrinterCallback)
        session = cls(
            recipe, seed, settings.algorithm, trainer, processor, store, recorder, stop, rewards, [], progress
        )
        session.parts = session.describe()
        session.say("; ".join(session.parts))
        return session

    def describe(self) -> list[str]:
        """Which savings are active, and why others are not: the start-up line."""
        from appo.modeling.feature_cache import describe

        training = self.recipe.training
        parts = [
            "shared prefix on" if training.shared_prefix else "shared prefix off (training.shared_prefix)"
        ]
        parts.append(describe(self.recipe))
        parts.append(f"rollouts with {training.rollout}")
        if self.trainer.perceiver is not None:
            parts.append(f"frame attention read {self.trainer.perceiver.place}")
        return parts

    def say(self, text: str) -> None:
        if self.progress and self.trainer.is_world_process_zero():
            print(f"{self.algorithm} seed {self.seed}: {text}", flush=True)

    def look(self, sample_ids: list[str], path: Path, *, step: int) -> list[Any]:
        from appo.training.diagnosis import look, write_groups

        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model._has_fused_head = True  # TRL's trainer has given it one
        seen = look(model, self.processor, self.store, sample_ids, self.recipe, self.rewards, seed=self.seed)
        if self.trainer.is_world_process_zero():
            if step == 0:
                path.unlink(missing_ok=True)
            write_groups(path, seen, step=step, algorithm=self.algorithm, seed=self.seed)
        return seen


def algorithm_label(settings: PolicySettings) -> str:
    return settings.algorithm.upper().replace("_", "-")


def _engine(recipe: Recipe, model_path: str, out: Path) -> Any:
    if recipe.training.rollout == "transformers":
        return None
    from appo.training.vllm_rollouts import rollouts_for

    return rollouts_for(recipe, model_path, out / "rollout_weights")


def _lora(recipe: Recipe) -> Any:
    if recipe.model.lora is None:
        return None
    from peft import LoraConfig

    lora = recipe.model.lora
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules), task_type="CAUSAL_LM"
    )


def _samples_to_look_at(manifest: Manifest) -> list[str]:
    held_out: list[VideoSample] = (
        manifest.split("validation") or manifest.split("test") or manifest.split("train")
    )
    return [sample.id for sample in held_out[:GROUPS_LOOKED_AT]]


def _accuracy(seen: list[Any]) -> float:
    return statistics.fmean(statistics.fmean(r or 0.0 for r in group.rewards["accuracy"]) for group in seen)


def _hit_rate(seen: list[Any]) -> float | None:
    from appo.training.diagnosis import hit_rate

    return hit_rate(seen)


def _median(values: Any) -> float | None:
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.median(kept) if kept else None


def _mean(values: Any) -> float | None:
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(kept) if kept else None
