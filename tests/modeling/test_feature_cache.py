"""Laws of the feature cache: what comes back is what was computed, whole, of the same pixels and weights."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from appo.data.schema import VideoSample
from appo.modeling import feature_cache, features
from appo.modeling.feature_cache import Encoded, FeatureCache, packed, tower_revision, unpacked
from appo.modeling.feature_files import open_files
from appo.modeling.inputs import PromptInputs, Vision, stripped
from appo.storage import StorageError
from tests.modeling import models

MIB = 2**20


@pytest.fixture(scope="module")
def model():
    made = models.build("qwen2_5_vl")
    features.base_model(made).visual.requires_grad_(False)
    return made


def prompt(seed: int = 0, frames: int = 3, image: bool = False) -> PromptInputs:
    generator = torch.Generator().manual_seed(seed)
    patch = 3 * 2 * 14 * 14
    ids = torch.arange(4)
    return PromptInputs(
        sample=VideoSample("s", "t", "free-form", "q?", "a", video="v.mp4"),
        text="",
        ids=ids,
        token_types=ids * 0,
        frame_of_token=ids * 0 - 1,
        positions=ids.expand(3, -1),
        num_frames=frames,
        video=Vision(torch.randn(frames * 16, patch, generator=generator), torch.tensor([[frames, 4, 4]])),
        image=Vision(torch.randn(16, patch, generator=generator), torch.tensor([[1, 4, 4]]))
        if image
        else None,
        seconds_per_grid=torch.ones(1),
        timestamps_s=(),
    )


def cache_at(place, model, *, memory=64 * MIB, limit=64 * MIB) -> FeatureCache:
    files = None if place is None else open_files(str(place), limit)
    return FeatureCache(tower_revision(model), memory_bytes=memory, files=files)


def stored(place):
    return sorted(p for p in place.rglob("*") if p.is_file())


def test_a_hit_is_bit_equal_in_memory_and_from_disk(tmp_path, model):
    inputs = prompt(image=True)
    expected = torch.cat(features.encode(model, inputs.video.pixels, inputs.video.grid_thw))
    first = cache_at(tmp_path, model)
    computed = first.encode(inputs, model)
    assert torch.equal(computed.video.features, expected)
    assert torch.equal(first.encode(inputs, model).video.features, expected)
    assert (first.counts.computed, first.counts.memory, first.counts.stored) == (2, 2, 0)
    second = cache_at(tmp_path, model)  # as another process would
    again = second.encode(inputs, model)
    assert torch.equal(again.video.features, expected)
    assert torch.equal(again.image.features, computed.image.features)
    assert (second.counts.computed, second.counts.stored) == (0, 2)


def test_stripped_prompts_hold_no_numbers_and_come_back(tmp_path, model):
    cache = cache_at(None, model)
    whole = cache.encode(prompt(), model)
    small = stripped(whole)
    assert small.video.features is None
    assert small.video.pixels.untyped_storage().nbytes() == 0
    assert torch.equal(cache.restore(small).video.features, whole.video.features)
    cache._memory.clear()
    assert cache.restore(small) is None


def test_other_pixels_grids_and_weights_have_other_keys(model):
    cache, inputs = cache_at(None, model), prompt()
    keys = {cache.key("video", inputs.video), cache.key("image", inputs.video)}
    pixels = inputs.video.pixels.clone()
    pixels[0, 0] += 1e-6
    keys.add(cache.key("video", Vision(pixels, inputs.video.grid_thw)))
    keys.add(cache.key("video", Vision(inputs.video.pixels, torch.tensor([[6, 2, 4]]))))
    other = models.build("qwen2_5_vl")
    tower = features.base_model(other).visual.requires_grad_(False)
    assert tower_revision(other) == tower_revision(model)
    with torch.no_grad():
        next(iter(tower.parameters())).view(-1)[0] += 1e-3
    keys.add(cache_at(None, other).key("video", inputs.video))
    tower.half()
    keys.add(cache_at(None, other).key("video", inputs.video))
    assert len(keys) == 6


def test_other_settings_of_the_tower_have_other_keys_and_where_it_came_from_does_not_count(model):
    """Of equal weights: which blocks attend to the whole frame, and how, decides features as much as weights do."""
    known = tower_revision(model)
    found = {known}
    for name, value in (
        ("fullatt_block_indexes", [0]),
        ("window_size", 112),
        ("hidden_act", "gelu"),
        ("spatial_merge_size", 1),
        ("num_heads", 4),
    ):
        other = models.build("qwen2_5_vl")
        tower = features.base_model(other).visual.requires_grad_(False)
        assert getattr(tower.config, name) != value
        setattr(tower.config, name, value)
        found.add(tower_revision(other))
    assert len(found) == 6
    same = models.build("qwen2_5_vl")
    tower = features.base_model(same).visual.requires_grad_(False)
    tower.config._name_or_path = "/another/folder"
    tower.config._attn_implementation = "eager"
    tower.config.transformers_version = "5.0.0"
    assert tower_revision(same) == known


def test_a_tower_that_trains_is_refused():
    with pytest.raises(ValueError, match=r"freeze it \(model.freeze_vision\)"):
        tower_revision(models.build("qwen2_5_vl"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other key", "empty", "text"])
def test_damaged_entries_are_computed_again(tmp_path, model, damage):
    inputs = prompt()
    expected = cache_at(tmp_path, model).encode(inputs, model).video.features
    (path,) = stored(tmp_path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "flipped": data[:-1] + bytes([data[-1] ^ 1]),
            "other key": packed(Encoded(expected + 1), "0" * 64),
            "empty": b"",
            "text": b"not a tensor file, and longer than eight bytes",
        }[damage]
    )
    cache = cache_at(tmp_path, model)
    assert torch.equal(cache.encode(inputs, model).video.features, expected)
    assert (cache.counts.corrupt, cache.counts.computed) == (1, 1)
    assert path.read_bytes() == data  # healed


def test_packing_keeps_every_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.randn(5, 7).to(dtype)
        numbers[0, :3] = torch.tensor([float("inf"), float("nan"), -0.0])
        facts = {"grid_thw": [[3, 4, 4]], "timestamps_s": [0.1, 1 / 3, 1e-17]}
        entry = unpacked(packed(Encoded(numbers, facts), "k"), "k")
        found = entry.features
        assert entry.facts == facts
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), numbers.view(torch.uint8))


def test_disk_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path, model):
    with_facts = Encoded(
        cache_at(None, model).encode(prompt(), model).video.features, {"grid_thw": [[3, 4, 4]]}
    )
    size = len(packed(with_facts, "k" * 64))
    limit = int(size * 6.5)
    cache = cache_at(tmp_path, model, limit=limit, memory=1)
    for seed in range(12):
        cache.encode(prompt(seed), model)
        time.sleep(0.01)  # more than a tick of the file system's clock
        cache.encode(prompt(0), model)  # used in every round, so it must survive
        assert sum(p.stat().st_size for p in stored(tmp_path)) <= limit
    counts = cache.counts.computed
    cache.encode(prompt(0), model)
    assert cache.counts.computed == counts
    assert counts == 12


def test_memory_stays_within_its_bound(model):
    one = cache_at(None, model).encode(prompt(), model).video.features.nbytes
    cache = cache_at(None, model, memory=3 * one)
    for seed in range(5):
        cache.encode(prompt(seed), model)
    assert cache._memory_bytes == 3 * one == sum(e.features.nbytes for e in cache._memory.values())
    cache.encode(prompt(4), model)
    assert cache.counts.memory == 1
    cache.encode(prompt(0), model)
    assert cache.counts.computed == 6


def _encode_repeatedly(place: str, barrier, results) -> None:
    torch.set_num_threads(1)
    made = models.build("qwen2_5_vl")
    features.base_model(made).visual.requires_grad_(False)
    found = []
    barrier.wait()
    for seed in range(8):
        found.append(cache_at(place, made, memory=1).encode(prompt(seed), made).video.features.sum().item())
    results.put(found)


def test_two_processes_write_the_same_keys(tmp_path, model):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_encode_repeatedly, args=(str(tmp_path), barrier, results)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    seen = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert seen[0] == seen[1]
    assert len(stored(tmp_path)) == 8
    cache = cache_at(tmp_path, model)
    for seed in range(8):
        cache.encode(prompt(seed), model)
    assert (cache.counts.computed, cache.counts.corrupt) == (0, 0)


WRITER = """
import sys, os
from appo.modeling.feature_files import open_files
files = open_files(sys.argv[1], 2**40)
blob = os.urandom(1 << 20)
number = 0
print("writing", flush=True)
while True:
    files.put(f"{number:064x}", blob)
    number += 1
"""


def test_a_writer_killed_in_mid_write_leaves_no_half_entry(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    entries = [p for p in stored(tmp_path) if p.suffix == ".safetensors"]
    assert entries
    assert {p.stat().st_size for p in entries} == {1 << 20}
    # What a kill may leave behind has another name, is never read, and goes when it is old.
    left = tmp_path / "00" / ".x.safetensors.abc.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    open_files(str(tmp_path), 2 << 20).put("f" * 64, b"x" * (1 << 20))
    assert not left.exists()
    assert sum(p.stat().st_size for p in stored(tmp_path) if p.suffix == ".safetensors") <= 2 << 20


def test_a_full_disk_costs_a_warning_and_no_training(tmp_path, model, monkeypatch):
    cache = cache_at(tmp_path, model)

    def full(*_):
        raise StorageError("/somewhere: cannot be written: No space left on device")

    monkeypatch.setattr(cache._files, "put", full)
    with pytest.warns(UserWarning, match="No space left on device; going on in memory only"):
        found = cache.encode(prompt(), model)
    assert found.video.features is not None
    assert torch.equal(cache.encode(prompt(), model).video.features, found.video.features)


def test_an_unusable_folder_is_refused_at_start(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"feature_cache_dir=.*name another"):
        open_files(str(tmp_path / "file" / "cache"), MIB)


def test_the_start_up_line_says_what_is_kept_and_why_not():
    from appo.config import load_recipe

    recipe = load_recipe("demo", ["training.feature_cache_dir=/somewhere"])
    assert feature_cache.describe(recipe) == "vision features computed once, kept in memory and /somewhere"
    assert "the tower trains" in feature_cache.describe(load_recipe("demo", ["model.freeze_vision=false"]))
    assert "training.feature_cache)" in feature_cache.describe(
        load_recipe("demo", ["training.feature_cache=false"])
    )
