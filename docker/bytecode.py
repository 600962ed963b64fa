"""Makes the bytecode below a folder hold whatever time stamps its sources get: `python docker/bytecode.py FOLDER`.

A reproducible image carries one time on every file. Ordinary bytecode names its source's time, so it would
be stale, and with a read-only root every process would compile torch, transformers and vLLM again.
"""

from __future__ import annotations

import py_compile
import sys
from importlib.util import source_from_cache
from pathlib import Path


def main(folder: str) -> None:
    for compiled in Path(folder).rglob("__pycache__/*.pyc"):
        source = source_from_cache(compiled)
        if Path(source).is_file():
            py_compile.compile(
                source,
                cfile=str(compiled),
                quiet=2,  # packages ship templates that are no Python; they were never compiled
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )


if __name__ == "__main__":
    main(sys.argv[1])
