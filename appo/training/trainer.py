"""TRL's GRPOTrainer with videos: rows find their prompt, groups share it, APPO's weights scale the advantages.

Only wiring. TRL's 600-line method and its losses run as they are; overridden are, each the narrowest hook that does it:

- `_tokenize_prompts`: prompts come from the store;
- `_generate_single_turn`: one prefill per group;
- `_calculate_rewards`: remembered by name, normalised within groups;
- `_generate_and_score_completions`: refill, streams of advantages, perception weights;
- `_prepare_inputs`: whole groups to a micro-batch; `_get_train_sampler`: resumable;
- `_get_per_token_logps_and_entropies`: packed scoring and the frame probe;
- `_compute_loss`: says which rows the loss is about; `_get_grad_norm`: no step on what is not finite (`finite`);
- `save_model`, `_save_optimizer_and_scheduler`, `_load_...`: resumable checkpoints are `checkpoints`' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, split_tensor_dict

from appo.config import Recipe
from appo.errors import SettingError
from appo.modeling import features, loading
from appo.modeling.generation import rollout_sampling
from appo.modeling.inputs import PromptInputs
from appo.policy import PolicySettings
from appo.policy.advantages import group_advantages, stream_rewards, token_advantages
from appo.policy.spans import tag_masks, token_bytes
from appo.training import checkpoints, layouts
from appo.training.agreement import check_generation
from appo.training.finite import BrokenDistribution, broken_rows, stop_unless_finite
from appo.training.perceiving import Perceiver
from appo.training.phases import Phases
from appo.training.refill import refill
from appo.training.rollouts import Rollouts, generate_groups
from appo.training.sampler import EpochRepeatSampler
from appo.training.sampling import stream_seed
from appo.training.scoring import Row, Scores, score
from appo.training.store import PromptStore
from appo.training.work import TERA, Work


class VideoGRPOTrainer(GRPOTrainer):
    """GRPO and DAPO on videos; with `perceiver`, APPO (algorithm section 3.2 of the paper)."""

    def __init__(
        self,
        *args: Any,
        recipe: Recipe,
        settings: PolicySettings,
        store: PromptStore,
        perceiver: Perceiver | None = None,
        engine: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ):
        """engine: makes the rollouts of a vLLM engine (`appo.training.vllm_rollouts`) for this trainer."""
        self.recipe, self.settings, self.store, self.perceiver = recipe, settings, store, perceiver
        self.phases = Phases()
        self._buffered_inputs: list[dict[str, Any]] | None = None
        self.rollouts = Rollouts(prompts=[], groups=[], seeds=[])  # of the generation batch at hand
        self._agreement_checked = False  # of generation with scoring; engines check for themselves
        self._round = 0  # of dynamic sampling, within a step
        self._rows: list[int] = []  # the rows that the pass under way is about
        self._loss_inputs: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        self._refuse_split_groups()
        self.work = Work(self._policy().config, recipe)
        layouts.set_precision(self.accelerator, self.dtype)
        # Not TRL's settings, which take over the ends of a checkpoint's generation_config.
        self.sampling = rollout_sampling(recipe, self._policy(), self._tokenizer)
        self.eos_token_ids = list(self.sampling.end_tokens)
        self.engine = None if engine is None else engine(self)
        # Only now: TRL's own engine, which takes images alone, was not to be made; its correction is to run.
        self.use_vllm = engine is not None
        # TRL's own reference would have the masters' type and a vision tower of its own.
        self.beta = settings.beta
        if self.beta and not hasattr(self._policy(), "peft_config"):
            self.ref_model = self._reference()
        if perceiver is not None:
            perceiver.attach(self)

    @property
    def dtype(self) -> torch.dtype:
        """What the passes compute in and what is published."""
        found: torch.dtype = getattr(torch, self.recipe.model.dtype)
        return found

    def _reference(self) -> Any:
        """The weights that training starts from, in `model.dtype`: sharded as the policy is, on the policy's tower."""
        policy, settings = self._policy(), self.recipe.model
        model = loading.load_policy(policy.config._name_or_path, settings).requires_grad_(False).eval()
        if settings.freeze_vision:
            features.detach_tower(model, self.dtype)
            features.attach_tower(model, features.base_model(policy).visual)
        add_fused_lm_head(model, temperature=self.temperature)
        return layouts.prepare_frozen(model, self.accelerator)

    def _refuse_split_groups(self) -> None:
        """Refilling and separate streams look at whole groups; APPO alone also works on split ones."""
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if rows % self.num_generations == 0:
            return
        for name, used in (
            ("policy.dynamic_sampling=true", self.settings.dynamic_sampling),
            ("policy.algorithm=pa_grpo", len(self.settings.streams) > 1),
        ):
            if used:
                raise SettingError(
                    f"{name}: needs whole groups on a process, but one holds {rows} completions a step and "
                    f"policy.num_generations={self.num_generations}; raise training.prompts_per_step"
                )

    # Data -----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "sample_id"]

    def _get_train_sampler(self, dataset: Any = None) -> EpochRepeatSampler:
        return EpochRepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but rows are not shuffled before they are split: a group stays in one micro-batch.

        Gradients of one optimizer step are a sum over its micro-batches, so their order carries no meaning.
        """
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # Rollouts -------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._round = 0
        output = self.draw(inputs)
        if self.settings.dynamic_sampling and self.model.training:
            output = refill(self, output)
        output["row"] = torch.arange(len(inputs), device=output["advantages"].device)
        if len(self.settings.streams) > 1:
            output["advantages"] = self._advantages_by_stream(output["completion_ids"].size(1))
        if self.perceiver is not None:
            self.perceiver.after_rollouts(self, output)
        return output

    def draw(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Roll out and score one batch of rows, leaving what TRL's dictionary cannot hold in `rollouts`."""
        first = self.accelerator.process_index * len(inputs)
        self.rollouts = Rollouts(
            prompts=[self.store.get(row["sample_id"], self._policy()) for row in inputs],
            groups=[(first + place) // self.num_generations for place in range(len(inputs))],
            seeds=[self._seed(first + place) for place in range(len(inputs))],
        )
        self._rows = list(range(len(inputs)))
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = self.rollouts.advantages
        return output

    def _advantages_by_stream(self, num_tokens: int) -> Tensor:
        """PA-GRPO: every token takes the advantage of the stream that its tag names; (B, N)."""
        convert = self._tokenizer.convert_ids_to_tokens
        special = set(self._tokenizer.all_special_ids)
        pieces = [
            # An end token adds nothing to the text that was rewarded.
            [b"" if i in special else piece for i, piece in zip(ids, token_bytes(convert(ids)), strict=True)]
            for ids in (tokens.tolist() for tokens in self.rollouts.tokens)
        ]
        device = self.accelerator.device
        spans = {tag: mask.to(device) for tag, mask in tag_masks(pieces, num_tokens).items()}
        return token_advantages(
            self.settings.streams, self.rollouts.rewards, self.num_generations, num_tokens, spans=spans
        )

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [prompt.ids.tolist() for prompt in self.rollouts.prompts], None, {}

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, **_: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        broken: list[str] = []
        with self.phases("rollout"):
            try:
                completions, logps = self._roll_out(num_generations)
            except BrokenDistribution as error:  # of this process; the others are asked first
                completions, logps, broken = [], None, error.sample_ids
        if logps is not None:
            broken = self._samples(row for row, own in enumerate(logps) if not all(map(math.isfinite, own)))
        stop_unless_finite(self, "rollout", "probabilities to draw from are", broken)
        self.rollouts.tokens = [torch.tensor(ids) for ids in completions]
        self.rollouts.lengths = [len(ids) for ids in completions]
        self.work.drew(self.rollouts.prompts, self.rollouts.groups, self.rollouts.lengths)
        return completions, logps

    def _roll_out(self, num_generations: int) -> tuple[list[list[int]], list[list[float]] | None]:
        prompts, sizes = _runs(self.rollouts.prompts, self.rollouts.groups)
        if len(set(sizes)) != 1:
            raise SettingError(
                f"rollouts: this process holds parts of groups of sizes {sizes}; make the completions of a step and "
                "process a multiple of policy.num_generations, or divide it evenly"
            )
        if self.engine is not None:
            return self.engine.roll_out(prompts, self.rollouts.seeds, sizes[0])
        with layouts.whole_policy(self) as model, torch.no_grad(), self.accelerator.autocast():
            if not self._agreement_checked:
                check_generation(self, model, prompts[0])
                self._agreement_checked = True
            return generate_groups(
                model,
                prompts,
                sizes[0],
                sampling=self.sampling,
                seeds=self.rollouts.seeds,
                memory_gib=self.recipe.training.rollout_memory_gib,
                device=self.accelerator.device,
            ), None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        with self.phases("rewards"):
            gathered = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(prompts)
        own = slice(first, first + len(prompts))
        # NaN stands for no reward; one that was computed arrives as an infinity (see `rewarding`).
        infinite = gathered.isinf()
        names = [
            name for name, column in zip(self.reward_func_names, infinite.T, strict=True) if column.any()
        ]
        rows = infinite[own].any(dim=1).nonzero().flatten().tolist()
        stop_unless_finite(self, "rewards", f"{', '.join(names)} is", self._samples(rows))
        rewards = dict(zip(self.reward_func_names, gathered.unbind(dim=1), strict=True))
        self.rollouts.rewards = {name: values[own] for name, values in rewards.items()}
        # Not TRL's: those let rounding train a group of equal rewards, and a length alone stand for a reward. Made here,
        # where a group over several processes is whole. Of several streams, `_advantages_by_stream` chooses later.
        totals = stream_rewards(rewards, self.settings.streams[-1].rewards)
        self.rollouts.advantages = group_advantages(totals, self.num_generations)[own]
        self.rollouts.texts = [completion[0]["content"] for completion in completions]
        return gathered

    # Scoring and loss -----------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._rows = inputs["row"].tolist()
        self._loss_inputs = dict(inputs)  # the perceiver may scale its advantages before TRL reads them
        try:
            with self.phases("update"):
                loss: Tensor = super()._compute_loss(model, self._loss_inputs)
            stop_unless_finite(
                self, "update", "the loss is", [] if loss.isfinite() else self._samples(self._rows)
            )
            return loss
        finally:
            self._rows, self._loss_inputs = [], None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases("update"):
            return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Asked between the backward pass and the optimizer (DeepSpeed has stepped by then; nothing is saved yet)."""
        found = super()._get_grad_norm(model, grad_norm)
        good = found is None or math.isfinite(float(found))
        every = range(len(self.rollouts.prompts))
        stop_unless_finite(self, "update", "the gradient's norm is", [] if good else self._samples(every))
        return found

    def _samples(self, rows: Iterable[int]) -> list[str]:
        """Ids of the samples that rows of the generation batch belong to."""
        return list(dict.fromkeys(self.rollouts.prompts[row].sample.id for row in rows))

    def require_finite(self, phase: str, rows: Sequence[int], parts: Sequence[Scores]) -> None:
        """Raise NotFinite, on all processes, where a pass gave log-probabilities that are not. Collective."""
        broken = broken_rows(torch.cat([part.logps.detach() for part in parts]))
        stop_unless_finite(self, phase, "log-probabilities are", self._samples(rows[i] for i in broken))

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        in_loss = self._loss_inputs is not None
        perceiver = self.perceiver
        reading = perceiver is not None and perceiver.reads(self, in_loss=in_loss)
        phase = "update" if in_loss else "scoring"
        with self.phases(phase):
            parts = [
                self.score_rows(model, rows, logits_to_keep, reading=reading)
                for rows in self._chunks(self._rows, batch_size or len(self._rows))
            ]
        self.require_finite(phase, self._rows, parts)
        if perceiver is not None and reading:
            perceiver.collect(self, self._rows, parts, in_loss=in_loss)
        logps = torch.cat([part.logps for part in parts])
        entropy = torch.cat([part.entropy for part in parts]) if compute_entropy else None
        return logps, entropy, None

    def score_rows(self, model: Any, rows: list[int], num_tokens: int, *, reading: bool) -> Scores:
        """One forward pass over some rows of the generation batch."""
        rollouts = self.rollouts
        layers = self.perceiver.layers if self.perceiver is not None and reading else ()
        prompts, groups = [rollouts.prompts[r] for r in rows], [rollouts.groups[r] for r in rows]
        lengths = [rollouts.lengths[r] for r in rows]
        self.work.passed(self.phases.current, prompts, groups, lengths, num_tokens, layers_read=len(layers))
        with self.accelerator.autocast():
            return score(
                model,
                [Row(rollouts.prompts[r], rollouts.groups[r], rollouts.tokens[r]) for r in rows],
                num_tokens,
                shared_prefix=self.recipe.training.shared_prefix,
                pad_token_id=self._tokenizer.pad_token_id,
                device=self.accelerator.device,
                probe_layers=layers or None,
                probe_chunk_mib=self.recipe.perception.probe_chunk_mib,
            )

    def _chunks(self, rows: list[int], size: int) -> list[list[int]]:
        """At most `size` rows each, cut between groups where the size allows it."""
        chunks: list[list[int]] = [[]]
        for group in _split_by(rows, [self.rollouts.groups[r] for r in rows]):
            if len(chunks[-1]) + len(group) > size and chunks[-1]:
                chunks.append([])
            chunks[-1].extend(group)
        return chunks

    def _seed(self, completion: int) -> int:
        """Of a completion of this step, whichever process draws it."""
        return stream_seed(self.args.seed, self.state.global_step, self._round, completion)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The published checkpoint. Resumable ones hold the masters instead."""
        if not _internal_call:
            with self.phases("publish"):
                layouts.publish(self, Path(str(output_dir)), self.recipe.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.phases("checkpoint"):
            checkpoints.save_state(self, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights come back with their moments, once the model lies where it will train."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_state(self, Path(checkpoint))

    def _policy(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            seconds = self.phases.take()
            found = {f"phase/{name}_s": value for name, value in seconds.items()} | self.work.take(seconds)
            for name, value in {**found, "device_peak_tflops": self.work.peak / TERA}.items():
                self._metrics["train"][name].append(value)
        super().log(logs, start_time)


def _split_by(values: list[int], keys: list[int]) -> list[list[int]]:
    runs: dict[int, list[int]] = {}
    for value, key in zip(values, keys, strict=True):
        runs.setdefault(key, []).append(value)
    return list(runs.values())


def _runs(prompts: list[PromptInputs], groups: list[int]) -> tuple[list[PromptInputs], list[int]]:
    """The prompt of each group in this process, and how many of its completions this process draws."""
    runs = _split_by(list(range(len(prompts))), groups)
    return [prompts[run[0]] for run in runs], [len(run) for run in runs]
