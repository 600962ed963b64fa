"""Runs of one checkpoint with several seeds -> mean and deviation of every metric, agreement on every item.

    {checkpoint}/{benchmark}.metrics.json    the means; `{metric}/std` beside them, `agreement`, `seeds`
    {checkpoint}/{benchmark}.seeds.jsonl     per item: what each seed answered
    seeds.md                                 the deviations in the layout of the paper's Table E

The paper's Table E is `accuracy/std` by benchmark. With top-k 1, as the paper decodes, seeds can differ only where
arithmetic does (other batches, other kernels): the deviation of training seeds is a different thing, and is the
business of the comparison report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from appo.evaluation.benchmarks import Benchmark
from appo.storage import write_atomic

_LEVEL = re.compile(r"official/level/[^/]+/accuracy")


def gather_seeds(folder: Path, benchmark: Benchmark, seeds: int) -> dict[str, float]:
    """Read `seeds/{0..seeds-1}` below a checkpoint's folder; write and return the flat metrics over them."""
    places = [folder / "seeds" / str(seed) for seed in range(seeds)]
    runs = [
        json.loads((place / f"{benchmark.name}.metrics.json").read_text(encoding="utf-8")) for place in places
    ]
    records = [_records(place / f"{benchmark.name}.jsonl") for place in places]
    metrics = over_seeds(runs)
    lines, agreeing = [], 0
    for item in benchmark.items:
        said = [by_id[item.id] for by_id in records]
        agree = len({(one["parsed"], one["score"]) for one in said}) == 1
        agreeing += agree
        lines.append(
            {
                "id": item.id,
                "answer": item.answer,
                "parsed": [one["parsed"] for one in said],
                "scores": [one["score"] for one in said],
                "agree": agree,
            }
        )
    metrics |= {"agreement": agreeing / len(benchmark.items), "seeds": seeds}
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(folder / f"{benchmark.name}.seeds.jsonl", text)
    write_atomic(folder / f"{benchmark.name}.metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric, and its deviation (n - 1) under `{metric}/std` where there is more than one run."""
    found: dict[str, float] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        found[name] = values[0] if name == "items" else fmean(values)
        if len(values) > 1 and name != "items":
            found[f"{name}/std"] = stdev(values)
    return found


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Name -> benchmark -> metrics over seeds, as Markdown: a checkpoint a row, a benchmark a column (of SEED-Bench-R1
    a level a column), mean and deviation in per cent."""
    first = next(iter(results.values()))
    columns = [
        (benchmark, metric)
        for benchmark, metrics in first.items()
        for metric in sorted(m for m in metrics if _LEVEL.fullmatch(m)) or ["accuracy"]
    ]
    heads = [
        benchmark if metric == "accuracy" else f"{benchmark} {metric.split('/')[2]}"
        for benchmark, metric in columns
    ]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, benchmarks in results.items():
        cells = [
            f"{100 * benchmarks[benchmark][metric]:.1f} ± {100 * benchmarks[benchmark][f'{metric}/std']:.3f}"
            for benchmark, metric in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _records(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")[1:-1]
    return {record["id"]: record for record in map(json.loads, lines)}
