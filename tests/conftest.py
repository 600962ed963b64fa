"""What holds for every test."""

import atexit
import gc
import inspect
import os

import pytest

from appo.startup import leave_out

# Tests run two at a time on two cores. With two threads each, models this small mostly wait for one another: a warm
# start of 3 s took 37.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch, transformers, TRL and vLLM in one process: collecting their millions of lasting objects again and again takes
# a good part of the tests' time. What a file of tests leaves behind is collected once, and what stays is not looked at
# any more.
gc.disable()
atexit.register(gc.freeze)


# kfp asks for the whole call stack, with source lines, to name one caller; where torch and vLLM are loaded every line
# costs a walk over thousands of modules: 5 s a compiled graph, 0.6 s without lines.
inspect.stack.__defaults__ = (0,)

# As trainings without ZeRO do; those with it are processes of their own.
leave_out("deepspeed")


@pytest.fixture(scope="module", autouse=True)
def collected_once():
    yield
    gc.collect()
    gc.freeze()


# Files that run processes of their own or compile graphs come first: compiling asks every loaded module for its sources,
# six times as slow once torch and transformers are loaded. Then the long ones, so that no worker is left alone with
# one of them at the end.
ORDER = (
    *("test_matrix", "test_as_shipped"),  # a quarter of an hour each, where long tests run
    *("test_whole_pipeline", "test_retrain", "test_cluster", "test_compile", "test_local", "test_parameters"),
    *("test_checks", "test_table"),
    *("test_mlflow_server", "test_tracker", "test_bad_days", "test_closing"),
    *(
        "test_distributed",
        "test_interrupted",
        "test_laws",
        "test_vllm_rollouts",
        "test_local_trainjob",
        "test_explain",
    ),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))
