"""APPO's place in a training step: what was read in a forward pass -> advantages scaled token by token.

Where the attention is read depends on what runs anyway. On-policy, with whole groups in a micro-batch, the update's own
forward pass has the same weights as the rollout, so attention and hidden states are read there and nothing extra
runs. When a scoring pass happens before the update (vLLM's importance-sampling correction, generations used for
several updates), it is read there. Only when a group is split over devices or micro-batches and no such pass exists,
one pass without gradient is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from appo.config import Recipe
from appo.errors import SettingError
from appo.perception import PerceptionWeights, Selection, WeightSettings, select, weights_from_rows
from appo.training.layouts import whole_head
from appo.training.scoring import Scores, log_normalizers

HISTOGRAM_BINS = 10


class Perceiver:
    """Computes perception weights and scales advantages with them.

    layers: decoder layers that are read. where: in which pass, "update" or "scoring"; extra_pass: whether that scoring
    pass runs for this alone.
    """

    def __init__(self, recipe: Recipe, layers: tuple[int, ...]):
        self.recipe, self.layers = recipe, layers
        self.where, self.extra_pass = "update", False

    def attach(self, trainer: Any) -> None:
        """Decide where to read, once the trainer knows its batch layout."""
        args = trainer.args
        every = args.steps_per_generation * trainer.num_iterations
        scored_anyway = args.gradient_accumulation_steps % every != 0 or (
            trainer.use_vllm and trainer.vllm_importance_sampling_correction
        )
        whole = args.per_device_train_batch_size % trainer.num_generations == 0
        self.where = "update" if whole and not scored_anyway else "scoring"
        self.extra_pass = self.where == "scoring" and not scored_anyway

    @property
    def place(self) -> str:
        """Where attention is read, and why it costs a pass if it does; for the start-up line."""
        if self.where == "update":
            return "in the update's own forward pass"
        return "in a scoring pass of its own (groups are split)" if self.extra_pass else "in the scoring pass"

    def reads(self, trainer: Any, *, in_loss: bool) -> bool:
        """Whether this forward pass should carry the probe.

        Of the passes before the update TRL's first is of the policy, where TRL makes one at all; a later one is of the
        reference, which under LoRA is the same model with its adapters off.
        """
        if not trainer.model.training:
            return False
        if in_loss or self.where == "update":
            return in_loss and self.where == "update"
        return not self.extra_pass and not trainer.rollouts.read

    def collect(self, trainer: Any, rows: Sequence[int], parts: Sequence[Scores], *, in_loss: bool) -> None:
        """Keep what a pass read; in the loss, scale its advantages at once."""
        attention = torch.cat([_widened(part.attention, parts) for part in parts])
        hidden = torch.cat([part.hidden for part in parts])
        logps = torch.cat([part.logps.detach() for part in parts])
        for place, row in enumerate(rows):
            trainer.rollouts.read[row] = (attention[place], hidden[place], logps[place])
        if in_loss:
            inputs = trainer._loss_inputs
            weights = self._weights(trainer, rows, inputs["completion_ids"].size(1))
            inputs["advantages"] = _per_token(inputs["advantages"]) * weights
            trainer.rollouts.read.clear()

    def after_rollouts(self, trainer: Any, output: dict[str, Any]) -> None:
        """Scale the advantages of a generation batch, where the update is not the place to do it."""
        if self.where == "update" or not trainer.model.training:
            return
        num_tokens = output["completion_ids"].size(1)
        rows = list(range(len(trainer.rollouts.prompts)))
        if not trainer.rollouts.read:
            with torch.no_grad(), trainer.phases("attention"):
                chunks = trainer._chunks(rows, trainer.args.per_device_train_batch_size)
                parts = [trainer.score_rows(trainer.model, c, num_tokens, reading=True) for c in chunks]
            trainer.require_finite("attention", rows, parts)
            self.collect(trainer, [row for c in chunks for row in c], parts, in_loss=False)
        weights = self._weights(trainer, rows, num_tokens)
        output["advantages"] = _per_token(output["advantages"]) * weights
        trainer.rollouts.read.clear()

    def _weights(self, trainer: Any, rows: Sequence[int], num_tokens: int) -> Tensor:
        """(len(rows), num_tokens) weights of local rows; their groups are completed from other devices if split."""
        with torch.no_grad(), trainer.phases("weights"):
            local, size = self._local(trainer, rows, num_tokens), trainer.num_generations
            split = len(rows) % size != 0 or any(
                len({trainer.rollouts.groups[r] for r in rows[i : i + size]}) > 1
                for i in range(0, len(rows), size)
            )
            head = whole_head(trainer._policy(), trainer.dtype)
            if split:
                first = trainer.accelerator.process_index * len(rows)
                found = self._split_weights(trainer.accelerator, local, size, *head)
            else:
                first = 0
                groups = (_slice(local, start, size) for start in range(0, len(rows), size))
                found = [group_weights(group, self.recipe, *head) for group in groups]
            self._count(trainer, found, local)
            weights = torch.cat([one.weights for one in found])[first : first + len(rows), :num_tokens]
            self._log(trainer, found, weights, local["lengths"])
            return weights

    def _count(self, trainer: Any, found: Sequence[PerceptionWeights], local: dict[str, Tensor]) -> None:
        """What the weights took. Of groups over several processes, each process makes all weights."""
        share = sum(one.perception_share for one in found) / max(1, len(found))
        tokens = int(local["lengths"].sum()) * len(found) * trainer.num_generations / len(local["lengths"])
        known = local["hidden"].dtype in (torch.float32, torch.float64)
        trainer.work.weighed(round(share * tokens), normalizers_known=known)

    def _split_weights(
        self,
        accelerator: Any,
        local: dict[str, Tensor],
        size: int,
        head_weight: Tensor,
        head_bias: Tensor | None,
    ) -> list[PerceptionWeights]:
        """Of all groups, on every process.

        What decides which hidden states are needed is small and gathered whole; of the hidden states only the chosen
        ones travel.
        """
        names = ("attention", "lengths", "accuracy", "frames")
        whole = _gathered(accelerator, {name: local[name] for name in names})
        settings = weight_settings(self.recipe)
        groups = [_slice(whole, start, size) for start in range(0, len(whole["lengths"]), size)]
        selections = [select_in(group, settings) for group in groups]
        # Of every completion, in their order over all processes: joined, they are the selections' rows.
        positions = [selection.rows_of(i) for selection in selections for i in range(size)]
        here = len(local["lengths"])
        own = positions[accelerator.process_index * here :][:here]
        chosen = {
            name: torch.cat([local[name][i, at] for i, at in enumerate(own)])
            for name in ("hidden", "tokens", "logps")
        }
        normalizers = _normalizers(chosen, head_weight, head_bias, settings.temperature)
        counts = [sum(map(len, positions[i : i + here])) for i in range(0, len(positions), here)]
        sizes = [len(selection.rows) for selection in selections]
        hidden = _joined(accelerator, chosen["hidden"], counts).split(sizes)
        known: Sequence[Tensor | None] = [None] * len(sizes)
        if normalizers is not None:
            known = _joined(accelerator, normalizers, counts).split(sizes)
        return [
            weights_from_rows(
                selection,
                group["lengths"],
                rows,
                head_weight,
                head_bias,
                settings=settings,
                log_normalizer=normalizer,
            )
            for selection, group, rows, normalizer in zip(selections, groups, hidden, known, strict=True)
        ]

    def _local(self, trainer: Any, rows: Sequence[int], num_tokens: int) -> dict[str, Tensor]:
        rollouts, device = trainer.rollouts, trainer.accelerator.device
        frames = max(rollouts.read[r][0].shape[-1] for r in rows)
        attention = torch.zeros(len(rows), num_tokens, frames, device=device)
        for place, row in enumerate(rows):
            read = rollouts.read[row][0]
            attention[place, : read.shape[0], : read.shape[1]] = read
        return {
            "attention": attention,
            "hidden": _stacked([rollouts.read[r][1] for r in rows], num_tokens),
            "logps": _stacked([rollouts.read[r][2] for r in rows], num_tokens),
            "tokens": _stacked([rollouts.tokens[r].to(device) for r in rows], num_tokens),
            "lengths": torch.tensor([rollouts.lengths[r] for r in rows], device=device),
            "accuracy": rollouts.rewards["accuracy"][list(rows)].to(device),
            "frames": torch.tensor([rollouts.prompts[r].num_frames for r in rows], device=device),
        }

    def _log(
        self, trainer: Any, found: Sequence[PerceptionWeights], weights: Tensor, lengths: Tensor
    ) -> None:
        """found: the groups that were weighed here; weights: (rows, num_tokens) of this process's own rows."""
        rows = torch.tensor(
            [[len(w.frames), w.perception_share, float(w.degenerate), _overlap(w)] for w in found],
            device=trainer.accelerator.device,
        )
        means = trainer.accelerator.gather(rows.float().mean(dim=0, keepdim=True)).mean(dim=0).tolist()
        metrics = trainer._metrics["train"]
        measures = ("crucial_frames", "perception_share", "degenerate_share", "overlap")
        for name, value in zip(measures, means, strict=True):
            metrics[f"appo/{name}"].append(value)
        own = weights[torch.arange(weights.size(1), device=weights.device) < lengths.unsqueeze(1)]
        metrics["appo/weight_mean"].append(float(own.mean()))
        metrics["appo/weight_max"].append(float(own.max()))
        names, shares = weight_histogram(own, self.recipe.perception.max_weight)
        shares = trainer.accelerator.gather(shares.unsqueeze(0)).mean(dim=0)
        for name, value in zip(names, shares.tolist(), strict=True):
            metrics[f"weights/{name}"].append(value)


def group_weights(
    view: dict[str, Tensor], recipe: Recipe, head_weight: Tensor, head_bias: Tensor | None
) -> PerceptionWeights:
    """Perception weights of one group that lies here whole.

    view: attention (G, N, T), hidden (G, N, H), lengths, accuracy, frames (G,); tokens and logps (G, N) where they
    are known, which saves a pass over the vocabulary.
    """
    settings = weight_settings(recipe)
    selection = select_in(view, settings)
    chosen: dict[str, Tensor] = {
        name: view[name].flatten(0, 1)[selection.rows]
        for name in ("hidden", "tokens", "logps")
        if name in view
    }
    return weights_from_rows(
        selection,
        view["lengths"],
        chosen["hidden"],
        head_weight,
        head_bias,
        settings=settings,
        log_normalizer=_normalizers(chosen, head_weight, head_bias, settings.temperature),
    )


def weight_histogram(weights: Tensor, max_weight: float) -> tuple[list[str], Tensor]:
    """Share of tokens by weight: exactly 1, and ten equal bins from there to max_weight; their names and shares.

    weights: those of real tokens. The bins depend on the setting alone, so that runs and steps can be compared.
    """
    width = (max_weight - 1.0) / HISTOGRAM_BINS
    names = ["share_1.00"]
    names += [
        f"share_{1 + i * width:.2f}_to_{1 + (i + 1) * width:.2f}" for i in range(HISTOGRAM_BINS) if width
    ]
    bins = torch.zeros_like(weights, dtype=torch.long)
    if width:
        inside = ((weights - 1.0) / width).long().clamp(0, HISTOGRAM_BINS - 1)
        bins = torch.where(weights > 1.0, 1 + inside, bins)
    return names, torch.bincount(bins, minlength=len(names)).float() / max(1, len(weights))


def _normalizers(
    chosen: dict[str, Tensor], head_weight: Tensor, head_bias: Tensor | None, temperature: float
) -> Tensor | None:
    if "logps" not in chosen:
        return None
    return log_normalizers(
        chosen["hidden"],
        chosen["tokens"],
        chosen["logps"],
        head_weight,
        head_bias,
        temperature=temperature,
    )


def select_in(view: dict[str, Tensor], settings: WeightSettings) -> Selection:
    """Crucial frames and tokens of one group; view as in `group_weights`, hidden not needed."""
    attention = view["attention"][..., : int(view["frames"].max())]
    return select(attention, view["lengths"], view["accuracy"], settings)


def weight_settings(recipe: Recipe) -> WeightSettings:
    """The recipe's perception section as the mathematics takes it; both use the same names."""
    shared = {field.name for field in fields(WeightSettings)}
    return WeightSettings(
        temperature=recipe.policy.temperature, **recipe.perception.model_dump(include=shared)
    )


def layers_to_read(recipe: Recipe, model: Any) -> tuple[int, ...]:
    """Decoder layers whose attention is read. Raises SettingError for a layer the model does not have."""
    depth = model.config.get_text_config().num_hidden_layers
    if recipe.perception.layers == "last3":
        return tuple(range(max(0, depth - 3), depth))
    chosen = tuple(layer % depth if -depth <= layer < 0 else layer for layer in recipe.perception.layers)
    if wrong := [layer for layer in chosen if not 0 <= layer < depth]:
        asked = list(recipe.perception.layers)
        raise SettingError(
            f"perception.layers={asked}: {wrong[0]} is none of the model's {depth} layers; "
            f"choose from 0 to {depth - 1} (or -1 for the last), or last3"
        )
    return chosen


def _gathered(accelerator: Any, local: dict[str, Tensor]) -> dict[str, Tensor]:
    padded = dict(local)
    for dim in (1, 2):
        padded["attention"] = accelerator.pad_across_processes(padded["attention"], dim=dim)
    return {name: accelerator.gather(tensor.contiguous()) for name, tensor in padded.items()}


def _joined(accelerator: Any, own: Tensor, counts: Sequence[int]) -> Tensor:
    """The first dimension of all processes one after another; counts: its length on each of them."""
    if not sum(counts):
        return own
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own
    parts = accelerator.gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _stacked(rows: Sequence[Tensor], num_tokens: int) -> Tensor:
    """(N_i, ...) each, padded to (len(rows), num_tokens, ...): refilled groups may have been drawn shorter."""
    found = rows[0].new_zeros(len(rows), num_tokens, *rows[0].shape[1:])
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def _slice(view: dict[str, Tensor], start: int, size: int) -> dict[str, Tensor]:
    return {name: tensor[start : start + size] for name, tensor in view.items()}


def _widened(attention: Tensor, parts: Sequence[Scores]) -> Tensor:
    """Pad the frame dimension to the widest part's: chunks of a batch may hold shorter videos only."""
    frames = max(part.attention.shape[-1] for part in parts if part.attention is not None)
    return torch.nn.functional.pad(attention, (0, frames - attention.shape[-1]))


def _per_token(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def _overlap(found: PerceptionWeights) -> float:
    """Share of frames that right and wrong completions both look at, among those that either does."""
    right = {frame for i in found.right for frame in found.psi[i]}
    wrong = {frame for i in found.wrong for frame in found.psi[i]}
    return len(right & wrong) / len(right | wrong) if right | wrong else 0.0
