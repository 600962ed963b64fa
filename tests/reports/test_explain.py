"""`explain` on a real (untrained, tiny) Qwen2.5-VL and real videos, and its sentences on groups made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from appo.config import load_recipe
from appo.reports.explain import completion_table, explain, findings
from appo.reports.results import ReportError
from tests.reports.made_runs import make_group
from tests.tiers import long

OVERRIDES = ("data.key_moment.train=8", "data.key_moment.validation=2", "data.key_moment.test=2")


def group_with(right: list[int], psi: list[list[int]]) -> dict:
    made = make_group(np.random.default_rng(0), "s", algorithm="appo", seed=0, step=0)
    made |= {"right": right, "wrong": [i for i in range(8) if i not in right], "psi": psi, "key_frames": [2]}
    return made | {"crucial_frames": sorted({f for i in right for f in psi[i]})}


def test_it_says_when_attention_tells_nothing() -> None:
    said = " ".join(findings(group_with([0, 1], [[2]] * 8), load_recipe("demo")))
    assert "100% of these frames are shared, so attention does not tell right from wrong" in said
    assert "found among the crucial frames" in said


def test_it_says_when_nothing_is_right_or_everything() -> None:
    recipe = load_recipe("demo")
    assert "S1 is empty, so no frame is crucial" in " ".join(findings(group_with([], [[2]] * 8), recipe))
    assert "all advantages are 0" in " ".join(findings(group_with(list(range(8)), [[2]] * 8), recipe))
    missed = " ".join(findings(group_with([0], [[5]] + [[2]] * 7), recipe))
    assert "[2]: not found among the crucial frames" in missed
    assert "0% of these frames are shared" in missed


def test_table_counts_weighted_tokens() -> None:
    made = group_with([0], [[5]] * 8)
    made["weights"][0] = [1.0, 1.7, 1.2, *[1.0] * 6]
    row = completion_table(made).rows[0]
    assert row[:2] == ("0", "S1 right")
    assert row[-2:] == ("2 of 9", "1.70")


@long
@pytest.mark.slow
def test_a_checkpoint_and_a_sample_become_a_page(tmp_path: Path) -> None:
    from appo.data.assemble import assemble
    from appo.data.manifest import read_manifest
    from appo.data.messages import prompt_messages
    from appo.training import tiny

    recipe = load_recipe("demo", list(OVERRIDES))
    manifest_path = assemble(recipe, tmp_path / "data", progress=False).manifest
    manifest = read_manifest(manifest_path)
    texts = [prompt_messages(s, "bare")[0]["content"][-1]["text"] for s in manifest.samples]
    tokenizer = tiny.make_tokenizer(texts)
    tiny.save(
        tiny.make_model(tokenizer, seed=0), tiny.make_processor(tokenizer, recipe.video), tmp_path / "model"
    )
    sample = manifest.split("validation")[0]
    arguments = {"recipe": recipe, "manifest_path": manifest_path}
    made = explain(str(tmp_path / "model"), sample.id, out=tmp_path / "one", **arguments)  # type: ignore[arg-type]
    group = json.loads(made.group.read_text())
    assert len(group["completions"]) == recipe.policy.num_generations
    assert np.array(group["attention"]).shape[2] == recipe.video.num_frames // 2  # type: ignore[operator]
    assert {*group["right"], *group["wrong"]} == set(range(8))
    page = made.html.read_text()
    assert page.count("data:image/png;base64,") == 8 * 8  # pictures along each of eight maps
    assert sample.question in page
    again = explain(str(tmp_path / "model"), sample.id, out=tmp_path / "two", **arguments)  # type: ignore[arg-type]
    assert again.group.read_bytes() == made.group.read_bytes()
    with pytest.raises(ReportError, match=r"is not in .*manifest.jsonl; its samples are such as key_moment/"):
        explain(str(tmp_path / "model"), "nobody", out=tmp_path / "three", **arguments)  # type: ignore[arg-type]
