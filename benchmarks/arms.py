"""The four ways to run a training step that are compared, phase by phase, on one model and one set of
completions.

plain_dapo   every completion carries its prompt and its video, pixels are encoded in every pass, attention is
SDPA plain_appo   the same, and attention as the paper takes it: an eager scoring pass that returns all
attention matrices and all logits of the completions, from which the released variant's weights are made
probe_appo   plain_dapo with our probe: what reading attention costs where nothing is shared dapo         each
prompt once per group, features once for ever appo         the same with the probe, and token weights from
hidden rows

In all of them the head sees completion rows only and equal vision windows are attended to in one call, so
that what differs is what the arms are named for. The passes are the trainer's own functions; the loss is
DAPO's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from appo.modeling.features import base_model
from appo.modeling.generation import Sampling
from appo.modeling.inputs import PromptInputs, vision_kwargs, with_features
from appo.perception import perception_weights, perception_weights_from_hidden
from appo.perception.probe import FrameProbe
from appo.training.phases import Phases
from appo.training.rollouts import generate_groups, left_padded
from appo.training.scoring import Row, Scores, log_normalizers, score
from benchmarks.shapes import EOS, PAD, Shape

ARMS = ("plain_dapo", "plain_appo", "probe_appo", "dapo", "appo")
_SHARED, _PROBED = ("dapo", "appo"), ("probe_appo", "appo")
_WEIGHTS = {"k1": 15, "k2": 3, "k3": 64, "max_weight": 1.7}
_EPSILON_LOW, _EPSILON_HIGH = 0.2, 0.28


class Step:
    """One training step of one arm on `model`; `phases` holds its seconds afterwards."""

    def __init__(
        self, shape: Shape, model: Any, prompts: Sequence[PromptInputs], completions: list[list[Tensor]]
    ):
        self.shape, self.model, self.phases = shape, model, Phases()
        self.device = next(model.parameters()).device
        self.plain = list(prompts)
        self.encoded = [with_features(prompt, model) for prompt in prompts]
        self.completions = completions
        trained = [p for p in model.parameters() if p.requires_grad]
        # The trainer's own on a GPU; the plain one would hold another copy of all weights for a moment.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=self.device.type == "cuda" or None)
        depth = model.config.get_text_config().num_hidden_layers
        self.layers = tuple(range(depth - 3, depth))
        generator = torch.Generator().manual_seed(2)
        size = shape.generations
        self.advantages = torch.randn(shape.groups, size, generator=generator).to(self.device)
        self.accuracy = (torch.arange(size) % 2).float().to(self.device)

    def run(self, arm: str, *, rollout: bool, scoring: bool = True) -> None:
        """scoring=False: on-policy without a scoring pass; attention is then read in the update."""
        with _timed_probe(self.phases), self._autocast():
            if rollout:
                with self.phases("rollout"):
                    self._roll_out(arm)
            for group in range(self.shape.groups):
                self._train_on(arm, group, scoring)
            with self.phases("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()

    def _autocast(self) -> Any:
        """As the trainer runs: bfloat16 products over float32 masters."""
        half = self.shape.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _train_on(self, arm: str, group: int, scoring: bool) -> None:
        rows = self._rows(arm, group)
        lengths = torch.tensor([len(row.tokens) for row in rows], device=self.device)
        num_tokens, weights, old = int(lengths.max()), None, None
        read_early = scoring or arm == "plain_appo"
        if scoring:
            with self.phases("scoring"), torch.no_grad():
                if arm == "plain_appo":
                    logits, attention, old = self._eager(rows, num_tokens, lengths)
                else:
                    scores = self._score(arm, rows, num_tokens, probe=arm in _PROBED)
                    old = scores.logps
        elif arm == "plain_appo":  # attention is had by a pass of its own only
            with self.phases("scoring"), torch.no_grad():
                logits, attention, _ = self._eager(rows, num_tokens, lengths)
        if read_early and arm == "plain_appo":
            with self.phases("weights"):
                weights = self._released_weights(attention, lengths, logits)
                del logits, attention
        elif read_early and arm in _PROBED:
            with self.phases("weights"):
                weights = self._weights(rows, scores, lengths)
            del scores
        with self.phases("update"):
            found = self._score(arm, rows, num_tokens, probe=arm in _PROBED and not read_early)
            if arm in _PROBED and not read_early:
                with self.phases("weights"):
                    weights = self._weights(rows, found, lengths)
            loss = self._loss(found.logps, old, group, lengths, weights)
            with torch.autocast(self.device.type, enabled=False):
                loss.backward()

    def _rows(self, arm: str, group: int) -> list[Row]:
        prompt = (self.encoded if arm in _SHARED else self.plain)[group]
        return [Row(prompt, group, tokens) for tokens in self.completions[group]]

    def _score(self, arm: str, rows: list[Row], num_tokens: int, *, probe: bool) -> Scores:
        return score(
            self.model,
            rows,
            num_tokens,
            shared_prefix=arm in _SHARED,
            pad_token_id=PAD,
            device=self.device,
            probe_layers=self.layers if probe else None,
        )

    def _loss(
        self, logps: Tensor, old: Tensor | None, group: int, lengths: Tensor, weights: Tensor | None
    ) -> Tensor:
        """DAPO's clip-higher loss, averaged over tokens (algorithm of the DAPO paper, eq. 8)."""
        valid = torch.arange(logps.shape[1], device=self.device) < lengths[:, None]
        advantages = self.advantages[group][:, None].expand_as(logps)
        if weights is not None:
            advantages = advantages * weights
        ratio = (logps - (logps.detach() if old is None else old)).exp()
        clipped = ratio.clamp(1 - _EPSILON_LOW, 1 + _EPSILON_HIGH)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        return -(gain * valid).sum() / (valid.sum() * self.shape.groups)

    @torch.no_grad()
    def _weights(self, rows: list[Row], scores: Scores, lengths: Tensor) -> Tensor:
        head = self.model.get_output_embeddings().weight.detach()
        tokens = torch.nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True).to(
            self.device
        )
        normalizers = log_normalizers(scores.hidden, tokens, scores.logps.detach(), head, temperature=1.0)
        return perception_weights_from_hidden(
            scores.attention,
            lengths,
            self.accuracy,
            scores.hidden,
            head,
            log_normalizer=normalizers,
            **_WEIGHTS,
        ).weights

    def _released_weights(self, attention: Tensor, lengths: Tensor, logits: Tensor) -> Tensor:
        weights, _ = perception_weights(
            attention, lengths, self.accuracy, logits, divergence="released", fallback="all", **_WEIGHTS
        )
        return weights

    def _eager(self, rows: list[Row], num_tokens: int, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (G, N, V), attention (G, N, T) and log-probabilities from one eager, padded pass."""
        prompt, batch = rows[0].prompt, len(rows)
        start = len(prompt.ids)
        ids = torch.full((batch, start + num_tokens), PAD)
        mask = torch.zeros_like(ids)
        following = int(prompt.positions.max()) + 1
        positions = torch.cat(
            [prompt.positions, torch.arange(following, following + num_tokens).expand(3, -1)], dim=1
        )
        for place, row in enumerate(rows):
            ids[place, : start + len(row.tokens)] = torch.cat([prompt.ids, row.tokens])
            mask[place, : start + len(row.tokens)] = 1
        visual = vision_kwargs([row.prompt for row in rows], self.model, self.device)
        visual.pop("second_per_grid_ts", None)
        with _eager_text(self.model):
            output = self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=positions[:, None].expand(-1, batch, -1).to(self.device),
                **visual,
                output_attentions=True,
                logits_to_keep=num_tokens + 1,
                use_cache=False,
            )
        with self.phases("attention"):
            frames = torch.nn.functional.one_hot(prompt.frame_of_token + 1, prompt.num_frames + 1)[:, 1:]
            members = (frames / frames.sum(dim=0)).to(self.device)
            rows_read = slice(start - 1, start + num_tokens - 1)
            attention = torch.stack(
                [
                    output.attentions[layer][:, :, rows_read, :start].float().mean(dim=1) @ members
                    for layer in self.layers
                ]
            ).mean(dim=0)
        logits = output.logits[:, :-1]
        labels = ids[:, start:].to(self.device)
        logps = logits.float().log_softmax(dim=-1).gather(2, labels[..., None])[..., 0]
        valid = torch.arange(num_tokens, device=self.device) < lengths[:, None]
        return logits, attention, logps.masked_fill(~valid, 0.0)

    @torch.no_grad()
    def _roll_out(self, arm: str) -> None:
        size, length = self.shape.generations, self.shape.completion
        sampling = Sampling(length, (EOS,), PAD, min_tokens=length)
        self.model.eval()  # generation wants a cache, which checkpointing in train mode rules out
        if arm in _SHARED:
            generate_groups(self.model, self.encoded, size, sampling=sampling, device=self.device)
        else:
            prompts = [prompt for prompt in self.plain for _ in range(size)]
            ids, mask = left_padded(prompts, PAD, self.device)
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                mm_token_type_ids=torch.stack([p.token_types for p in prompts]).to(self.device),
                **vision_kwargs(prompts, self.model, self.device),
                generation_config=sampling.for_transformers(),
            )
        self.model.train()


def gradient(step: Step, arm: str, scoring: bool) -> Tensor:
    """Of one step, flat; the weights stay as they were, so that arms can be compared."""
    step.optimizer.step = step.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
    step.run(arm, rollout=False, scoring=scoring)
    found = torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])
    step.model.zero_grad()
    del step.optimizer.step, step.optimizer.zero_grad
    return found


@contextlib.contextmanager
def _eager_text(model: Any) -> Iterator[None]:
    """The text layers' attention as transformers computes it eagerly: no other returns its matrices."""
    config = base_model(model).language_model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def _timed_probe(phases: Phases) -> Iterator[None]:
    """Bill the probe's reading to "attention" instead of the pass that it happens in."""
    original = FrameProbe.read

    def read(self: FrameProbe, *args: Any, **kwargs: Any) -> None:
        with phases("attention"):
            original(self, *args, **kwargs)

    FrameProbe.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        FrameProbe.read = original  # type: ignore[method-assign]
