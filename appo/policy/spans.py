"""Tokens of a completion -> which of them lie in <observation>, <think> and <answer> (VideoP2R, section 3).

Works on what each token itself contributes to the text, in bytes, never on a second tokenization of the text:
that may merge differently from what was sampled, and a token may hold half a character. Pure, but for
`tag_masks`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from appo.prompts import ANSWER, OBSERVATION, THINK

if TYPE_CHECKING:
    from torch import Tensor

TAGS = (OBSERVATION, THINK, ANSWER)


def token_bytes(tokens: Sequence[str]) -> list[bytes]:
    """What each entry of a byte-level vocabulary (GPT-2's and Qwen's alphabet) adds to the text.

    tokens: as `tokenizer.convert_ids_to_tokens` gives them. A token that is not written in that alphabet,
    such as an added one with a space in it, stands for itself.
    """
    alphabet = _byte_of_character()
    return [
        bytes(alphabet[character] for character in token)
        if all(character in alphabet for character in token)
        else token.encode()
        for token in tokens
    ]


def tag_regions(text: bytes, tags: Sequence[str] = TAGS) -> dict[str, tuple[int, int]]:
    """Where each tag's part lies: byte offsets from the `<` that opens it to the `>` that closes it,
    exclusive.

    Read from left to right: a tag opens a part if it closes later, and what stands inside a part opens
    nothing. Of repeated parts the first counts. A tag that is missing, never closed or closed before it opens
    has no part, and is not in the result.
    """
    names = b"|".join(re.escape(tag.encode()) for tag in tags)
    regions: dict[str, tuple[int, int]] = {}
    for found in re.finditer(rb"<(%s)>.*?</\1>" % names, text, re.DOTALL):
        regions.setdefault(found[1].decode(), found.span())
    return regions


def tag_text(text: str, tag: str, tags: Sequence[str] = TAGS) -> str | None:
    """What is written inside a tag's part, stripped; None where the completion has no such part."""
    encoded = text.encode()
    region = tag_regions(encoded, tags).get(tag)
    if region is None:
        return None
    inside = slice(region[0] + len(f"<{tag}>"), region[1] - len(f"</{tag}>"))
    return encoded[inside].decode(errors="replace").strip()


def token_tags(pieces: Sequence[bytes], tags: Sequence[str] = TAGS) -> list[str | None]:
    """The tag that each token belongs to, None outside of all.

    pieces: what each token adds to the text (`token_bytes`). A token belongs where its first byte lies: one
    that closes a part and opens the next, like `><`, to the part it closes. A token that adds nothing to the
    text, as a padding or end token that was taken out, belongs to none.
    """
    regions = tag_regions(b"".join(pieces), tags)
    owners: list[str | None] = []
    start = 0
    for piece in pieces:
        inside = (tag for tag, (first, end) in regions.items() if piece and first <= start < end)
        owners.append(next(inside, None))
        start += len(piece)
    return owners


def tag_masks(
    completions: Sequence[Sequence[bytes]], num_tokens: int, tags: Sequence[str] = TAGS
) -> Mapping[str, Tensor]:
    """Token masks of a batch: tag -> (B, num_tokens) bool, false in the padding.

    completions: pieces of each completion's valid tokens, at most `num_tokens` of them.
    """
    import torch

    masks = {tag: torch.zeros(len(completions), num_tokens, dtype=torch.bool) for tag in tags}
    for row, pieces in enumerate(completions):
        for position, owner in enumerate(token_tags(pieces, tags)):
            if owner is not None:
                masks[owner][row, position] = True
    return masks


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable alphabet for bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
