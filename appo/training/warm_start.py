"""Recipe and manifest -> a tiny Qwen2.5-VL that reinforcement can start from: the demo's pretrained model.

Supervised training on the easy split (or, where a manifest has none, on its train split: then it only learns the
format). Full marks on the easy questions carry over to the harder ones by half; what reinforcement then adds is the
rest. The way is that of every later pass: the same prompts, frames, positions and kept rows.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from appo.config import Recipe
from appo.data.frames import FrameSource, open_frames
from appo.data.manifest import Manifest, ManifestError, read_manifest
from appo.data.messages import prompt_messages
from appo.data.schema import VideoSample
from appo.errors import SettingError
from appo.modeling.generation import Sampling, end_tokens
from appo.modeling.inputs import PromptInputs, build_inputs, vision_kwargs
from appo.modeling.loading import prepare
from appo.prompts import ANSWER, OBSERVATION, THINK, TIME
from appo.rewards.accuracy import accuracy_reward
from appo.training import tiny
from appo.training.rollouts import generate_groups

# Held out of the easy split, and taken from the validation split: 1.6 and 6 points of standard error at 99 and 50 %.
PROBE_SAMPLES = 64
RAMP_SHARE, DECAY_SHARE, FLOOR = 0.1, 0.4, 0.05
LEARNED = (
    0.9  # of the easy questions; learning is sudden, so a share below this means it has not happened yet
)


def warm_start(recipe: Recipe, manifest_path: Path, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Train from scratch and write the folder `out`; returns a summary for logs.

    The summary: `accuracy_easy` (held-out part of the split trained on; absent where that is too small to hold any
    out), `accuracy_hard` (validation split, absent without one), `loss`, `steps`, `parameters`, `wall_s`.
    Raises ManifestError when there is nothing to train on, SettingError when the recipe has no `model.warm_start`.
    """
    settings = recipe.model.warm_start
    if settings is None:
        raise SettingError("model.warm_start=null: give its settings, or a checkpoint as model.path")
    started = time.monotonic()
    manifest = read_manifest(manifest_path)
    learned, held_out = _divide(manifest)
    frames = open_frames(manifest, recipe)
    template = recipe.data.template
    tokenizer = tiny.make_tokenizer(_texts(manifest, template))
    processor = tiny.make_processor(tokenizer, recipe.video)
    model = prepare(tiny.make_model(tokenizer, seed=settings.seed), freeze_vision=False)

    with Progress(disable=not progress, transient=False) as bar:
        task = bar.add_task("warm start: frames", total=len(learned))
        examples = []
        for sample in learned:
            prompt = _inputs(processor, model, sample, frames, template)
            examples.append((prompt, _target(tokenizer, sample, template)))
            bar.advance(task)
        task = bar.add_task("warm start: training", total=settings.steps)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
        loss = torch.zeros(())
        model.train()
        batches = _batches(len(examples), settings.batch_size, settings.seed)
        for _ in range(settings.steps):
            loss = _loss(model, [examples[index] for index in next(batches)], tokenizer.pad_token_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update(task, advance=1, description=f"warm start: training, loss {loss.item():.3f}")
        model.eval()
        summary: dict[str, Any] = {
            "steps": settings.steps,
            "seed": settings.seed,
            "samples": len(learned),
            "parameters": sum(p.numel() for p in model.parameters()),
            "loss": round(loss.item(), 4),
        }
        probes = (
            ("accuracy_easy", held_out),
            ("accuracy_hard", manifest.split("validation")[:PROBE_SAMPLES]),
        )
        for name, samples in probes:
            if samples:
                prompts = [_inputs(processor, model, sample, frames, template) for sample in samples]
                summary[name] = greedy_accuracy(
                    model, tokenizer, prompts, recipe.policy.max_completion_length
                )
    _save(model, processor, out)
    summary["wall_s"] = round(time.monotonic() - started, 1)
    if progress:
        print(_in_words(summary))
    return summary


def _in_words(summary: dict[str, Any]) -> str:
    """One line for the screen; a second where the easy questions were not learned."""
    told = [f"warm start: {summary['parameters'] / 1e6:.1f} M parameters, {summary['steps']} steps"]
    easy, hard = summary.get("accuracy_easy"), summary.get("accuracy_hard")
    if easy is not None:
        told.append(f"{easy:.0%} of easy questions right")
    if hard is not None:
        told.append(f"{hard:.0%} of hard ones")
    line = f"{', '.join(told)} ({summary['wall_s']:.0f} s)"
    if easy is not None and easy < LEARNED:
        line += (
            "\nwarm start: the easy questions are not learned yet, and reinforcement from here may fail; "
            f"raise model.warm_start.steps={summary['steps']} or try another model.warm_start.seed"
        )
    return line


def demonstration(sample: VideoSample, template: str) -> str:
    """The response that supervision shows for a sample: every part that the template asks for, in its order."""
    options = sample.options
    shown = options[ord(sample.answer) - ord("A")] if options else sample.answer
    answer = f"<{ANSWER}>{sample.answer}</{ANSWER}>"
    if template == "observation":
        observed = f"<{OBSERVATION}>it shows {shown}</{OBSERVATION}>"
        return f"{observed}<{THINK}>so it is {shown}</{THINK}>{answer}"
    response = f"<{THINK}>it shows {shown}</{THINK}>{answer}"
    if template == "grounding":
        spans = ", ".join(f"{start:g} to {end:g}" for start, end in sample.key_times)
        response += f"<{TIME}>{spans}</{TIME}>"
    return response


def greedy_accuracy(model: Any, tokenizer: Any, prompts: Sequence[PromptInputs], max_tokens: int) -> float:
    """Share of `prompts` whose greedy completion is right, by the parser that rewards and benchmarks use."""
    sampling = Sampling(max_tokens, end_tokens(tokenizer), tokenizer.pad_token_id, temperature=0.0)
    device = next(model.parameters()).device
    found = generate_groups(model, prompts, 1, sampling=sampling, device=device)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    scores = [
        accuracy_reward(text, prompt.sample) or 0.0 for text, prompt in zip(texts, prompts, strict=True)
    ]
    return sum(scores) / len(scores)


def _divide(manifest: Manifest) -> tuple[list[VideoSample], list[VideoSample]]:
    """(to learn from, held out of the same split)."""
    samples = manifest.split("warm_start")
    if not samples:
        samples = manifest.split("train")
    if not samples:
        raise ManifestError(
            f"{manifest.path}: has no sample in the splits warm_start and train to learn from"
        )
    held_out = PROBE_SAMPLES if len(samples) >= 4 * PROBE_SAMPLES else 0
    return samples[: len(samples) - held_out], samples[len(samples) - held_out :]


def _texts(manifest: Manifest, template: str) -> Iterator[str]:
    for sample in manifest.samples:
        message = prompt_messages(sample, template, duration_s=sample.duration_s or 0.0, num_frames=0)
        yield message[0]["content"][-1]["text"]
        yield demonstration(sample, template)
    yield "user assistant system"


def _inputs(
    processor: Any, model: Any, sample: VideoSample, frames: FrameSource, template: str
) -> PromptInputs:
    video = None if sample.video is None else frames.load(sample)
    image = None if sample.image is None else frames.image(sample)
    return build_inputs(processor, model, sample, video, image, template=template)


def _target(tokenizer: Any, sample: VideoSample, template: str) -> Tensor:
    text = demonstration(sample, template) + tokenizer.eos_token
    return torch.tensor(tokenizer(text)["input_ids"])


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches; every example once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def _rate(step: int, steps: int) -> float:
    """Up over the first tenth, level, and down over the last part: full rate to the end would leave it unsettled."""
    ramp = max(1.0, RAMP_SHARE * steps)
    decay = (steps - step) / max(1.0, DECAY_SHARE * steps)
    return max(FLOOR, min(1.0, (step + 1) / ramp, decay))


def _loss(model: Any, batch: Sequence[tuple[PromptInputs, Tensor]], pad_token_id: int) -> Tensor:
    """Mean negative log-likelihood of the target tokens, each counted alike."""
    device = next(model.parameters()).device
    width = max(len(prompt.ids) + len(target) for prompt, target in batch)
    longest = max(len(target) for _, target in batch)
    ids = torch.full((len(batch), width), pad_token_id)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.zeros(3, len(batch), width, dtype=torch.long)
    # Only the rows that predict a target token reach the head.
    rows = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    for row, (prompt, target) in enumerate(batch):
        start, size = len(prompt.ids), len(target)
        ids[row, : start + size] = torch.cat([prompt.ids, target])
        mask[row, : start + size] = 1
        following = int(prompt.positions.max()) + 1 + torch.arange(size)
        positions[:, row, : start + size] = torch.cat([prompt.positions, following.expand(3, -1)], dim=1)
        rows[row, :size] = torch.arange(start - 1, start + size - 1)
        labels[row, :size] = target
    output = model(
        input_ids=ids.to(device),
        # Without padding the causal mask alone says the same, and its kernel is faster.
        attention_mask=None if bool(mask.all()) else mask.to(device),
        position_ids=positions.to(device),
        scored=rows.to(device),
        use_cache=False,
        **vision_kwargs([prompt for prompt, _ in batch], model, device),
    )
    return torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten().to(device))


def _save(model: Any, processor: Any, out: Path) -> None:
    """The folder under its final name is whole or absent."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tiny.save(model, processor, partial)
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
