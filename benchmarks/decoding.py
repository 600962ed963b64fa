"""Videos per second of assembly against a bare decord loop: same frames, same number of workers, one run.

python benchmarks/decoding.py [--videos FOLDER] [--workers 2] [--copies 120] [--rounds 2]

The bare loop opens each video, decodes the frames that the recipe asks for and drops them. Assembly also
hashes the file, scales, encodes as JPEG, writes shards and a journal. Rounds alternate, so that a busy
machine slows both. Without --videos, clips of 640 x 360 and 10 s are made. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import sys
import decord
from appo.config import Video
from appo.data.sampling import choose_frames
import numpy as np
print("ready", flush=True)
sys.stdin.readline()
for path in sys.argv[2:]:
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    total = len(reader)
    reader.get_batch(np.linspace(0, total - 1, int(sys.argv[1])).round().astype(int).tolist()).asnumpy()
"""


def make_clips(folder: Path, count: int) -> list[Path]:
    """Moving shapes over noise, 250 frames at 25 a second, H.264 as ordinary encoders write it."""
    import av
    import numpy as np

    rng, made = np.random.default_rng(0), []
    rows, columns = np.mgrid[:360, :640]
    noise = rng.integers(0, 40, (8, 360, 640, 3), dtype=np.uint8)
    for number in range(count):
        path = folder / f"clip{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            stream.options = {"crf": "23", "preset": "veryfast"}
            for index in range(250):
                disc = (rows - 180) ** 2 + (columns - (100 * number + 2 * index) % 640) ** 2 < 80**2
                pixels = noise[index % 8] + np.uint8(100)
                pixels[disc] = (220, 60 + number, 20)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        made.append(path)
    return made


def distinct_copies(videos: list[Path], folder: Path, count: int) -> list[Path]:
    """Equal content is decoded once, so each copy gets a `free` box of its own at the end."""
    copies = []
    for index in range(count):
        copy = folder / f"{index:04d}.mp4"
        shutil.copy(videos[index % len(videos)], copy)
        with copy.open("ab") as file:
            file.write((16).to_bytes(4, "big") + b"free" + index.to_bytes(8, "big"))
        copies.append(copy)
    return copies


def cpu_seconds() -> float:
    """CPU time of this process and of all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def bare_loop(videos: list[Path], workers: int, num_frames: int) -> float:
    """Seconds for `workers` processes to decode all, from the moment when all have imported decord."""
    shares = [videos[worker::workers] for worker in range(workers)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BARE, str(num_frames), *map(str, share)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for share in shares
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    start = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        if process.wait():
            raise RuntimeError("the bare loop failed")
    return time.perf_counter() - start


def assembly(videos: list[Path], workers: int, num_frames: int, out: Path) -> float:
    """Seconds for the decoding part of assembly, start of its workers included."""
    from appo.config import Data, Video
    from appo.data.decoding import VIDEO, Decoded, Item, decode_all
    from appo.data.media import MediaRoot

    outcomes = []
    start = time.perf_counter()
    decode_all(
        [Item(VIDEO, path.name) for path in videos],
        root=MediaRoot(videos[0].parent),
        video=Video(num_frames=num_frames),
        data=Data(workers=workers),
        place=str(out),
        journal=out / "journal.jsonl",
        done=lambda item, outcome: outcomes.append(outcome),
    )
    seconds = time.perf_counter() - start
    failed = [outcome for outcome in outcomes if not isinstance(outcome, Decoded)]
    if failed or len(outcomes) != len(videos):
        raise RuntimeError(f"assembly rejected {len(failed)} of {len(videos)}: {failed[:1]}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=Path, help="folder of mp4 files to use instead of made ones")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--copies", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "copies").mkdir()
        videos = sorted(arguments.videos.glob("*.mp4")) if arguments.videos else make_clips(folder, 6)
        copies = distinct_copies(videos, folder / "copies", arguments.copies)
        bare, ours, cpu = [], [], [0.0, 0.0]
        for number in range(arguments.rounds):
            before = cpu_seconds()
            bare.append(bare_loop(copies, arguments.workers, arguments.frames))
            between = cpu_seconds()
            out = folder / f"out{number}"
            ours.append(assembly(copies, arguments.workers, arguments.frames, out))
            cpu = [cpu[0] + between - before, cpu[1] + cpu_seconds() - between]
            stored = sum(path.stat().st_size for path in out.glob("*.parquet"))
    count = len(copies) * arguments.rounds
    result = {
        "videos": len(copies),
        "rounds": arguments.rounds,
        "workers": arguments.workers,
        "frames": arguments.frames,
        "bare_videos_per_second": round(count / sum(bare), 2),
        "assembly_videos_per_second": round(count / sum(ours), 2),
        "ratio": round(sum(bare) / sum(ours), 3),
        "ratio_each_round": [round(b / o, 3) for b, o in zip(bare, ours, strict=True)],
        # Start of the interpreters included on both sides; steadier than the clock where others work too.
        "ratio_of_cpu_time": round(cpu[0] / cpu[1], 3),
        "stored_kib_a_video": round(stored / len(copies) / 1024, 1),
        "hours_for_34000_videos": round(34000 * sum(ours) / count / 3600, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
