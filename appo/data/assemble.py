"""A recipe -> the manifest, the frame shards, the rejects and the data card: the first step of every
pipeline.

source rows -> subset and splits -> every video decoded once -> samples whose files are good -> manifest. A
sample that cannot be used is left out with its reason, never replaced; above `data.max_reject_rate` the step
stops. Running it again goes on where it was stopped, and gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from appo.config import Data, Recipe
from appo.data.card import data_card
from appo.data.decoding import IMAGE, VIDEO, Decoded, Item, Outcome, Rejected, decode_all, items_of
from appo.data.leakage import leakage_report
from appo.data.manifest import build_manifest, relative_place
from appo.data.media import MediaRoot
from appo.data.progress import ProgressLine, progress_line
from appo.data.schema import VideoSample
from appo.data.shards import encoding_in_words, settings_key
from appo.data.sources import read_source
from appo.data.sources.base import Reject, SourceData
from appo.data.subset import assign_splits, choose_subset, counts_of
from appo.errors import UserError
from appo.storage import is_s3, write_atomic


class DataQualityError(UserError, ValueError):
    """More was rejected than the recipe allows; the message gives numbers, the commonest reasons and the
    file.
    """


@dataclass(frozen=True)
class Assembled:
    """Paths of what was written. counts: samples by split, source and type, rejects by stage, videos.
    leakage: JSON, videos shared with benchmarks' test sets.
    """

    manifest: Path
    rejects: Path
    card: Path
    counts: dict[str, Any]
    leakage: Path


def assemble(recipe: Recipe, out: Path, *, progress: bool = True) -> Assembled:
    """Assemble the recipe's data into the folder `out`.

    Raises DataQualityError when too much is rejected, QuotaError when a source is short, SampleError or
    StorageError when the annotations cannot be read. `out` may be used again after any of them, or after a
    kill.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    data, rejects_path = recipe.data, out / "rejects.jsonl"
    with progress_line(progress) as bar:
        source = read_source(recipe, out / data.source)
        samples, rejects, read = _collect(source, data, bar)
        _check_rate(rejects, read, data, rejects_path, "records")
        chosen = _choose(samples, data)
        outcomes = _decode(chosen, source, recipe, out, bar)
    kept = []
    for sample in chosen:
        done = _with_outcome(sample, outcomes)
        if isinstance(done, Reject):
            rejects.append(done)
        else:
            kept.append(done)
    lost = [r for r in rejects if r.stage != "record"]
    _check_rate(lost, len(chosen), data, rejects_path, "samples", everything=rejects)
    counts = {**counts_of(kept), "rejected": dict(sorted(Counter(r.stage for r in rejects).items()))}
    counts["videos"] = {"total": sum(isinstance(o, Decoded) for i, o in outcomes.items() if i.kind == VIDEO)}
    manifest, text = build_manifest(out / "manifest.jsonl", kept, **_header(recipe, source, out, counts))
    card = out / "card.html"
    leakage = leakage_report(kept, data.leakage)
    write_atomic(out / "leakage.json", json.dumps(leakage, indent=1, ensure_ascii=False) + "\n")
    page = data_card(manifest, recipe, rejects, leakage)
    write_atomic(card, page.encode("utf-8", "backslashreplace"))
    write_atomic(manifest.path, text)  # last: where there is a manifest, all else is there
    return Assembled(manifest.path, rejects_path, card, counts, out / "leakage.json")


def _collect(
    source: SourceData, data: Data, bar: ProgressLine
) -> tuple[dict[str, VideoSample], list[Reject], int]:
    """Usable rows by id, the rejects, and how many rows there were."""
    samples: dict[str, VideoSample] = {}
    rejects: list[Reject] = []
    read = 0
    for row in bar.over(source.rows, "reading records"):
        read += 1
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        allowed = data.problem_types.get(row.source)
        if allowed is not None and row.problem_type not in allowed:
            continue
        if (other := samples.get(row.id)) is not None:
            # Which one stays must not depend on the order of the file.
            row, left = sorted((row, other), key=lambda sample: json.dumps(sample.to_json(), sort_keys=True))
            rejects.append(Reject(row.id, "record", f"id {row.id!r} appears more than once", left.video))
        samples[row.id] = row
    return samples, rejects, read


def _choose(samples: dict[str, VideoSample], data: Data) -> list[VideoSample]:
    chosen = choose_subset(
        list(samples.values()),
        quota=data.quotas,
        seed=data.seed,
        take_all_if_short=data.quota_shortfall == "take_all",
    )
    chosen = assign_splits(
        chosen, validation_share=data.validation_share, test_share=data.test_share, seed=data.seed
    )
    return chosen[: data.limit]


def _decode(
    samples: Sequence[VideoSample], source: SourceData, recipe: Recipe, out: Path, bar: ProgressLine
) -> dict[Item, Outcome]:
    items = list(dict.fromkeys(item for sample in samples for item in items_of(sample)))
    place, local = shard_place(recipe, out)
    outcomes: dict[Item, Outcome] = {}

    def done(item: Item, outcome: Outcome) -> None:
        outcomes[item] = outcome
        bar.step(rejected=isinstance(outcome, Rejected))

    bar.start("decoding videos", len(items))
    decode_all(
        items,
        root=MediaRoot(source.root),
        video=recipe.video,
        data=recipe.data,
        place=place,
        journal=local / "journal.jsonl",
        done=done,
    )
    return outcomes


def shard_place(recipe: Recipe, out: Path) -> tuple[str | None, Path]:
    """Where the shards of this recipe's settings go (None without a cache), and the local folder of the
    journal.
    """
    key = settings_key(recipe.video, recipe.data)
    beside = out / "frames" / key
    if recipe.data.cache == "none":
        return None, beside
    if recipe.data.cache_dir is None:
        return str(beside), beside
    place = f"{recipe.data.cache_dir.rstrip('/')}/{key}"
    return place, beside if is_s3(place) else Path(place)


def _with_outcome(sample: VideoSample, outcomes: dict[Item, Outcome]) -> VideoSample | Reject:
    """The sample with what decoding told (hashes, duration), or why it must be left out."""
    for item in items_of(sample):
        outcome = outcomes[item]
        if isinstance(outcome, Rejected):
            return Reject(sample.id, outcome.stage, outcome.reason, item.name)
        if item.kind == IMAGE:
            sample = replace(sample, extra={**sample.extra, "image_sha256": outcome.sha256})
        else:
            if late := [times for times in sample.key_times if times[0] >= outcome.duration_s > 0]:
                reason = (
                    f"key_times={[list(late[0])]}: starts after the video's end at {outcome.duration_s:.2f} s"
                )
                return Reject(sample.id, "decode", reason, item.name)
            duration = sample.duration_s if sample.duration_s is not None else round(outcome.duration_s, 6)
            sample = replace(sample, video_sha256=outcome.sha256, duration_s=duration)
    return sample


def _check_rate(
    rejects: list[Reject],
    total: int,
    data: Data,
    path: Path,
    what: str,
    *,
    everything: list[Reject] | None = None,
) -> None:
    """Write the rejects file, then stop if there are too many."""
    listed = sorted(
        everything if everything is not None else rejects,
        key=lambda r: (r.stage, r.id, r.reason, r.video or ""),
    )
    lines = "".join(json.dumps(r.to_json(), ensure_ascii=False) + "\n" for r in listed)
    # A reject may hold half of a surrogate pair, which is no UTF-8; this writes it as JSON's own escape.
    write_atomic(path, lines.encode("utf-8", "backslashreplace"))
    if total == 0:
        raise DataQualityError(
            f"no {what} at all: check data.annotations, data.quotas and data.problem_types"
        )
    if len(rejects) > data.max_reject_rate * total:
        examples = "\n".join(f"  {r.id}: {r.reason}" for r in rejects[:3])
        raise DataQualityError(
            f"{len(rejects):,} of {total:,} {what} rejected, more than data.max_reject_rate="
            f"{data.max_reject_rate:.2%} allows; all are listed in {path}. The first:\n{examples}"
        )


def _header(recipe: Recipe, source: SourceData, out: Path, counts: dict[str, Any]) -> dict[str, Any]:
    data = recipe.data
    place, _ = shard_place(recipe, out)
    return {
        "name": recipe.name,
        "source": data.source,
        "rule": rule_in_words(data),
        "seed": data.seed,
        "root": relative_place(source.root, out),
        "frames": None if place is None else relative_place(place, out),
        "video": recipe.video.model_dump(mode="json"),
        "encoding": encoding_in_words(data),
        "annotations_sha256": dict(sorted(source.files.items())),
        "counts": counts,
    }


def rule_in_words(data: Data) -> str:
    """How the samples were chosen, for people."""
    parts = [f"All usable samples of source {data.source}"]
    if data.problem_types:
        kinds = "; ".join(
            f"{source}: {', '.join(types)}" for source, types in sorted(data.problem_types.items())
        )
        parts.append(f"only these types of question ({kinds})")
    if data.quotas:
        quotas = ", ".join(f"{n} of {source}" for source, n in sorted(data.quotas.items()))
        parts.append(
            f"of these {quotas}, types of question in proportion (largest remainder), "
            f"those with the lowest SHA-256 of (seed {data.seed}, id)"
        )
    if data.validation_share or data.test_share:
        parts.append(
            f"whole videos moved to test ({data.test_share:g}) and validation ({data.validation_share:g}) "
            f"in order of SHA-256 of (seed {data.seed}, video)"
        )
    if data.limit:
        parts.append(f"the first {data.limit}")
    return "; ".join([*parts, f"in order of SHA-256 of (seed {data.seed}, id)."])
