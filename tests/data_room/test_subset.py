"""Laws of choosing: quotas met, strata in proportion, nothing depends on order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo.config import load_recipe
from appo.data.schema import VideoSample
from appo.data.sources.video_r1 import NAMES
from appo.data.subset import QuotaError, apportion, assign_splits, choose_subset, counts_of


def sample(
    ident: str, source: str = "STAR", kind: str = "free-form", video: str | None = None
) -> VideoSample:
    return VideoSample(ident, source, kind, "q", "a", video=video or f"{ident}.mp4")


def population() -> list[VideoSample]:
    """The published file's shape at a hundredth of its size, with both of CLEVRER's types."""
    sizes = {
        ("LLaVA-Video-178K", "free-form"): 827, ("STAR", "free-form"): 115,
        ("PerceptionTest", "free-form"): 63,
        ("NeXT-QA", "free-form"): 75, ("CLEVRER", "free-form"): 50, ("CLEVRER", "numerical"): 32,
    }  # fmt: skip
    return [sample(f"{s}-{k}-{i}", s, k) for (s, k), n in sizes.items() for i in range(n)]


QUOTA = {"LLaVA-Video-178K": 50, "STAR": "all", "PerceptionTest": "all", "NeXT-QA": 50, "CLEVRER": 60}


def test_quotas_and_strata() -> None:
    counts = counts_of(choose_subset(population(), quota=QUOTA, seed=0))  # type: ignore[arg-type]
    assert counts["source"] == {
        "CLEVRER": 60, "LLaVA-Video-178K": 50, "NeXT-QA": 50, "PerceptionTest": 63, "STAR": 115,
    }  # fmt: skip
    # 50 : 32 of 60 seats: 36.6 and 23.4
    assert counts["stratum"]["CLEVRER / free-form"] == 37
    assert counts["stratum"]["CLEVRER / numerical"] == 23


def test_the_recipe_asks_for_table_c() -> None:
    """LLaVA-Video about 5K, STAR about 11K, Perception Test about 6K, NExT-QA about 5K, CLEVRER about 6K."""
    sizes = {"STAR": 11_000, "PerceptionTest": 6_000}  # "all" of what the publisher has
    quotas = load_recipe("qwen2.5_vl_7b_video_r1_34k").data.quotas
    counts = {name: sizes[name] if n == "all" else n for name, n in quotas.items()}
    assert counts == {
        "LLaVA-Video-178K": 5000, "STAR": 11_000, "PerceptionTest": 6000, "NeXT-QA": 5000, "CLEVRER": 6000,
    }  # fmt: skip
    assert set(counts) == set(NAMES)


def test_order_of_the_file_does_not_matter_and_the_seed_does() -> None:
    rows = population()
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    chosen = choose_subset(rows, quota=QUOTA, seed=0)  # type: ignore[arg-type]
    assert chosen == choose_subset(shuffled, quota=QUOTA, seed=0)  # type: ignore[arg-type]
    assert chosen != choose_subset(rows, quota=QUOTA, seed=1)  # type: ignore[arg-type]


def test_a_larger_quota_keeps_what_a_smaller_one_chose() -> None:
    small, large = (
        {s.id for s in choose_subset(population(), quota={"NeXT-QA": n}, seed=3)} for n in (20, 40)
    )
    assert small < large


def test_shortfall_names_all_sources_that_are_short() -> None:
    with pytest.raises(QuotaError, match="CLEVRER has 82 of 100; Nowhere has 0 of 1"):
        choose_subset(population(), quota={"CLEVRER": 100, "Nowhere": "all", "STAR": 5}, seed=0)
    taken = choose_subset(population(), quota={"CLEVRER": 100}, seed=0, take_all_if_short=True)
    assert len(taken) == 82


@given(
    sizes=st.dictionaries(st.text(min_size=1), st.integers(1, 1000), min_size=1, max_size=8),
    share=st.floats(0, 1),
)
def test_apportionment_laws(sizes: dict[str, int], share: float) -> None:
    """Seats add up, nobody gets more than it has, everybody is within one seat of its exact share."""
    total = sum(sizes.values())
    seats = int(share * total)
    shares = apportion(sizes, seats)
    assert sum(shares.values()) == seats
    for name, size in sizes.items():
        assert 0 <= shares[name] <= size
        assert abs(shares[name] - seats * size / total) < 1


@given(
    videos=st.lists(st.integers(0, 15), min_size=2, max_size=80),
    test_share=st.floats(0, 0.5),
    validation_share=st.floats(0, 0.4),
    seed=st.integers(0, 5),
)
def test_split_laws(videos: list[int], test_share: float, validation_share: float, seed: int) -> None:
    rows = [sample(str(i), video=f"{v}.mp4") for i, v in enumerate(videos)]
    done = assign_splits(rows, validation_share=validation_share, test_share=test_share, seed=seed)
    assert [s.id for s in done] == [s.id for s in rows]
    of_video: dict[str | None, set[str]] = {}
    for row in done:
        of_video.setdefault(row.video, set()).add(row.split)
    assert all(len(splits) == 1 for splits in of_video.values())
    assert any(s.split == "train" for s in done)
    if test_share == validation_share == 0:
        assert done == rows


def test_given_splits_stay() -> None:
    rows = [VideoSample(str(i), "s", "free-form", "q", "a", video=f"{i}.mp4", split="test") for i in range(4)]
    assert assign_splits(rows, validation_share=0.5, test_share=0.5, seed=0) == rows
