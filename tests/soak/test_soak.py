"""Random recipes, kills, overrides and packings: `make soak`, bounded in time and repeatable from a seed."""

from __future__ import annotations

import json
import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from appo import cli
from appo.errors import UserError
from appo.training.launch import EXIT_INTERRUPTED
from tests.modeling import models
from tests.modeling.test_attention import CLOSE, packed_batch, plain_logits
from tests.soak.drawn import drawn
from tests.tiers import soak
from tests.training.conftest import Bench
from tests.training.test_interrupted import SETTINGS, start, wait_for_steps

pytestmark = [soak, pytest.mark.slow, pytest.mark.timeout(0)]


def test_packings(tmp_path: Path) -> None:
    """Packed groups of any number, length and size are scored as padded ones."""
    made = {family: models.build(family) for family in models.FAMILIES}
    for draw in drawn("test_packings"):
        family = draw.choice(models.FAMILIES)
        image = draw.random() < 0.5  # in all prompts of a batch, or in none
        prompts = [
            models.prompt(
                family,
                frames=draw.randint(1, 8),
                text=draw.randint(1, 12),
                image=image,
                seed=draw.randrange(99),
            )
            for _ in range(draw.randint(1, 4))
        ]
        size = draw.randint(1, 5)
        completions = [
            [torch.tensor([draw.randint(1, 49) for _ in range(draw.randint(1, 12))]) for _ in range(size)]
            for _ in prompts
        ]
        reference, padded = plain_logits(made[family], prompts, completions)
        found, inputs = packed_batch(made[family], prompts, completions)
        rows = sum(map(len, completions))
        logits = found.unpack(made[family](**inputs).logits[:, found.scored], rows, padded["tail"])
        for row, completion in enumerate(one for group in completions for one in group):
            torch.testing.assert_close(
                logits[row, : len(completion)], reference[row, : len(completion)], **CLOSE
            )


# What a random override may be set to: right now and then, and wrong in all the ways that YAML offers.
VALUES = ("0", "-1", "1", "3", "1e9", "0.5", ".nan", ".inf", "true", "null", "[]", "{}", "x", "''", "[1, 2]", "{a: 1}",
          "s3://bucket/key", "/nowhere", "\u00e9", "2026-01-01")  # fmt: skip


def keys(values: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        whole = f"{path}.{name}" if path else name
        found.append(whole)
        if isinstance(value, dict):
            found += keys(value, whole)
    return found


def test_overrides_never_end_in_a_traceback() -> None:
    """Whatever is set, `appo validate` ends with status 0 or 2 and a few lines."""
    from appo.config import load_recipe

    known = keys(load_recipe("demo").model_dump(mode="json"))
    for draw in drawn("test_overrides"):
        given = [f"{draw.choice(known)}={draw.choice(VALUES)}" for _ in range(draw.randint(1, 3))]
        print("  " + "  ".join(given), flush=True)
        words = [word for value in given for word in ("--set", value)]
        result = CliRunner().invoke(cli.app, ["validate", "demo", *words])
        assert result.exit_code in (0, 2), (given, result.output)
        assert isinstance(result.exception, SystemExit | None), (given, result.exception)


def settings(draw: random.Random) -> list[str]:
    """A training that may or may not be possible."""
    return [
        f"model.dtype={draw.choice(('float32', 'bfloat16'))}",
        f"training.shared_prefix={draw.choice(('true', 'false'))}",
        f"training.gradient_checkpointing={draw.choice(('true', 'false'))}",
        f"training.gradient_accumulation_steps={draw.choice((1, 2, 4))}",
        f"training.updates_per_rollout={draw.choice((1, 1, 2))}",
        f"training.prompts_per_step={draw.choice((1, 2, 4))}",
        f"training.lr_schedule={draw.choice(('constant', 'linear', 'cosine'))}",
        f"policy.num_generations={draw.choice((2, 4))}",
        f"policy.dynamic_sampling={draw.choice(('true', 'false'))}",
        f"policy.temperature={draw.choice((0.7, 1.0))}",
        f"policy.max_completion_length={draw.choice((1, 8, 13))}",
        f"perception.k1={draw.choice((1, 2, 15))}",
        f"perception.k2={draw.choice((1, 3))}",
        f"perception.k3={draw.choice((1, 4))}",
        *(["model.lora={rank: 4}"] if draw.random() < 0.4 else []),
    ]


def test_recipes_train(bench: Bench) -> None:
    """A random recipe trains two steps to a checkpoint that loads, or is refused in a line for the user."""
    from transformers import AutoModelForImageTextToText

    for number, draw in enumerate(drawn("test_recipes")):
        given, algorithm = settings(draw), draw.choice(("grpo", "dapo", "appo", "pa_grpo"))
        print(f"  {algorithm}  " + "  ".join(given), flush=True)
        name = f"run{number}"
        try:
            bench.train(algorithm, *given, name=name)
        except UserError as refusal:
            print(f"  refused: {refusal}", flush=True)
            continue
        lines = bench.metrics(name)
        assert [line["step"] for line in lines] == [1, 2]
        assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
        assert all(tensor.isfinite().all() for tensor in bench.weights(name).values())
        if not any(text.startswith("model.lora") for text in given):
            AutoModelForImageTextToText.from_pretrained(bench.folder / name / "checkpoint")


def test_kills(bench: Bench, tmp_path: Path) -> None:
    """Killed and stopped at random moments, a training ends bit for bit as an undisturbed one."""
    torch.set_num_threads(1)  # as the processes below: sums in the same order
    bench.train("appo", *SETTINGS, name="undisturbed")
    expected = bench.weights("undisturbed")
    for number, draw in enumerate(drawn("test_kills")):
        folder = tmp_path / str(number)
        folder.mkdir()
        disturbed = Bench(bench.manifest, bench.model, folder)
        for _ in range(draw.randint(1, 3)):
            process = start(disturbed, folder)
            wait_for_steps(process, disturbed, 1)
            time.sleep(draw.random() * 3)
            how = draw.choice((signal.SIGKILL, signal.SIGTERM))
            process.send_signal(how)
            said = process.communicate()[0]
            print(f"  {how.name}: status {process.returncode}", flush=True)
            assert process.returncode in (-signal.SIGKILL, EXIT_INTERRUPTED, 0), said
        last = start(disturbed, folder)
        said = last.communicate(timeout=240)[0]
        assert last.returncode == 0, said
        found = disturbed.weights("disturbed")
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        summary = json.loads((folder / "disturbed" / "summary.json").read_text())
        assert summary["steps"] == len(disturbed.metrics("disturbed"))
