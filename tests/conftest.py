"""What holds for every test."""

import atexit
import gc
import os

import pytest

# Tests run two at a time on two cores. With two threads each, models this small mostly wait for one another: a warm
# start of 3 s took 37.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch, transformers, TRL and vLLM in one process: collecting their millions of lasting objects again and again takes
# a good part of the tests' time. What a file of tests leaves behind is collected once, and what stays is not looked at
# any more.
gc.disable()
atexit.register(gc.freeze)


@pytest.fixture(scope="module", autouse=True)
def collected_once():
    yield
    gc.collect()
    gc.freeze()


# The longest files start first, so that no worker is left alone with one of them at the end.
LONGEST = (
    "test_whole_pipeline",
    "test_retrain",
    "test_mlflow_server",
    "test_distributed",
    "test_vllm_rollouts",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
