"""Peak memory of assembly for few and for many samples.

python benchmarks/decoding_memory.py [--sizes 1000 20000]

Each size runs in a process of its own over tiny distinct videos, each with one question. Prints one JSON
object a size: peak resident memory of the parent and of its largest worker, and the rate.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make_videos(folder: Path, count: int) -> Path:
    """`count` distinct 56 x 56 videos and their questions; the folder's annotations file."""
    import av
    import numpy as np

    rng, bases = np.random.default_rng(0), []
    for number in range(8):
        path = folder / f"base{number}.bin"
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
            for _ in range(16):
                pixels = rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        bases.append(path.read_bytes())
    annotations = folder / "questions.jsonl"
    with annotations.open("w") as lines:
        for index in range(count):
            free = (16).to_bytes(4, "big") + b"free" + index.to_bytes(8, "big")
            (folder / f"{index}.mp4").write_bytes(bases[index % 8] + free)
            options = ["the person opens the door", "the person closes the door", "nobody moves", "it rains"]
            record = {
                "video": f"{index}.mp4",
                "question": f"What happens in clip {index}?",
                "options": options,
            }
            lines.write(json.dumps({"id": str(index), "answer": "A", **record}) + "\n")
    return annotations


def measure(folder: Path) -> None:
    """Assemble what lies in `folder` and print the peaks; runs in its own process."""
    from appo.config import load_recipe
    from appo.data.assemble import assemble

    recipe = load_recipe(str(folder / "recipe.yaml"), [f"data.annotations={folder / 'questions.jsonl'}"])
    start = time.perf_counter()
    done = assemble(recipe, folder / "out", progress=False)
    seconds = time.perf_counter() - start
    samples = sum(done.counts["split"].values())
    result = {
        "samples": samples,
        "peak_parent_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "peak_largest_worker_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
        "videos_per_second": round(samples / seconds, 1),
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 20000])
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder)
        return
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            make_videos(Path(name), size)
            (Path(name) / "recipe.yaml").write_text(
                "name: memory\ndata: {source: jsonl, workers: 2}\nvideo: {num_frames: 16, max_pixels: 3136}\n"
                "model: {path: none}\n"
            )
            subprocess.run([sys.executable, __file__, "--in", name], check=True)


if __name__ == "__main__":
    main()
