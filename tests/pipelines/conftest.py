"""Fixtures of the pipelines: the S3 server of the data room."""

from tests.data_room.conftest import s3, weed

__all__ = ["s3", "weed"]
