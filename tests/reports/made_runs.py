"""Outputs of trainings and evaluations in the pipeline's own formats, made by a seeded generator.

GENERATED, not measured: they exercise the reports, and say nothing about any algorithm. Every file is marked
`"generated": true` where its format has room for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TOKENS = ("<think>", "cross", " shows", " red", "</think>", "<answer>", "B", "</answer>", "<|im_end|>")
FRAMES = 8
BASE_COMMIT = "c0ffee" + 34 * "0"


def make_training(
    folder: Path,
    algorithm: str,
    seed: int,
    *,
    steps: int = 40,
    manifest_digest: str = "0" * 64,
    sample_ids: Sequence[str] = (),
    variant: str | None = None,
) -> Path:
    """A finished training's folder: metrics.jsonl, groups.jsonl, summary.json."""
    rng = np.random.default_rng([seed, len(algorithm), ord(algorithm[0])])
    out = folder / f"{algorithm}{'.' + variant if variant else ''}-seed{seed}"
    out.mkdir(parents=True)
    speed = {"grpo": 24.0, "dapo": 28.0, "appo": 26.5}.get(algorithm, 25.0) * (
        1 + 0.02 * rng.standard_normal()
    )
    lines = []
    for step in range(1, steps + 1):
        share = 0.54 + 0.35 * (1 - np.exp(-step / 18)) + 0.05 * rng.standard_normal()
        lines.append(
            {
                "step": step,
                "reward": float(0.9 * share + 0.1),
                "rewards/accuracy/mean": float(share),
                "rewards/format/mean": 1.0,
                "entropy": float(0.4 * np.exp(-step / 30) + 0.05 + 0.01 * rng.random()),
                "completions/mean_length": float(9 + 0.3 * rng.standard_normal()),
                "samples_per_second": float(speed * (1 + 0.05 * rng.standard_normal())),
                "step_s": 0.58,
                "tokens_per_second_per_device": 1200.0,
                "mfu": 0.21 + 0.001 * seed,
                **{
                    f"{name}/{phase}": value
                    for phase, seconds, mfu in (("rollout", 0.15, 0.02), ("update", 0.43, 0.31))
                    for name, value in (
                        ("mfu", mfu),
                        ("samples_per_second", 16 / seconds),
                        ("tokens_per_second_per_device", 700 / seconds),
                    )
                },
                "phase/rollout_s": 0.15,
                "phase/rewards_s": 0.003,
                "phase/update_s": 0.43,
                **({"phase/scoring_s": 0.08} if algorithm != "dapo" else {}),
                **({"appo/crucial_frames": 1.5, "appo/perception_share": 0.4} if algorithm == "appo" else {}),
            }
        )
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = sample_ids or [f"key_moment/validation/{i:05d}" for i in range(12)]
    with (out / "groups.jsonl").open("w") as file:
        for step in (0, steps):
            for sample_id in ids:
                group = make_group(rng, sample_id, algorithm=algorithm, seed=seed, step=step)
                file.write(json.dumps(group) + "\n")
    summary = {
        "generated": True,
        "algorithm": algorithm,
        "seed": seed,
        "recipe_digest": "generated",
        "manifest_digest": manifest_digest,
        "base_model": "org/name",
        "base_commit": BASE_COMMIT,
        "steps": steps,
        "wall_s": 30.0,
        "samples_per_second": float(speed),
        "crucial_hit_rate_start": 0.62 + 0.05 * float(rng.random()),
        "crucial_hit_rate_end": 0.9 + 0.05 * float(rng.random()),
        "mlflow_run_id": None,
        **({"variant": variant} if variant else {}),
    }
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def make_group(rng: np.random.Generator, sample_id: str, *, algorithm: str, seed: int, step: int) -> dict:
    """One group of 8 completions, some right and some wrong, that look at a key frame to differing
    degrees.
    """
    key = int(rng.integers(FRAMES))
    completions, tokens, accuracy, attention, psi, weights = [], [], [], [], [], []
    for _ in range(8):
        right = bool(rng.random() < 0.6)
        look_at = key if rng.random() < (0.9 if right else 0.4) else int(rng.integers(FRAMES))
        rows = 0.02 + 0.02 * rng.random((len(TOKENS), FRAMES))
        rows[1:4, look_at] += 0.05 + 0.05 * rng.random(3)
        tokens.append(list(TOKENS))
        completions.append("<think>cross shows red</think><answer>B</answer>")
        accuracy.append(1.0 if right else 0.0)
        attention.append(np.round(rows, 6).tolist())
        psi.append([look_at])
        weights.append(
            np.round(1 + 0.7 * rng.random(len(TOKENS)) * (rng.random(len(TOKENS)) < 0.4), 4).tolist()
        )
    right_ones = [i for i, a in enumerate(accuracy) if a >= 0.5]
    return {
        "step": step,
        "algorithm": algorithm,
        "seed": seed,
        "sample_id": sample_id,
        "question": "Which colour is shown with the brightest cross?",
        "completions": completions,
        "tokens": tokens,
        "rewards": {"accuracy": accuracy, "format": [1.0] * 8},
        "attention": attention,
        "crucial_frames": sorted({f for i in right_ones for f in psi[i]}),
        "right": right_ones,
        "wrong": [i for i in range(8) if i not in right_ones],
        "psi": psi,
        "weights": weights,
        "key_frames": [key],
        "timestamps_s": [round(0.5 + i, 3) for i in range(FRAMES)],
    }


def make_evaluation(
    folder: Path,
    checkpoint: str,
    accuracy: float,
    *,
    benchmark: str = "key_moment",
    items: int = 128,
    seed: int = 0,
) -> Path:
    """One checkpoint's predictions and metrics. Questions have a difficulty of their own, shared by all."""
    difficulty = np.random.default_rng(7).random(items)
    noise = np.random.default_rng([seed, *map(ord, checkpoint)]).random(items)
    right = np.argsort(np.argsort(0.7 * difficulty + 0.3 * noise)) < round(accuracy * items)
    out = folder / checkpoint
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{benchmark}.jsonl").open("w") as file:
        for i in range(items):
            answer = "ABCD"[i % 4]
            parsed = answer if right[i] else "ABCD"[(i + 1) % 4]
            record = {
                "id": f"{benchmark}/test/{i:05d}",
                "answer": answer,
                "parsed": parsed,
                "score": float(right[i]),
                "completion": f"<think>cross shows red</think><answer>{parsed}</answer>",
                "truncated": False,
            }
            file.write(json.dumps(record) + "\n")
    metrics = {"generated": True, "accuracy": float(right.mean()), "n": items, "unparsed_rate": 0.0}
    (out / f"{benchmark}.metrics.json").write_text(json.dumps(metrics))
    return out


def make_comparison(
    folder: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    algorithms: Sequence[str] = ("grpo", "dapo", "appo"),
    **more: object,
) -> tuple[list[Path], Path]:
    """Trainings and evaluations of a whole comparison: (training folders, evaluation folder)."""
    evaluation = folder / "evaluation"
    runs = []
    for seed in seeds:
        for index, algorithm in enumerate(algorithms):
            runs.append(make_training(folder / "train", algorithm, seed, **more))  # type: ignore[arg-type]
            accuracy = 0.86 + 0.02 * index + 0.03 * (seed % 3)
            make_evaluation(evaluation, f"{algorithm}-seed{seed}", min(accuracy, 0.98), seed=seed)
    make_evaluation(evaluation, "warm_start", 0.55)
    return runs, evaluation
