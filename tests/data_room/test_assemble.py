"""Whole assemblies of real clips: what is kept, what is rejected, and that nothing depends on chance or on
kills.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from appo import steps
from appo.config import Recipe
from appo.data.assemble import Assembled, DataQualityError, assemble
from appo.data.frames import open_frames
from appo.data.manifest import ManifestError, read_manifest
from appo.data.shards import decode, row_from, shard_paths, shard_schema
from appo.data.subset import QuotaError
from appo.data.video import decode_video
from tests.data_room.clips import write_clip, write_sound
from tests.data_room.recipes import question, recipe_of, write_jsonl


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of different contents; one of them under two names."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(23):
        write_clip(folder / f"v{index:02d}.mp4", seed=index, num_frames=6 + index)
    shutil.copy(folder / "v00.mp4", folder / "v23.mp4")
    return folder


@pytest.fixture
def annotations(clips: Path, tmp_path: Path) -> Path:
    records = [question(f"v{index:02d}.mp4", id=f"q{index}") for index in range(24)]
    records.append(question("v05.mp4", id="again", question="And this one?"))
    return write_jsonl(tmp_path / "questions.jsonl", records)


def run(recipe: Recipe, out: Path) -> Assembled:
    return assemble(recipe, out, progress=False)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the journal, which says when what was done."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "journal.jsonl"
    }


def rejects_of(path: Path) -> dict[str, str]:
    return {r["id"]: r["reason"] for r in map(json.loads, path.read_text().splitlines())}


def settings(annotations: Path, clips: Path, *more: str) -> list[str]:
    return [f"data.annotations={annotations}", f"data.root={clips}", *more]


def test_shards_hold_the_frames_of_direct_decoding(annotations: Path, clips: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *settings(annotations, clips))
    manifest = read_manifest(run(recipe, tmp_path / "out").manifest)
    assert len(manifest.samples) == 25
    frames = open_frames(manifest, recipe)
    for sample in manifest.samples:
        stored, direct = frames.load(sample), decode_video(manifest.locate(sample), recipe.video)
        np.testing.assert_array_equal(stored.frames, direct.frames)
        np.testing.assert_array_equal(stored.timestamps_s, direct.timestamps_s)
        assert stored.frame_indices == direct.frame_indices
        assert (stored.fps, stored.duration_s, stored.total_frames) == (
            direct.fps, direct.duration_s, direct.total_frames,
        )  # fmt: skip
    # Equal content is stored once: 24 names, 23 contents.
    rows = sum(len(_keys(shard)) for shard in shard_paths(Path(manifest.frames or "")))
    assert rows == 23


def _keys(shard: Path) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(shard, columns=["key"])["key"].to_pylist()


def test_jpeg_shards_are_close(annotations: Path, clips: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *settings(annotations, clips, "data.encoding=jpeg", "data.limit=3"))
    manifest = read_manifest(run(recipe, tmp_path / "out").manifest)
    frames = open_frames(manifest, recipe)
    for sample in manifest.samples:
        stored = frames.load(sample).frames.astype(int)
        direct = decode_video(manifest.locate(sample), recipe.video).frames.astype(int)
        # Quality 95 without chroma subsampling; the noise band of these clips is its worst case.
        assert np.abs(stored - direct).mean() < 2.0


def test_no_cache_decodes_the_same_frames(annotations: Path, clips: Path, tmp_path: Path) -> None:
    cached = recipe_of(tmp_path, *settings(annotations, clips))
    direct = recipe_of(tmp_path, *settings(annotations, clips, "data.cache=none"))
    one, two = (read_manifest(run(r, tmp_path / r.data.cache).manifest) for r in (cached, direct))
    assert two.frames is None
    assert shard_paths(tmp_path / "none") == []
    assert [s.to_json() for s in one.samples] == [s.to_json() for s in two.samples]
    for sample in two.samples[:5]:
        np.testing.assert_array_equal(
            open_frames(one, cached).load(sample).frames, open_frames(two, direct).load(sample).frames
        )


def test_equal_inputs_give_equal_bytes(annotations: Path, clips: Path, tmp_path: Path) -> None:
    """Neither the folder, nor the number of workers, nor the order of the annotations matters."""
    first = run(recipe_of(tmp_path, *settings(annotations, clips)), tmp_path / "one")
    assert tree(tmp_path / "one") == tree(run(
        recipe_of(tmp_path, *settings(annotations, clips, "data.workers=1")), tmp_path / "two"
    ).manifest.parent)  # fmt: skip
    lines = annotations.read_text().splitlines()
    shuffled = tmp_path / "other" / annotations.name
    shuffled.parent.mkdir()
    shuffled.write_text("\n".join(reversed(lines)) + "\n")
    again = run(recipe_of(tmp_path, *settings(shuffled, clips)), tmp_path / "three")
    # Only the file's own hash may differ.
    headers = [json.loads(r.manifest.read_text().split("\n")[0]) for r in (first, again)]
    hashes = [header.pop("annotations_sha256") for header in headers]
    assert hashes[0] != hashes[1]
    assert headers[0] == headers[1]
    assert first.manifest.read_text().split("\n")[1:] == again.manifest.read_text().split("\n")[1:]


def test_changed_recipe_reuses_what_it_can(annotations: Path, clips: Path, tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    small = recipe_of(tmp_path, *settings(annotations, clips, cache, "data.limit=10"))
    run(small, tmp_path / "small")
    folder = Path(read_manifest(tmp_path / "small").frames or "")
    before = {path.name: path.stat().st_mtime_ns for path in shard_paths(folder)}
    full = run(recipe_of(tmp_path, *settings(annotations, clips, cache)), tmp_path / "full")
    after = {path.name: path.stat().st_mtime_ns for path in shard_paths(folder)}
    assert before.items() < after.items()
    keys = [key for shard in shard_paths(folder) for key in _keys(shard)]
    assert len(keys) == len(set(keys)) == 23
    assert len(read_manifest(full.manifest).samples) == 25
    # Other sampling is another folder, not a mixture.
    other = recipe_of(tmp_path, *settings(annotations, clips, cache, "video.num_frames=6", "data.limit=1"))
    assert read_manifest(run(other, tmp_path / "other").manifest).frames != str(folder)


def test_other_sampling_than_assembled_is_refused(annotations: Path, clips: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *settings(annotations, clips, "data.limit=1"))
    manifest = read_manifest(run(recipe, tmp_path / "out").manifest)
    with pytest.raises(ManifestError, match=r"video\.num_frames is 8, was 4"):
        open_frames(manifest, recipe_of(tmp_path, "video.num_frames=8"))


def test_folder_can_be_moved(annotations: Path, clips: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *settings(annotations, clips, "data.limit=2"))
    run(recipe, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    manifest = read_manifest(tmp_path / "there")
    assert open_frames(manifest, recipe).load(manifest.samples[0]).frames.shape[0] == 4


@pytest.fixture
def hostile(clips: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    """A root with good and bad files, records about them, and for each bad one what its reason must say."""
    root = tmp_path / "root"
    root.mkdir()
    for index in range(3):
        shutil.copy(clips / f"v{index:02d}.mp4", root / f"good{index}.mp4")
    shutil.copy(clips / "v04.mp4", root / "ein Über-Clip (1) 動画.mp4")
    shutil.copy(clips / "v05.mp4", tmp_path / "outside.mp4")
    (root / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "linked folder").symlink_to(tmp_path)
    (root / "folder.mp4").mkdir()
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("no video here " * 50)
    whole = (clips / "v06.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    write_sound(root / "sound.mp4")
    expected = {
        "../outside.mp4": "climb out",
        "../../etc/passwd": "climb out",
        "/etc/passwd": "must be relative",
        str(root / "good0.mp4"): "must be relative",
        "C:\\videos\\a.mp4": "must be relative",
        "file:///etc/passwd": "not a URI",
        "s3://bucket/a.mp4": "not a URI",
        "nul\x00.mp4": "NUL",
        "link.mp4": "symbolic link leads out",
        "linked folder/outside.mp4": "symbolic link leads out",
        "folder.mp4": "not a regular file",
        "missing.mp4": "no such file",
        "empty.mp4": "is empty",
        "text.mp4": "cannot be opened as video",
        "cut.mp4": "cannot be opened as video",
        "sound.mp4": "cannot be opened as video: it holds no video stream",
    }
    good = ["good0.mp4", "good1.mp4", "./good2.mp4", "ein Über-Clip (1) 動画.mp4"]
    records = [question(name) for name in [*good, *expected]]
    expected["image"] = "climb out"
    records.append(question("good0.mp4", id="image", image="../../etc/passwd"))
    return root, write_jsonl(tmp_path / "q.jsonl", records), expected


def test_hostile_and_broken_files_are_rejected_with_reasons(
    hostile: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    root, annotations, expected = hostile
    done = run(recipe_of(tmp_path, f"data.annotations={annotations}", f"data.root={root}"), tmp_path / "out")
    reasons = rejects_of(done.rejects)
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name], (name, reasons[name])
    assert len(read_manifest(done.manifest).samples) == 4
    assert done.counts["rejected"] == {"decode": 4, "path": 13}
    card = done.card.read_text()
    assert "動画" in card
    # The reasons in the card are those of many samples: what differs between them is left out.
    assert "decode: 4, path: 13." in card
    for kind, count in {
        "it holds no video stream": 1, "it is text": 1, "must be relative to the data root": 3,
        "a symbolic link leads out": 2, "must not climb out": 3, "no such file": 1,
    }.items():  # fmt: skip
        assert re.search(rf"{kind}[^<]*</td><td class=n>{count}</td>", card), kind


def test_card_shows_text_as_text(clips: Path, tmp_path: Path) -> None:
    """Questions come from the internet: none of them may run in the reader's browser."""
    attack = "<script>alert(1)</script>"
    annotations = write_jsonl(
        tmp_path / "q.jsonl", [question("v00.mp4", question=attack, options=[attack, "b"]), question(attack)]
    )
    card = run(recipe_of(tmp_path, *settings(annotations, clips)), tmp_path / "out").card.read_text()
    assert "<script" not in card
    assert card.count("&lt;script&gt;alert(1)") >= 3
    assert "http" not in card.replace("data:image", "")  # nothing is loaded from elsewhere


def test_too_many_rejects_stop_the_run(hostile: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    root, annotations, expected = hostile
    recipe = recipe_of(
        tmp_path, f"data.annotations={annotations}", f"data.root={root}", "data.max_reject_rate=0.01"
    )
    with pytest.raises(DataQualityError, match=r"17 of 21 samples rejected.*max_reject_rate=1.00%") as caught:
        run(recipe, tmp_path / "out")
    assert str(tmp_path / "out" / "rejects.jsonl") in str(caught.value)
    assert set(rejects_of(tmp_path / "out" / "rejects.jsonl")) == set(expected)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_bad_records_are_rejected_with_reasons(clips: Path, tmp_path: Path) -> None:
    bad = {
        "no answer": {**question("v00.mp4", id="no answer")},
        "outside": question("v00.mp4", id="outside", answer="C"),
        "empty": question("v00.mp4", id="empty", question=" "),
        "extra": question("v00.mp4", id="extra", colour="red"),
        "kind": question("v00.mp4", id="kind", problem_type="riddle"),
        "times": question("v00.mp4", id="times", key_times=[[-1, 2]]),
    }
    del bad["no answer"]["answer"]
    records = [*bad.values(), question("v01.mp4", id="good"), question("v02.mp4", id="good"), ["a list"]]
    annotations = write_jsonl(tmp_path / "q.jsonl", records)
    with annotations.open("a") as file:
        file.write("{broken\n")
    done = run(recipe_of(tmp_path, *settings(annotations, clips)), tmp_path / "out")
    reasons = rejects_of(done.rejects)
    for name, words in {
        "no answer": "answer: is missing",
        "outside": "must be a letter of A-B",
        "empty": "question: is empty",
        "extra": "colour: unknown field",
        "kind": "problem_type='riddle'",
        "times": "0 <= start < end",
        "good": "appears more than once",
        "record 9": "is list, not an object",
        "record 10": "line 10: is not JSON",
    }.items():
        assert words in reasons[name], (name, reasons.get(name))
    assert [s.id for s in read_manifest(done.manifest).samples] == ["good"]


def test_text_that_is_no_text_is_rejected_and_can_be_read(clips: Path, tmp_path: Path) -> None:
    """JSON can hold half of a surrogate pair, which no UTF-8 file can: the run must not end over it."""
    records = [
        question("v00.mp4", id="good"),
        question("v00.mp4", id="half", question="what \ud83d?"),
        question("v\ud800.mp4", id="name"),
        {**question("v00.mp4", id="number"), "video": 7},
    ]
    annotations = tmp_path / "q.jsonl"
    annotations.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run(recipe_of(tmp_path, *settings(annotations, clips)), tmp_path / "out")
    reasons = rejects_of(done.rejects)
    assert "holds half a character" in reasons["half"]
    assert "video='v\\ud800.mp4'" in reasons["name"]
    assert "video=7: must be text" in reasons["number"]
    assert "half a character" in done.card.read_text()


def test_rejects_do_not_depend_on_the_order_of_the_file(clips: Path, tmp_path: Path) -> None:
    records = [question(f"v0{index}.mp4", id="same") for index in range(3)]
    lists = []
    for name, rows in {"there": records, "back": records[::-1]}.items():
        annotations = write_jsonl(tmp_path / name / "q.jsonl", rows)
        done = run(recipe_of(tmp_path, *settings(annotations, clips)), tmp_path / f"out-{name}")
        lists.append(done.rejects.read_text())
        assert [s.video for s in read_manifest(done.manifest).samples] == ["v00.mp4"]
    assert lists[0] == lists[1]


def test_the_step_hands_its_counts_on(annotations: Path, clips: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *settings(annotations, clips, "data.limit=3"))
    done = steps.assemble(recipe, str(tmp_path / "run"))
    assert done.metrics["split/train"] == done.metrics["source/jsonl"] == done.metrics["videos/total"] == 3
    assert done.metadata["problem_type/multiple choice"] == 3


def test_times_after_the_end_of_the_video_are_rejected(clips: Path, tmp_path: Path) -> None:
    """The schema cannot know how long the video is; decoding does. v00 lasts 6 frames of 40 ms."""
    times = {"good": [[0.1, 0.2]], "late": [[0.3, 9.0]], "clipped": [[0.2, 9.0]]}
    records = [question("v00.mp4", id=name, key_times=spans) for name, spans in times.items()]
    annotations = write_jsonl(tmp_path / "q.jsonl", records)
    done = run(recipe_of(tmp_path, *settings(annotations, clips)), tmp_path / "out")
    assert rejects_of(done.rejects) == {
        "late": "key_times=[[0.3, 9.0]]: starts after the video's end at 0.24 s"
    }


def test_hanging_decoder_is_stopped(clips: Path, tmp_path: Path) -> None:
    """A named pipe with a video's name: opening it blocks for ever, in C, as some broken files make decord
    do.
    """
    root = tmp_path / "root"
    shutil.copytree(clips, root)
    annotations = write_jsonl(tmp_path / "q.jsonl", [question("v00.mp4"), question("v01.mp4")])
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom appo.config import load_recipe\n"
        "from appo.data.assemble import assemble\n"
        "assemble(load_recipe(sys.argv[1], sys.argv[3:]), Path(sys.argv[2]), progress=False)\n"
    )
    hook = tmp_path / "hook"
    hook.mkdir()
    # The decoder itself is made to hang on one file: in the worker's interpreter, by its sitecustomize.
    (hook / "sitecustomize.py").write_text(
        "import decord.video_reader as v\nold = v.VideoReader.__init__\n"
        "def hang(self, uri, *a, **k):\n"
        "    while 'v01' in str(uri): pass\n"
        "    old(self, uri, *a, **k)\n"
        "v.VideoReader.__init__ = hang\n"
    )
    recipe_of(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{hook}{os.pathsep}{Path.cwd()}"}
    overrides = [f"data.annotations={annotations}", f"data.root={root}", "data.decode_timeout_s=2"]
    start = time.monotonic()
    command = [sys.executable, str(script), str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), *overrides]
    subprocess.run(command, check=True, env=environment, timeout=60)
    assert time.monotonic() - start < 30
    assert "more than 2 s" in rejects_of(tmp_path / "out" / "rejects.jsonl")["v01.mp4"]
    assert [s.id for s in read_manifest(tmp_path / "out").samples] == ["v00.mp4"]


@pytest.mark.slow
def test_kill_at_any_moment_and_go_on(tmp_path: Path) -> None:
    """Kill -9 again and again: work goes on where it stopped and ends in an uninterrupted run's bytes."""
    count = 100
    for index in range(count):
        write_clip(tmp_path / "clips" / f"{index}.mp4", seed=index, num_frames=8)
    annotations = write_jsonl(tmp_path / "q.jsonl", [question(f"{index}.mp4") for index in range(count)])
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom appo.config import load_recipe\n"
        "import appo.data.decoding\nfrom appo.data.assemble import assemble\n"
        "appo.data.decoding.SHARD_ROWS = 8\n"
        "assemble(load_recipe(sys.argv[1], sys.argv[3:]), Path(sys.argv[2]), progress=False)\n"
    )
    recipe_of(tmp_path)
    overrides = [f"data.annotations={annotations}", f"data.root={tmp_path / 'clips'}", "video.max_pixels=784"]

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            str(script),
            str(tmp_path / "recipe.yaml"),
            str(tmp_path / out),
            *overrides,
        ]
        return subprocess.Popen(command, cwd=Path.cwd(), start_new_session=True)

    assert start("whole").wait(timeout=120) == 0
    journal = next((tmp_path / "whole").rglob("journal.jsonl")).relative_to(tmp_path / "whole")
    kills, finished, seen = 0, False, []
    while not finished:
        process = start("killed")
        before = _lines(tmp_path / "killed" / journal)
        end = time.monotonic() + 120
        # Killed as soon as some more is done: somewhere between writing a shard and the manifest.
        while process.poll() is None and time.monotonic() < end:
            if kills < 3 and _lines(tmp_path / "killed" / journal) > before:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            time.sleep(0.002)
        process.wait()
        finished = process.returncode == 0
        seen.append(_lines(tmp_path / "killed" / journal))
    assert kills >= 2
    assert seen == sorted(seen)  # each run went on from what the one before had done
    left = {name for name in tree(tmp_path / "killed") if name.endswith(".tmp")}
    ours = {name: data for name, data in tree(tmp_path / "killed").items() if name not in left}
    assert ours == tree(tmp_path / "whole")
    assert _lines(tmp_path / "killed" / journal) == count  # nothing that was noted was done twice


def _lines(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_text().splitlines()) if path.exists() else 0


def test_shards_are_ordinary_datasets(annotations: Path, clips: Path, tmp_path: Path) -> None:
    """`datasets` finds its own schema in them, and the very frames that decoding gives."""
    import datasets

    recipe = recipe_of(tmp_path, *settings(annotations, clips, "data.limit=3"))
    manifest = read_manifest(run(recipe, tmp_path / "out").manifest)
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{manifest.frames}/*.parquet", split="train", cache_dir=str(tmp_path / "hf")
    )
    value, many = datasets.Value, datasets.List
    features = datasets.Features(
        key=value("string"), images=many(value("binary")), frames_per_image=value("int32"),
        timestamps_s=many(value("float64")), frame_indices=many(value("int64")), height=value("int32"),
        width=value("int32"), duration_s=value("float64"), total_frames=value("int64"),
    )  # fmt: skip
    assert loaded.features == features
    assert shard_schema().equals(features.arrow_schema, check_metadata=True)
    rows = {record["key"]: row_from(record) for record in loaded}
    assert rows.keys() == {sample.video_sha256 for sample in manifest.samples}
    for sample in manifest.samples:
        frames, direct = (
            decode(rows[sample.video_sha256]),
            decode_video(manifest.locate(sample), recipe.video),
        )
        np.testing.assert_array_equal(frames.frames, direct.frames)
        np.testing.assert_array_equal(frames.timestamps_s, direct.timestamps_s)


def test_damaged_shard_is_named(annotations: Path, clips: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *settings(annotations, clips, "data.limit=3"))
    manifest = read_manifest(run(recipe, tmp_path / "out").manifest)
    (shard,) = shard_paths(Path(manifest.frames or ""))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"is not a readable shard.*assemble again"):
        open_frames(manifest, recipe)


def test_quota_shortfall_stops_unless_told_otherwise(annotations: Path, clips: Path, tmp_path: Path) -> None:
    quota = "data.quotas={jsonl: 30}"
    with pytest.raises(QuotaError, match=r"jsonl has 25 of 30.*quota_shortfall: take_all"):
        run(recipe_of(tmp_path, *settings(annotations, clips, quota)), tmp_path / "out")
    told = recipe_of(tmp_path, *settings(annotations, clips, quota, "data.quota_shortfall=take_all"))
    assert run(told, tmp_path / "out").counts["split"] == {"train": 25}


def test_splits_keep_videos_apart(annotations: Path, clips: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, *settings(annotations, clips, "data.test_share=0.3", "data.validation_share=0.2")
    )
    manifest = read_manifest(run(recipe, tmp_path / "out").manifest)
    videos = {name: {s.video for s in manifest.split(name)} for name in ("train", "validation", "test")}
    assert all(videos.values())
    assert not videos["train"] & videos["test"]
    assert not videos["train"] & videos["validation"]
    # Whole videos of one or two questions: the share is met to within one.
    assert abs(len(manifest.split("test")) - 0.3 * 25) <= 1
    assert abs(len(manifest.split("validation")) - 0.2 * 25) <= 1
