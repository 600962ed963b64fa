"""A training as it goes -> metrics.jsonl, a progress bar, whole checkpoints, and a clean stop on SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from appo.training.checkpoints import MARKER
from appo.training.finite import on_any_process
from appo.training.work import step_metrics


class StepRecorder(TrainerCallback):
    """One line per step in metrics.jsonl, the same to the tracker, and the progress bar."""

    def __init__(
        self, path: Path, *, prompts_per_step: int, tracker: Any = None, progress: str | None = None
    ):
        self.path, self.prompts, self.tracker = path, prompts_per_step, tracker
        self.label, self._bar, self._began, self._seconds = progress, None, 0.0, 0.0
        self.history: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.history = _kept_lines(self.path, state.global_step)
        if self.label is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, unit="step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds = time.perf_counter() - self._began

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line = {"step": state.global_step, **{k: v for k, v in logs.items() if k != "total_flos"}}
        line |= {"step_s": self._seconds, "samples_per_second": self.prompts / self._seconds}
        tokens = None
        if "completions/mean_length" in logs:
            tokens = self.prompts * args.num_generations * logs["completions/mean_length"]
            line["tokens_per_second"] = tokens / self._seconds
        line |= step_metrics(
            logs, prompts=self.prompts, tokens=tokens, processes=args.world_size, step_s=self._seconds
        )
        self.history.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tracker is not None:
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
            self.tracker.log_metrics(numbers, step=state.global_step, once=True)
        if self._bar is not None:
            if "reward" in logs:  # only the first update of a rollout has one
                self._bar.set_postfix(reward=f"{logs['reward']:.2f}", refresh=False)
            self._bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class WholeCheckpoints(TrainerCallback):
    """A checkpoint counts once its marker is written, last; what a crash left half-written is never resumed from."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            from appo.storage import write_atomic

            write_atomic(folder / MARKER, f"{state.global_step}\n")


class StopOnSignal(TrainerCallback):
    """SIGTERM (spot reclaim, node drain): finish the step, save, stop. `stopped` asks the caller for a retry.

    Of several updates on one rollout the last is waited for: a checkpoint has no place for its completions.

    It is the same on all processes, which hear a signal at different times or not at all: one that stopped a step before
    the others would leave them waiting for it.
    """

    def __init__(self) -> None:
        self.stopped, self._heard = False, False
        # Outside of the main thread it raises ValueError: whoever owns that thread handles signals.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: Any) -> None:
        self._heard = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        heard = on_any_process(self._heard, args.device)
        self.stopped = heard and state.global_step % args.num_iterations == 0
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True


def _kept_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Lines up to the step that training resumes from; later ones are dropped from the file, to be made again."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the line a crash cut off
            break
        if line["step"] <= step:
            lines.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)
    return lines
