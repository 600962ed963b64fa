"""One part's rows in a process of their own: `python -m benchmarks.gpu_check.worker MODULE PLACE RESULTS NAME...`.

PLACE: JSON, see `parts.Place`. RESULTS: a file that grows by one line of JSON for each row that begins or ends; the
process that started this one reads it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.gpu_check.parts import Place
from benchmarks.gpu_check.rows import Row


def main(module: str, place: str, results: str, names: list[str]) -> None:
    here = Place(**json.loads(place))
    here.path.mkdir(parents=True, exist_ok=True)
    lock = Lock()  # rows may end in several threads

    def say(line: dict[str, Any]) -> None:
        with lock, Path(results).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def began(name: str) -> None:
        say({"began": name})

    def done(row: Row) -> None:
        say({"row": row.to_json()})

    if here.gpu:
        exact_products()
    importlib.import_module(module).run(names, here, began, done)


def exact_products() -> None:
    """float32 is float32 here, and of SDPA's kernels those of FlashAttention come before cuDNN's."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)


if __name__ == "__main__":
    sys.stdout.flush()
    main(*sys.argv[1:4], sys.argv[4:])
    sys.stdout.flush()
    # No interpreter's end: libraries' threads have kept processes from ending that were done.
    os._exit(0)
