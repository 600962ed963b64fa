"""How fast each phase of a step was, and how near the device came to its peak: medians of `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from appo.reports.analysis import Analysis, Method
from appo.reports.statistics import SeedSummary, summarise
from appo.reports.tables import Table, with_spread

STEPS_TO_WARM_UP = 2  # first calls allocate and choose kernels
PHASES = ("rollout", "scoring", "attention", "weights", "update")


def over_seeds(method: Method, name: str) -> SeedSummary | None:
    """A metric's median over the steps of each training, over seeds; None where no step has it."""
    return summarise([_median(t.steps[STEPS_TO_WARM_UP:], name) for t in method.trainings])


def phase_table(analysis: Analysis) -> Table | None:
    """One row a method and phase; None for runs that counted nothing."""
    rows = []
    for method in analysis.methods:
        for phase in ("", *PHASES):
            end = f"/{phase}" if phase else ""
            seconds = over_seeds(method, f"phase/{phase}_s" if phase else "step_s")
            reached = over_seeds(method, f"mfu{end}")
            if seconds is None or (reached is None and not phase):
                continue
            rows.append(
                (
                    method.name,
                    phase or "whole step",
                    with_spread(seconds, digits=3),
                    with_spread(over_seeds(method, f"samples_per_second{end}"), digits=2),
                    with_spread(over_seeds(method, f"tokens_per_second_per_device{end}"), digits=0),
                    with_spread(reached, scale=100),
                )
            )
    if not rows:
        return None
    return Table(
        key="phases",
        title="Speed by phase",
        columns=("method", "phase", "seconds", "samples/s", "tokens/s per device", "MFU, percent"),
        rows=tuple(rows),
        notes=(
            "Medians over steps, the first two left out. Tokens are of completions. MFU: counted operations over what "
            "the device could have done in that time; what gradient checkpointing computes again does not count.",
        ),
    )


def _median(steps: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [float(value) for s in steps if isinstance(value := s.get(name), int | float)]
    return median(values) if values else None
