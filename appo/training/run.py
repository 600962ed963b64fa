"""A recipe, a manifest and a model -> a trained checkpoint with its metrics: one training, start to end.

The same function runs in the demo, in a pod's `accelerate launch` and in a TrainJob. It continues from the newest
whole checkpoint of its output folder, so that running it again is always safe.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appo import hub
from appo.config import Recipe
from appo.data.frames import open_frames
from appo.data.manifest import Manifest, read_manifest
from appo.data.schema import VideoSample
from appo.errors import UserError
from appo.modeling.checkpoints import check_model
from appo.policy import PolicySettings, settings_for
from appo.rewards import RewardFunction
from appo.startup import UNUSED_BY_TRAINING, heavy_imports, leave_out
from appo.storage import write_atomic
from appo.training.launch import refuse_impossible

STEPS_TO_WARM_UP = 2  # left out of the throughput: first calls allocate and choose kernels
GROUPS_LOOKED_AT = 32


class Interrupted(UserError, RuntimeError):
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
    rollout_accuracy_start: float | None
    rollout_accuracy_end: float | None
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
    on_phase: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> TrainSummary | None:
    """Train `model_path` on the manifest's train split; see the module for what lies in `out` afterwards.

    model_path: a folder. model_name: where its weights come from (`ORG/NAME@COMMIT`, an s3:// prefix); default: there.
    on_phase: entered with the name of each phase of the work while it lasts, for whoever measures. Returns the summary,
    on the first of several processes alone. Raises SettingError for settings that do not fit together,
    CheckpointMismatch, and Interrupted after a SIGTERM (a checkpoint was saved).
    """
    if not recipe.training.distributed.startswith("zero"):
        leave_out(
            "deepspeed"
        )  # accelerate and TRL load it wherever it is installed: 3 s and a warning for nothing
    refuse_impossible(recipe, int(os.environ.get("WORLD_SIZE", "1")), here=False)
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"algorithm": algorithm})})
    settings = settings_for(recipe.policy)
    manifest = read_manifest(manifest_path)
    check_model(model_path)
    with on_phase("load") if on_phase is not None else nullcontext():
        session = _Session.open(recipe, settings, manifest, model_path, seed, out, tracker, progress)
    trainer, recorder = session.trainer, session.recorder
    if on_phase is not None:
        trainer.phases.beside = on_phase

    from appo.training.checkpoints import check_layout, newest_checkpoint

    checkpoint = newest_checkpoint(out / "checkpoints")
    resumed_from = 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    if checkpoint is None:
        trainer.add_callback(_opening_look(session))
    else:
        check_layout(trainer, checkpoint)
        session.say(f"continuing from step {resumed_from}")
        trainer._step = resumed_from * trainer.args.gradient_accumulation_steps
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if session.stop.stopped:
            raise Interrupted(
                f"{out}: stopped at step {trainer.state.global_step}, checkpoint saved; run again to continue"
            )
        trainer.save_model(str(out / "checkpoint"))
        if trainer.is_world_process_zero():
            session.processor.save_pretrained(str(out / "checkpoint"))
        session.look(step=trainer.state.global_step)
    finally:
        if trainer.engine is not None:
            trainer.engine.close()  # last: vLLM ends the process group with its own groups
    if not trainer.is_world_process_zero():
        return None
    base = hub.told(model_name or model_path)
    write_atomic(out / "checkpoint" / "base_model.json", json.dumps(base, indent=2) + "\n")
    timed = recorder.history[STEPS_TO_WARM_UP:]
    before, after = session.seen_at(0), session.seen_at(trainer.state.global_step)
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
        groups_looked_at=len(session.looked_at),
        active_parts=tuple(session.parts),
        mlflow_run_id=getattr(tracker, "run_id", None),
    )
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
    looked_at: list[str]
    groups: Path

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
        with heavy_imports(without=UNUSED_BY_TRAINING):
            from transformers import PrinterCallback

            from appo.modeling.feature_cache import open_cache
            from appo.modeling.loading import load_policy, load_processor
            from appo.training.arguments import quiet, training_arguments, training_rows
            from appo.training.layouts import detach_tower, keeps_masters
            from appo.training.perceiving import Perceiver, layers_to_read
            from appo.training.records import StepRecorder, StopOnSignal, WholeCheckpoints
            from appo.training.rewarding import task_rewards, trl_rewards
            from appo.training.store import PromptStore
            from appo.training.trainer import VideoGRPOTrainer

        quiet()
        samples = manifest.split("train")
        # First, since it starts the process group: under FSDP the first process alone then reads the weights.
        arguments = training_arguments(recipe, settings, out / "checkpoints", seed, num_prompts=len(samples))
        processor = load_processor(model_path)
        model = load_policy(model_path, recipe.model, masters=keeps_masters(recipe))
        if recipe.model.freeze_vision:
            detach_tower(model, recipe, arguments.device)
        cache = open_cache(recipe, model)
        store = PromptStore(manifest.samples, open_frames(manifest, recipe), processor, recipe, cache=cache)
        rewards = task_rewards(recipe)
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
            recipe,
            seed,
            settings.algorithm,
            trainer,
            processor,
            store,
            recorder,
            stop,
            rewards,
            [],
            progress,
            _samples_to_look_at(manifest),
            out / "groups.jsonl",
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

    def look(self, *, step: int) -> None:
        """Roll out and read the held-out groups; each process takes its share, the first writes them all down."""
        from accelerate.utils import gather_object

        from appo.training.diagnosis import look, write_groups
        from appo.training.layouts import whole_policy

        trainer, accelerator = self.trainer, self.trainer.accelerator
        mine = range(accelerator.process_index, len(self.looked_at), accelerator.num_processes)
        beside = trainer.phases.beside("look")
        with beside, whole_policy(trainer) as model, accelerator.autocast():
            model._has_fused_head = True  # TRL's trainer has given it one
            seen = look(
                model,
                self.processor,
                self.store,
                {place: self.looked_at[place] for place in mine},
                self.recipe,
                self.rewards,
                seed=self.seed,
            )
        everyone = dict(gather_object(list(zip(mine, seen, strict=True))))
        if trainer.is_world_process_zero():
            groups = [everyone[place] for place in range(len(self.looked_at))]
            write_groups(self.groups, groups, step=step, algorithm=self.algorithm, seed=self.seed)

    def seen_at(self, step: int) -> list[Any]:
        from appo.training.diagnosis import read_groups

        return read_groups(self.groups, step=step)


def _opening_look(session: _Session) -> Any:
    """Looks before the first step, when the policy lies where it will train: a sharded one starts on the CPU."""
    from transformers import TrainerCallback

    class OpeningLook(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            session.look(step=0)

    return OpeningLook()


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


def _accuracy(seen: list[Any]) -> float | None:
    return _mean(statistics.fmean(r or 0.0 for r in group.rewards["accuracy"]) for group in seen)


def _hit_rate(seen: list[Any]) -> float | None:
    from appo.training.diagnosis import hit_rate

    return hit_rate(seen)


def _median(values: Any) -> float | None:
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.median(kept) if kept else None


def _mean(values: Any) -> float | None:
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(kept) if kept else None
