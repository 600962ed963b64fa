"""A response's text -> whether it keeps the format: the asked tags once each, in order, nothing outside."""

from __future__ import annotations

from appo.prompts import ANSWER, OBSERVATION, THINK, TIME
from appo.rewards.answers import find_tags

# The parts that each prompt template asks for (appo/prompts.py), in order.
PARTS: dict[str, tuple[str, ...]] = {
    "reasoning": (THINK, ANSWER),
    "bare": (THINK, ANSWER),
    "grounding": (THINK, ANSWER, TIME),
    "observation": (OBSERVATION, THINK, ANSWER),
}


def format_reward(text: str, *, template: str) -> float:
    """1 when the response is exactly the template's parts, else 0.

    Stricter than the usual `fullmatch(<think>.*?</think>\\s*<answer>.*?</answer>)`: each tag stands once, so
    that a second answer or a nested tag earns nothing. Upper-case tags count, as they do for parsing.
    """
    wanted = [(part, closing) for part in PARTS[template] for closing in (False, True)]
    tags = list(find_tags(text))
    if [(tag.name, tag.closing) for tag in tags] != wanted:
        return 0.0
    outside = [text[: tags[0].start], text[tags[-1].end :]]
    outside += [text[close.end : reopen.start] for close, reopen in zip(tags[1::2], tags[2::2], strict=False)]
    return 0.0 if any(piece.strip() for piece in outside) else 1.0
