"""Heavy imports leave the collector as it was, and what they load is not looked at any more."""

import contextlib
import gc
import subprocess
import sys

import pytest

from appo.startup import UNUSED_BY_TRAINING, heavy_imports


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_rests_inside_and_is_as_before_after_an_error_too(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with contextlib.suppress(ImportError), heavy_imports():
            assert not gc.isenabled()
            lasting = [[]]
            raise ImportError("vllm")
        assert gc.isenabled() == collects
        assert not any(found is lasting for found in gc.get_objects())  # frozen
    finally:
        (gc.enable if before else gc.disable)()


def test_hidden_packages_are_back_afterwards_and_loaded_ones_stay() -> None:
    code = """
import importlib.util, sys
import json
from appo.startup import heavy_imports
with heavy_imports(without=("yaml", "json")):
    assert importlib.util.find_spec("yaml") is None
    try:
        import yaml
    except ImportError:
        pass
    else:
        sys.exit("it was there")
    import json
import yaml
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_training_loads_nothing_that_it_does_not_use() -> None:
    code = f"""
import sys
from appo.startup import heavy_imports
with heavy_imports(without={UNUSED_BY_TRAINING!r}):
    import appo.training.trainer
    import appo.training.warm_start
    import appo.training.rewarding
print(sorted({{name.partition(".")[0] for name in sys.modules}} & set({UNUSED_BY_TRAINING!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
