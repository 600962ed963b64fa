"""Recipes for the tests of this room, written as people write them: a YAML file with overrides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo.config import Recipe, load_recipe


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    """Small videos, two workers, lossless frames, a JSONL source; `overrides` are `key=value`."""
    path = folder / "recipe.yaml"
    path.write_text(
        "name: test\n"
        "data: {source: jsonl, encoding: png, workers: 2, max_reject_rate: 1.0}\n"
        "video: {num_frames: 4, max_pixels: 3136}\n"
        "perception: {k2: 1}\n"
        "model: {path: none}\n"
    )
    return load_recipe(str(path), list(overrides))


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def question(video: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": video,
        "video": video,
        "question": "Which?",
        "options": ["a", "b"],
        "answer": "A",
        **changes,
    }
