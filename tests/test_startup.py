"""Heavy imports leave the collector as it was, and what they load is not looked at any more."""

import contextlib
import gc

import pytest

from appo.startup import heavy_imports


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
