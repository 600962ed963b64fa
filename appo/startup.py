"""Heavy imports without the garbage collector, which otherwise takes half of a training's start, and without what
nothing here uses.

TRL's trainer brings 1.3 million objects that live as long as the process. The collector looks at all of them again and
again while they arrive, and once more when the process ends: 14 s from start to end of a process that does nothing
else, 7 s without (two cores of 2026). Of the rest, vLLM, MLflow and scikit-learn take 4 s, for functions of TRL and
transformers that no training of ours calls.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Packages that TRL and transformers load where they find them: TRL's own engine, the Trainer's reports, metrics of
# assisted decoding. Whoever needs one of them imports it himself, afterwards.
UNUSED_BY_TRAINING = ("vllm", "mlflow", "wandb", "trackio", "sklearn", "scipy", "trio")


@contextmanager
def heavy_imports(*, without: tuple[str, ...] = ()) -> Iterator[None]:
    """Import inside; what was loaded is never looked at again, everything made later is collected as usual.

    without: packages that are not there for what is imported inside, unless they are loaded already.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with _hidden(without):
            yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
    # At the end of the process its memory goes back as a whole; nothing of ours waits for a cycle to be collected.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


@contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    names = leave_out(*packages)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def leave_out(*packages: str) -> list[str]:
    """From now on these packages cannot be imported here, and are looked for in vain; those that are loaded stay.

    For packages that others load in many places, whenever they find them. Returns the names that were left out.
    """
    names = [name for name in packages if name not in sys.modules]
    # None is Python's own mark of a module that cannot be imported; `find_spec` knows it too.
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    return names
