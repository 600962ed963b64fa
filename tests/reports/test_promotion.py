"""Three retrainings, as a schedule would run them: the first promotes, the second does nothing, the third
decides.

The evaluations are generated; the rule, the files and the registry are real.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appo.cli import app
from appo.config import load_recipe
from appo.reports.promotion import gate, promote
from appo.reports.results import ReportError
from appo.tracking.champion import open_registry
from tests.reports.made_runs import make_evaluation


def test_three_retrainings(tmp_path: Path) -> None:
    recipe, run_dir = load_recipe("demo"), tmp_path / "run"
    checkpoints = {f"appo-seed{s}": f"s3://bucket/first/appo-seed{s}" for s in (0, 1, 2)}
    for name, accuracy in zip(checkpoints, (0.80, 0.83, 0.89), strict=True):
        make_evaluation(tmp_path / "first", name, accuracy)

    opened = gate(recipe, run_dir, "digest-one")
    assert (opened.train, opened.champion) == (True, None)
    decision = promote(
        recipe,
        run_dir,
        algorithm="appo",
        checkpoints=checkpoints,
        evaluations=tmp_path / "first",
        manifest_digest="digest-one",
        out=tmp_path / "out1",
    )
    assert decision.promote
    registry = open_registry(recipe, run_dir)
    champion = registry.champion()
    assert champion is not None
    assert champion.uri == checkpoints["appo-seed1"]  # nearest to the mean, not the luckiest

    again = gate(recipe, run_dir, "digest-one")
    assert not again.train
    assert "nothing to do" in again.reason

    assert gate(recipe, run_dir, "digest-two").train
    third = {name: uri.replace("first", "third") for name, uri in checkpoints.items()}
    for name, accuracy in zip(third, (0.84, 0.86, 0.85), strict=True):
        make_evaluation(tmp_path / "third", name, accuracy)
    arguments = {
        "algorithm": "appo",
        "checkpoints": third,
        "evaluations": tmp_path / "third",
        "manifest_digest": "digest-two",
        "out": tmp_path / "out3",
    }
    with pytest.raises(ReportError, match=r"champion version 1 .* was not evaluated"):
        promote(recipe, run_dir, **arguments)
    make_evaluation(tmp_path / "third", "champion", 0.84)
    kept = promote(recipe, run_dir, **arguments)
    assert not kept.promote  # .01 above, within the noise of the seeds
    assert registry.champion().uri == champion.uri  # type: ignore[union-attr]
    make_evaluation(tmp_path / "third", "champion", 0.70)
    assert promote(recipe, run_dir, **arguments).promote
    assert registry.champion().uri == third["appo-seed2"]  # type: ignore[union-attr]
    assert registry.previous().uri == champion.uri  # type: ignore[union-attr]

    registry.roll_back("worse in use")
    after = gate(recipe, run_dir, "digest-two")
    assert not after.train  # else the schedule would undo what somebody decided
    assert "version 2 was trained on this data" in after.reason
    assert "worse in use" in after.reason
    assert gate(recipe, run_dir, "digest-three").train
    registry.roll_back()  # and back again

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["champion", *words, "-r", "demo", "-f", str(run_dir)])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    assert "champion version 2 score" in said("show")
    assert "champion: version 1" in said("rollback", "--reason", "worse in use")
    shown = said("show")
    assert "champion version 1 score" in shown
    assert "left for version 1: worse in use" in shown
    assert "champion: version 2" in said("rollback")
    assert "what champion version 2" in gate(recipe, run_dir, "digest-two").reason

    written = json.loads((tmp_path / "out3" / "decision.json").read_text())
    assert written["promote"] is True
    assert written["reason"] == registry.champion().tags["appo.decision"]  # type: ignore[union-attr]
