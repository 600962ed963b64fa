"""The trainers' small set and model."""

from tests.training.conftest import bench, small_set

__all__ = ["bench", "small_set"]
