"""Heavy imports without the garbage collector, which otherwise takes half of a training's start.

TRL's trainer brings 1.3 million objects that live as long as the process. The collector looks at all of them
again and again while they arrive, and once more when the process ends: 14 s from start to end of a process that
does nothing else, 7 s without (two cores of 2026).
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import inside; what was loaded is never looked at again, everything made later is collected as usual."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
    # At the end of the process its memory goes back as a whole; nothing of ours waits for a cycle to be collected.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
