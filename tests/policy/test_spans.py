"""Token spans: exact for whatever a tokenizer merged, and defined for whatever a model wrote."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from appo.policy.spans import tag_masks, tag_regions, tag_text, token_bytes, token_tags

GOOD = "<observation>a cät 猫 runs</observation><think>so B</think>\n<answer>B</answer>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level, as Qwen's, trained on little and not split into words: its merges run across tags."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([GOOD] * 20 + ["><"] * 100, trainer)
    return made


def cut(text: str, cuts: list[int]) -> list[bytes]:
    """The text's bytes cut at these places, in any way that a tokenizer could."""
    data = text.encode()
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def test_real_merges_across_tags(tokenizer: Tokenizer) -> None:
    pieces = token_bytes(tokenizer.encode(GOOD).tokens)
    assert b"".join(pieces) == GOOD.encode()
    crossing = [piece for piece in pieces if b"><" in piece]
    assert crossing, "the tokenizer was meant to merge across tags"
    owners = token_tags(pieces)
    start = 0
    for piece, owner in zip(pieces, owners, strict=True):
        regions = tag_regions(GOOD.encode())
        assert owner == next((tag for tag, (a, b) in regions.items() if a <= start < b), None)
        start += len(piece)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 10_000), max_size=40))
def test_any_cut_gives_each_token_the_tag_of_its_first_byte(cuts: list[int]) -> None:
    bytewise = token_tags([bytes([byte]) for byte in GOOD.encode()])
    pieces = cut(GOOD, cuts)
    owners = token_tags(pieces)
    start = 0
    for piece, owner in zip(pieces, owners, strict=True):
        assert owner == bytewise[start]
        start += len(piece)


def test_a_token_across_the_boundary_belongs_to_what_it_closes() -> None:
    pieces = [b"<observation>", b"cat", b"</observation", b"><", b"think>", b"B", b"</think>"]
    assert token_tags(pieces) == ["observation"] * 4 + ["think"] * 3


def test_tokens_of_half_a_character_and_of_nothing() -> None:
    cat = "猫".encode()
    pieces = [b"", b"<think>", cat[:1], cat[1:], b"", b"</think>", b"<|im_end|>", b""]
    assert token_tags(pieces) == [None, "think", "think", "think", None, "think", None, None]


def test_added_tokens_stand_for_themselves() -> None:
    assert token_bytes(["Ġcat", "<|im_end|>", "a token", "Ã¤"]) == [
        b" cat",
        b"<|im_end|>",
        b"a token",
        "ä".encode(),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("B", {}),
        ("<observation>cat", {}),  # truncated
        ("</observation>cat<observation>", {}),  # closed before it opens
        ("<observation>cat<think>B</think>", {"think": "B"}),  # never closed: the next part still counts
        ("<observation></observation>", {"observation": ""}),
        ("<observation>1</observation><observation>2</observation>", {"observation": "1"}),
        ("<observation>a<think>b</think></observation>", {"observation": "a<think>b</think>"}),  # nested
        ("<observation>a<think>b</observation>c</think>", {"observation": "a<think>b"}),  # interleaved
        (
            "<answer>B</answer><think>why</think>",
            {"answer": "B", "think": "why"},
        ),  # order is the format's affair
        ("<observation>two\nlines</observation>", {"observation": "two\nlines"}),
        ("<Observation>x</Observation>", {}),
    ],
)
def test_malformed_output_is_defined(text: str, found: dict[str, str]) -> None:
    assert set(tag_regions(text.encode())) == set(found)
    for tag in ("observation", "think", "answer"):
        assert tag_text(text, tag) == found.get(tag)
    owners = token_tags([bytes([byte]) for byte in text.encode()])
    assert {owner for owner in owners if owner} == set(found)


def test_masks_are_false_in_the_padding() -> None:
    pieces = [b"<observation>", b"x", b"</observation>", b" B"]
    masks = tag_masks([pieces, [b"B"]], 6)
    assert masks["observation"].tolist() == [[True] * 3 + [False] * 3, [False] * 6]
    assert not masks["answer"].any()
