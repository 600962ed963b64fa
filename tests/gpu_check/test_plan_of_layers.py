"""How much of the 3B shape a GPU would be given, which a CPU can count."""

from __future__ import annotations

import pytest

from benchmarks.gpu_check.step import layers_that_fit, planned_bytes
from benchmarks.shapes import SHAPES

GIB = 2**30


def test_as_many_layers_as_are_planned_to_fit() -> None:
    shape = SHAPES["3b"]
    assert layers_that_fit(shape, 119 * GIB) == shape.layers
    few = layers_that_fit(shape, planned_bytes(shape, 7))
    assert few == 7
    assert planned_bytes(shape, 8) > planned_bytes(shape, 7)
    with pytest.raises(RuntimeError, match="one layer of the 3B shape needs"):
        layers_that_fit(shape, GIB)
