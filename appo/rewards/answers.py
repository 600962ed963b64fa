"""A response's text -> what it says inside its tags: the answer, the letter, the number.

The only parser of the package: rewards train on it and benchmarks score with it. Every function is linear in
the length of the text and accepts any Unicode; what cannot be read is None, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from appo.prompts import ANSWER, OBSERVATION, THINK, TIME, option_letter

# ASCII: without it, IGNORECASE also takes the Kelvin sign for a k.
_TAG = re.compile(rf"<(/?)({THINK}|{ANSWER}|{TIME}|{OBSERVATION})>", re.IGNORECASE | re.ASCII)
_BARE_LETTER = re.compile(r"\(?\s*([A-Za-z])\s*\)?\s*[.:)]?")
_LETTER_AND_MORE = re.compile(r"(?:\(([A-Z])\)|([A-Z])\s?[.:)])\s*\S", re.DOTALL)
_LEAD_IN = re.compile(
    r"(?:the\s)?(?:(?:correct|right|best|final)\s)?(?:answer|option|choice)(?:\sis)?\s{0,9}:?\s{0,9}",
    re.IGNORECASE | re.ASCII,
)
# Bounded repetition keeps a megabyte of digits linear.
_NUMBER = re.compile(
    r"(?<![0-9.,])[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,5}|[0-9]{1,18})(?:\.[0-9]{0,18})?|\.[0-9]{1,18})"
    r"(?:[eE][-+]?[0-9]{1,3})?"
)
# The longest text that can be a letter and nothing else, as in "( B ).".
_BARE_LENGTH = 8


@dataclass(frozen=True, slots=True)
class Tag:
    """One tag of a response. start, end: character positions of the tag itself."""

    name: str
    closing: bool
    start: int
    end: int


def find_tags(text: str) -> Iterator[Tag]:
    """The known tags of a text in order, upper or lower case; names come back in lower case."""
    for match in _TAG.finditer(text):
        yield Tag(match[2].lower(), bool(match[1]), match.start(), match.end())


def extract_tag(text: str, name: str) -> str | None:
    """The stripped text inside the first complete `<name>...</name>`, or None.

    For every tag but `think`, what stands inside `<think>` is reasoning and does not count, and an unclosed
    `<think>` reaches to the end: a response cut off while thinking has given no answer, whatever it weighed.
    When the first `think` tag closes, the opening one stood in the prompt, and all before it was reasoning.
    Of several opening tags before the closing one, the last opens.
    """
    tags = list(find_tags(text))
    if name != THINK:
        first = next((index for index, tag in enumerate(tags) if tag.name == THINK), None)
        if first is not None and tags[first].closing:
            tags = tags[first + 1 :]
    opened: int | None = None
    thinking = False
    for tag in tags:
        if tag.name == THINK != name:
            thinking, opened = not tag.closing, None
        elif tag.name == name and not thinking:
            if not tag.closing:
                opened = tag.end
            elif opened is not None:
                return text[opened : tag.start].strip()
    return None


def extract_answer(text: str) -> str | None:
    """What stands inside `<answer>`; None when there is none, or it is empty."""
    return extract_tag(text, ANSWER) or None


def extract_choice(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer names, or None.

    Read as a letter: `B`, `b`, `(B)`, `B.`, `B. text`, `B) text`, `Answer: B`. Not: `A person` (an article),
    a letter past the last option, prose that merely contains a letter. The full text of an option counts as
    its letter; of equal options, as the first one's.
    """
    text = answer.strip()
    texts = [_plain(option) for option in options]
    if text and _plain(text) in texts:
        return option_letter(texts.index(_plain(text)))
    lead = _LEAD_IN.match(text)
    text = text[lead.end() :] if lead else text
    if len(text) <= _BARE_LENGTH and (bare := _BARE_LETTER.fullmatch(text)):
        letter = bare[1].upper()
    elif more := _LETTER_AND_MORE.match(text):
        letter = more[1] or more[2]
    else:
        return None
    return letter if ord(letter) - ord("A") < len(options) else None


def extract_number(answer: str, *, where: Literal["whole", "first"] = "whole") -> float | None:
    """The number an answer states, or None. `1,000` is a thousand; infinities and NaN are not numbers.

    where: "whole" wants nothing beside the number but a unit or a percent sign after it; "first" takes the
    first number anywhere in the text.
    """
    text = answer.strip()
    match = _NUMBER.search(text)
    if match is None or (where == "whole" and (match.start() > 1 or not _is_unit(text[match.end() :]))):
        return None
    value = float(match[0].replace(",", ""))
    return value if math.isfinite(value) else None


def _is_unit(rest: str) -> bool:
    return len(rest) <= 24 and not any(character.isdigit() for character in rest)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
