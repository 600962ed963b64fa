"""Visual features in a bucket: shared between processes and bounded, on a real S3 server."""

from __future__ import annotations

import time

import pytest
import torch

from appo import objectstore
from appo.modeling import features
from appo.modeling.feature_cache import Encoded, packed
from tests.modeling import models
from tests.modeling.test_feature_cache import cache_at, prompt

pytestmark = pytest.mark.slow


def test_the_bucket_is_shared_and_holds_its_bound(s3):
    objectstore.client().create_bucket(Bucket="features")
    place = "s3://features/towers/of a run"
    model = models.build("qwen2_5_vl")
    features.base_model(model).visual.requires_grad_(False)
    expected = cache_at(place, model).encode(prompt(), model).video.features
    second = cache_at(place, model)
    assert torch.equal(second.encode(prompt(), model).video.features, expected)
    assert (second.counts.computed, second.counts.stored) == (0, 1)

    bound = int(3.5 * len(packed(Encoded(expected, {"grid_thw": [[3, 4, 4]]}), "k" * 64)))
    small = cache_at(place, model, limit=bound)
    for seed in range(1, 6):
        if seed == 5:
            time.sleep(1.1)  # S3 tells whole seconds only: what is written in one has no order
        small.encode(prompt(seed), model)
    kept = objectstore.client().list_objects_v2(Bucket="features")["Contents"]
    assert small.counts.computed == 5
    assert sum(item["Size"] for item in kept) <= bound
    # What was written last is there, whole, for the next process.
    third = cache_at(place, model)
    third.encode(prompt(5), model)
    assert (third.counts.computed, third.counts.corrupt) == (0, 0)


def test_a_damaged_object_is_computed_again(s3):
    objectstore.client().create_bucket(Bucket="damaged")
    model = models.build("qwen2_5_vl")
    features.base_model(model).visual.requires_grad_(False)
    expected = cache_at("s3://damaged", model).encode(prompt(), model).video.features
    (item,) = objectstore.client().list_objects_v2(Bucket="damaged")["Contents"]
    objectstore.put_bytes(f"s3://damaged/{item['Key']}", b"half of a file")
    cache = cache_at("s3://damaged", model)
    assert torch.equal(cache.encode(prompt(), model).video.features, expected)
    assert (cache.counts.corrupt, cache.counts.computed) == (1, 1)
