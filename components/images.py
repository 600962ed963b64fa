"""Which image each step runs in. One place; `appo pipeline compile --images --tag` sets it for a cluster.

The names hold "python" because the local runner takes that as a sign that it may run the step without the
image.
"""

from __future__ import annotations

import os
from importlib.metadata import version

PREFIX = os.environ.get("APPO_IMAGES", "appo")
TAG = os.environ.get("APPO_IMAGE_TAG", version("appo"))


def image(kind: str) -> str:
    """`data`, `train` or `eval` -> the full name of the image."""
    return f"{PREFIX}/{kind}-python3.11:{TAG}"
