"""The command behind `make gpu-check`: every check, one table, one JSON file, status 1 where a row fails."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_check import needs, rows
from benchmarks.gpu_check.rows import Row


def checks(device: str) -> dict[str, Callable[[], Iterator[Row]]]:
    """Name -> its rows, in their order: short ones first."""
    from benchmarks.gpu_check import kernels, matrix, sizes

    return {
        "probe": lambda: kernels.probe_rows(device),
        "packed": lambda: kernels.packed_rows(device),
        "memory": lambda: sizes.memory_rows(device),
        "step": lambda: sizes.step_rows(device),
        "matrix": lambda: matrix.rows(device),
    }


NAMES = ("probe", "packed", "memory", "step", "matrix")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="every row on small shapes, without a GPU")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, default=needs.ROOT / "build" / "gpu-check.json")
    args = parser.parse_args(argv)
    taken = needs.reach_carried()
    needs.unpack_sets()
    if lacking := needs.missing():
        print("\n".join(f"error: {line}" for line in lacking), file=sys.stderr)
        return 2
    import torch

    if not args.cpu and not torch.cuda.is_available():
        print(
            "error: no GPU here (torch.cuda.is_available() is false); run it on one, or with ARGS=--cpu",
            file=sys.stderr,
        )
        return 2
    device = "cpu" if args.cpu else "cuda"
    began = time.perf_counter()
    about = machine(device) | {"carried": taken}
    print(", ".join(f"{name} {value}" for name, value in about.items() if value), flush=True)
    found: list[Row] = []
    for name, check in checks(device).items():
        if name in args.only:
            found += rows.run(name, check, lambda text: print(text, flush=True))
    seconds = time.perf_counter() - began
    failed = [row for row in found if not row.passed]
    print(
        f"\n{rows.table(found)}\n\n{len(found) - len(failed)} of {len(found)} rows passed in {seconds:.0f} s"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "seconds": round(seconds, 1), "passed": not failed}
    record["rows"] = [row.as_json() for row in found]
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")
    return 1 if failed else 0


def machine(device: str) -> dict[str, object]:
    import accelerate
    import peft
    import torch
    import transformers
    import trl

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": sys.version.split()[0],
        **{module.__name__: module.__version__ for module in (torch, transformers, trl, accelerate, peft)},
    }


if __name__ == "__main__":
    sys.exit(main())
