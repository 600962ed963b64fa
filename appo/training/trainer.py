"""TRL's GRPOTrainer with videos: rows find their prompt, groups share it, APPO's weights scale the advantages.

Only wiring. TRL's 600-line method and its losses run as they are; overridden are, each the narrowest hook that does it:

- `_tokenize_prompts`: prompts come from the store;
- `_generate_single_turn`: one prefill per group;
- `_calculate_rewards`: remembered by name, normalised within groups;
- `_generate_and_score_completions`: refill, streams of advantages, perception weights;
- `_prepare_inputs`: whole groups to a micro-batch; `_get_train_sampler`: resumable;
- `_get_per_token_logps_and_entropies`: packed scoring and the frame probe;
- `_compute_loss`: says which rows the loss is about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from appo.config import Recipe
from appo.modeling import features, loading
from appo.modeling.inputs import PromptInputs
from appo.policy import PolicySettings
from appo.policy.advantages import group_advantages, stream_rewards, token_advantages
from appo.policy.spans import tag_masks, token_bytes
from appo.training.agreement import check_generation
from appo.training.perceiving import Perceiver
from appo.training.phases import Phases
from appo.training.refill import refill
from appo.training.rollouts import Rollouts, generate_groups, placeholder_tokens
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
        if self.is_fsdp_enabled and recipe.model.freeze_vision:
            features.keep_tower(self._policy())
        # TRL rules out image tokens only; a sampled video token would stand for features that do not exist.
        self.generation_config.suppress_tokens = placeholder_tokens(self._policy())
        self.engine = None if engine is None else engine(self)
        # Only now: TRL's own engine, which takes images alone, was not to be made; its correction is to run.
        self.use_vllm = engine is not None
        if self.ref_model is not None:
            loading.prepare(self.accelerator.unwrap_model(self.ref_model))
        if perceiver is not None:
            perceiver.attach(self)

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
                raise ValueError(
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
        with self.phases("rollout"):
            completions, logps = self._roll_out(num_generations)
        self.rollouts.tokens = [torch.tensor(ids) for ids in completions]
        self.rollouts.lengths = [len(ids) for ids in completions]
        self.work.drew(self.rollouts.prompts, self.rollouts.groups, self.rollouts.lengths)
        return completions, logps

    def _roll_out(self, num_generations: int) -> tuple[list[list[int]], list[list[float]] | None]:
        from trl.models import unwrap_model_for_generation

        prompts, sizes = _runs(self.rollouts.prompts, self.rollouts.groups)
        if len(set(sizes)) != 1:
            raise ValueError(
                f"rollouts: this process holds parts of groups of sizes {sizes}; make the completions of a step and "
                "process a multiple of policy.num_generations, or divide it evenly"
            )
        if self.engine is not None:
            return self.engine.roll_out(prompts, self.rollouts.seeds, sizes[0])
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            if not self._agreement_checked:
                check_generation(self, model, prompts[0])
                self._agreement_checked = True
            return generate_groups(
                model,
                prompts,
                sizes[0],
                generation_config=self.generation_config,
                seeds=self.rollouts.seeds,
                pad_token_id=self._tokenizer.pad_token_id,
                device=self.accelerator.device,
            ), None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        with self.phases("rewards"):
            gathered = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(prompts)
        own = slice(first, first + len(prompts))
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
                return super()._compute_loss(model, self._loss_inputs)
        finally:
            self._rows, self._loss_inputs = [], None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases("update"):
            return super().training_step(*args, **kwargs)

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load every weight, or fail.

        transformers 5.17 saves vision-language models under their published key names and its Trainer loads them
        back non-strictly under the module's: only the head matches, the rest stays untrained, and nothing warns.
        """
        policy = self._policy()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(policy, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(policy).from_pretrained(resume_from_checkpoint, dtype=policy.dtype)
        policy.load_state_dict(saved.state_dict(), strict=True)

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
