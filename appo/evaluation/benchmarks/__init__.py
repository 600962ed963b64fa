"""Names of benchmarks -> the classes that read and score them. A new one is one file here and one line
below.
"""

from __future__ import annotations

import re
from importlib import import_module

from appo.evaluation.benchmarks.base import AnnotationError, Benchmark, BenchmarkError, ItemScore

__all__ = ["BENCHMARKS", "AnnotationError", "Benchmark", "BenchmarkError", "ItemScore", "benchmark_class"]

BENCHMARKS = {
    "key_moment": ("manifest_split", "KeyMoment"),
    "mvbench": ("mvbench", "MVBench"),
    "nextgqa": ("nextgqa", "NExTGQA"),
    "nextqa": ("nextqa", "NExTQA"),
    "perception_test": ("perception_test", "PerceptionTest"),
    "seed_bench_r1": ("seed_bench_r1", "SEEDBenchR1"),
    "vsi_bench": ("vsi_bench", "VSIBench"),
}


def benchmark_class(name: str) -> type[Benchmark]:
    """The benchmark of that name; `NExT-GQA` and `next_gqa` also find `nextgqa`. Raises BenchmarkError."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for known, (module, attribute) in BENCHMARKS.items():
        if known.replace("_", "") == plain:
            found: type[Benchmark] = getattr(import_module(f"{__name__}.{module}"), attribute)
            return found
    raise BenchmarkError(f"benchmark {name!r}: unknown; known are {', '.join(BENCHMARKS)}")
