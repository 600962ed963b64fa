"""A recipe of the key-moment set -> its manifest and the demo's untrained model, on machines without a video codec.

As `appo.data.assemble` leaves them, but that frames go into the shards as they were drawn and no mp4 is written or
decoded: av and decord do not travel, and nothing that is checked here looks at them. Samples, sampling, shards,
manifest, tokenizer, processor and model are the library's own.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

REPLACED = "videos: frames are drawn into shards, none is encoded as mp4 and decoded"


def write(recipe: Any, folder: Path, shape: Any = None) -> tuple[Path, Path]:
    """(manifest, model folder). shape: of the model (`TinyShape`), the demo's where None."""
    manifest = draw(recipe, folder / "data")
    return manifest, make_model(recipe, manifest, folder / "model", shape)


def draw(recipe: Any, folder: Path) -> Path:
    """The recipe's samples and frames below `folder`; returns the manifest."""
    from appo.data.manifest import relative_place, write_manifest
    from appo.data.shards import encode, settings_key, shard_bytes, shard_name
    from appo.data.synthetic import draw_key_moment

    data = recipe.data
    samples, rows = [], []
    for sample, frames in draw_key_moment(data.key_moment, seed=data.seed):
        key = hashlib.sha256(frames.tobytes()).hexdigest()  # stands for that of a file
        samples.append(replace(sample, video_sha256=key))
        seen = _sampled(sample.id, frames, recipe.video)
        rows.append(encode(key, seen, encoding=data.encoding, jpeg_quality=data.jpeg_quality))
    place = folder / "frames" / settings_key(recipe.video, data)
    place.mkdir(parents=True)
    (place / shard_name(rows)).write_bytes(shard_bytes(rows))
    manifest = write_manifest(
        folder / "manifest.jsonl",
        samples,
        name=recipe.name,
        source=data.source,
        root=".",
        frames=relative_place(place, folder),
        video=recipe.video.model_dump(mode="json"),
    )
    return manifest.path


def _sampled(name: str, frames: Any, video: Any) -> Any:
    """What decoding a file of these frames gives, but for the codec's rounding."""
    import numpy as np

    from appo.data.sampling import fit_size, sampled_fps
    from appo.data.synthetic import FPS
    from appo.data.video import VideoFrames, choose_part, resize

    total, height, width, _ = frames.shape
    indices, times, seconds = choose_part(name, np.arange(total) / FPS, total / FPS, video, None)
    size = fit_size(height, width, max_pixels=video.max_pixels, min_pixels=video.min_pixels)
    shown = np.stack([resize(frames[index], size) for index in indices])
    return VideoFrames(shown, times, indices, sampled_fps(times, seconds), seconds, total)


def make_model(recipe: Any, manifest: Path, folder: Path, shape: Any = None) -> Path:
    """An untrained model with a tokenizer of the manifest's questions, and the recipe's processor."""
    from appo.data.manifest import read_manifest
    from appo.data.messages import prompt_messages
    from appo.training import tiny

    samples = read_manifest(manifest).samples
    texts = [prompt_messages(s, "bare")[0]["content"][-1]["text"] for s in samples]
    tokenizer = tiny.make_tokenizer(texts)
    model = tiny.make_model(tokenizer, seed=0, shape=shape)
    tiny.save(model, tiny.make_processor(tokenizer, recipe.video), folder)
    return folder
