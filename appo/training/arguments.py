"""A recipe -> TRL's configuration and the dataset it iterates; and libraries' chatter turned down."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo.config import Recipe
from appo.data.schema import VideoSample
from appo.errors import SettingError
from appo.grouping import rows_per_process
from appo.policy import PolicySettings


def training_arguments(
    recipe: Recipe, settings: PolicySettings, folder: Path, seed: int, *, num_prompts: int
) -> Any:
    """TRL's GRPOConfig. Raises SettingError when the train split is smaller than one step."""
    import torch
    from trl import GRPOConfig

    training, policy = recipe.training, recipe.policy
    if num_prompts < training.prompts_per_step:
        raise SettingError(
            f"training.prompts_per_step={training.prompts_per_step}: the manifest's train split has only "
            f"{num_prompts} samples; lower it"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows_per_process(recipe, world_size),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_generations=policy.num_generations,
        max_completion_length=policy.max_completion_length,
        temperature=policy.temperature,
        top_p=policy.top_p,
        beta=0.0,  # the trainer makes the reference model itself
        epsilon=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        loss_type=settings.loss,
        scale_rewards="group",
        mask_truncated_completions=settings.mask_truncated,
        num_iterations=training.updates_per_rollout,
        use_bias_correction_kl=policy.kl == "bias_corrected",
        vllm_importance_sampling_mode=training.vllm_importance_sampling_mode,
        vllm_importance_sampling_clip_max=training.vllm_importance_sampling_clip_max,
        vllm_importance_sampling_clip_min=training.vllm_importance_sampling_clip_min,
        reward_weights=None,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_schedule,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        max_steps=training.max_steps,
        num_train_epochs=training.epochs,
        bf16=recipe.model.dtype == "bfloat16",
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        save_strategy="steps",
        save_steps=training.save_every,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )


def training_rows(samples: Sequence[VideoSample]) -> Any:
    """What TRL iterates: the question as a chat turn and the sample's id; everything else lies in the prompt store."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": s.question}], "sample_id": s.id} for s in samples]
    )


def quiet() -> None:
    """Libraries speak up for errors only; what a person should read is ours to say."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(torch|trl|transformers|accelerate)")
