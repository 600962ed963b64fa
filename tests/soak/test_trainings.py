"""Soaks of trainings: random recipes train, save and go on; random kills leave no trace in what is trained."""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from appo import checks
from appo.errors import UserError
from appo.modeling.adapters import whole_checkpoint
from appo.training.launch import EXIT_INTERRUPTED, mistake
from benchmarks.cells import ALGORITHMS
from tests.soak.drawn import drawn
from tests.tiers import soak
from tests.training.conftest import Bench
from tests.training.test_distributed import launched
from tests.training.test_interrupted import mlflow_steps, start

pytestmark = [soak, pytest.mark.slow, pytest.mark.timeout(0)]
LONGEST_S = 240


def settings(draw: random.Random) -> list[str]:
    """A training that may or may not be possible."""
    return [
        f"model.dtype={draw.choice(('float32', 'bfloat16'))}",
        f"model.freeze_vision={draw.choice(('true', 'true', 'false'))}",
        f"training.shared_prefix={draw.choice(('true', 'false'))}",
        f"training.feature_cache={draw.choice(('true', 'false'))}",
        f"training.gradient_checkpointing={draw.choice(('true', 'false'))}",
        f"training.gradient_accumulation_steps={draw.choice((1, 2, 4))}",
        f"training.updates_per_rollout={draw.choice((1, 1, 2))}",
        f"training.prompts_per_step={draw.choice((1, 2, 3, 4))}",
        f"training.lr_schedule={draw.choice(('constant', 'linear', 'cosine'))}",
        f"training.learning_rate={draw.choice((1e-6, 1e-4, 1e-2))}",
        f"policy.num_generations={draw.choice((2, 3, 4))}",
        f"policy.dynamic_sampling={draw.choice(('true', 'false'))}",
        f"policy.mask_truncated={draw.choice(('true', 'false', 'false'))}",
        f"policy.overlong_buffer={draw.choice((0, 0, 1))}",
        f"policy.perception_weights={draw.choice(('null', 'true', 'false'))}",
        f"policy.temperature={draw.choice((0.7, 1.0, 1.4))}",
        f"policy.top_p={draw.choice((1.0, 1.0, 0.8))}",
        f"policy.max_completion_length={draw.choice((1, 8, 13))}",
        f"perception.k1={draw.choice((1, 2, 15))}",
        f"perception.k2={draw.choice((1, 3, 8))}",
        f"perception.k3={draw.choice((1, 4, 64))}",
        f"perception.strategy={draw.choice(('hard', 'soft', 'all'))}",
        f"perception.fallback={draw.choice(('none', 'all'))}",
        f"perception.divergence={draw.choice(('kl', 'released'))}",
        *([f"model.lora={{rank: {draw.choice((1, 4))}}}"] if draw.random() < 0.4 else []),
    ]


def steps(count: int) -> tuple[str, ...]:
    return (f"training.max_steps={count}", "training.save_every=2")


def test_recipes(bench: Bench, tmp_path: Path) -> None:
    """A random recipe trains two steps to a checkpoint that loads and goes on, or is refused as the checks say."""
    for number, draw in enumerate(drawn("test_recipes")):
        processes = draw.choice((1, 1, 1, 2))
        algorithm, given = draw.choice(ALGORITHMS), settings(draw)
        print(f"  {processes} process(es)  {algorithm}  " + "  ".join(given), flush=True)
        folder = tmp_path / str(number)
        folder.mkdir()
        ours = Bench(bench.manifest, bench.model, folder)
        if refused := problems(ours, algorithm, given, processes):
            print(f"  to be refused: {refused[0]}", flush=True)
            with pytest.raises(UserError):
                train(ours, algorithm, [*given, *steps(2)], processes)
            assert not (folder / "run" / "metrics.jsonl").exists()
        else:
            trains(ours, algorithm, given, processes, goes_on=draw.random() < 0.5)
        shutil.rmtree(folder)
        gc.collect()  # the tests' own collector is off


def problems(bench: Bench, algorithm: str, given: list[str], processes: int) -> list[str]:
    """What `appo validate` and a training's start say against these settings."""
    recipe = bench.recipe(*given, *steps(2), f"algorithms=[{algorithm}]", f"policy.algorithm={algorithm}")
    subject = checks.Subject(recipe, processes=processes)
    outcomes = checks.run_checks(subject, checks.ALONE, only=checks.OF_TRAINING)
    return [problem for outcome in outcomes for problem in outcome.problems]


def train(bench: Bench, algorithm: str, given: list[str], processes: int) -> None:
    """Raises UserError for what a user can mend, as `launch` does."""
    if processes == 1:
        bench.train(algorithm, *given)
        return
    said = launched(bench, "run", *given, algorithm=algorithm, fails=None)
    if refused := mistake(bench.folder / "run.json"):
        raise UserError(refused)
    assert (bench.folder / "run" / "summary.json").exists(), said


def trains(bench: Bench, algorithm: str, given: list[str], processes: int, *, goes_on: bool) -> None:
    from transformers import AutoModelForImageTextToText

    train(bench, algorithm, [*given, *steps(2)], processes)
    looks_sound(bench, 2)
    checkpoint = whole_checkpoint(str(bench.folder / "run" / "checkpoint"))
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto")
    assert f"model.dtype={str(loaded.dtype).removeprefix('torch.')}" in given
    if goes_on:
        print("  goes on", flush=True)
        train(bench, algorithm, [*given, *steps(4)], processes)
        looks_sound(bench, 4)
        assert json.loads((bench.folder / "run" / "summary.json").read_text())["resumed_from"] == 2


def looks_sound(bench: Bench, count: int) -> None:
    lines = bench.metrics()
    assert [line["step"] for line in lines] == list(range(1, count + 1))
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert all(tensor.isfinite().all() for tensor in bench.weights().values())


STEPS = 8


def disturbed_settings(draw: random.Random) -> tuple[str, ...]:
    updates = draw.choice((1, 1, 2))
    return (
        f"training.max_steps={STEPS}",
        f"training.save_every={updates * draw.choice((1, 2, 3))}",
        f"training.updates_per_rollout={updates}",
        f"training.lr_schedule={draw.choice(('constant', 'linear'))}",
        f"training.shared_prefix={draw.choice(('true', 'false'))}",
        f"model.dtype={draw.choice(('float32', 'bfloat16'))}",
        f"policy.dynamic_sampling={draw.choice(('true', 'false'))}",
        *(["model.lora={rank: 4}"] if draw.random() < 0.3 else []),
    )


def test_kills(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed and stopped at random moments, a training ends bit for bit as an undisturbed one, every step told once."""
    threads = torch.get_num_threads()
    for number, draw in enumerate(drawn("test_kills")):
        algorithm, given = draw.choice(("grpo", "dapo", "appo")), disturbed_settings(draw)
        print(f"  {algorithm}  " + "  ".join(given), flush=True)
        folder = tmp_path / str(number)
        folder.mkdir()
        ours = Bench(bench.manifest, bench.model, folder)
        torch.set_num_threads(1)  # as the processes below: sums in the same order
        ours.train(algorithm, *given, name="undisturbed")
        torch.set_num_threads(threads)
        for _ in range(draw.randint(1, 3)):
            disturb(draw, ours, folder, algorithm, given)
        last = start(ours, folder, given, algorithm=algorithm)
        said = last.communicate(timeout=LONGEST_S)[0]
        assert last.returncode == 0, said
        expected, found = ours.weights("undisturbed"), ours.weights("disturbed")
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
        whole = list(range(1, STEPS + 1))
        assert [line["step"] for line in ours.metrics("disturbed")] == whole
        assert mlflow_steps(folder, "grad_norm") == whole
        shutil.rmtree(folder)
        gc.collect()


def disturb(draw: random.Random, bench: Bench, folder: Path, algorithm: str, given: tuple[str, ...]) -> None:
    """One attempt, stopped at a moment that the seed says: so many steps after its start, so long after that."""
    after, pause = draw.randrange(STEPS), draw.random() * draw.choice((0.05, 1, 5))
    how = draw.choice((signal.SIGKILL, signal.SIGTERM))
    process = start(bench, folder, given, algorithm=algorithm)
    wait(process, bench, after)
    time.sleep(pause)
    process.send_signal(how)
    said = process.communicate(timeout=LONGEST_S)[0]
    print(f"  {how.name} {pause:.2f} s after step {after}: status {process.returncode}", flush=True)
    # SIGTERM before there is anything to save simply ends it; a training may also have come to its end.
    assert process.returncode in (0, -how, EXIT_INTERRUPTED), said
    assert (process.returncode == EXIT_INTERRUPTED) <= (how == signal.SIGTERM), said


def wait(process: subprocess.Popen[str], bench: Bench, steps_: int) -> None:
    """Until this attempt has written the line of a step from `steps_` on, or ended."""
    path, until = bench.folder / "disturbed" / "metrics.jsonl", time.monotonic() + LONGEST_S
    before = path.stat().st_mtime_ns if path.exists() else 0
    while steps_ and process.poll() is None:
        assert time.monotonic() < until, "no steps"
        if path.exists() and path.stat().st_mtime_ns != before and path.read_bytes().count(b"\n") >= steps_:
            return
        time.sleep(0.01)
