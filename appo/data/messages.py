"""One sample -> the chat messages that a processor's template turns into a prompt.

Between `appo.prompts` (the text) and the processor (the tokens); training, warm start and evaluation all call it.
"""

from __future__ import annotations

from typing import Any

from appo.data.schema import VideoSample
from appo.prompts import build_prompt


def prompt_messages(
    sample: VideoSample,
    template: str,
    *,
    duration_s: float | None = None,
    num_frames: int | None = None,
) -> list[dict[str, Any]]:
    """A single user turn: the video and the image the sample has, then the text.

    duration_s (seconds; the sample's own when None) and num_frames (frames the model really sees) are written into
    templates that name them. Raises what `appo.prompts.build_prompt` raises.
    """
    text = build_prompt(
        sample.question,
        sample.options,
        template=template,
        duration_s=sample.duration_s if duration_s is None else duration_s,
        num_frames=num_frames,
    )
    content: list[dict[str, Any]] = []
    if sample.video is not None:
        content.append({"type": "video"})
    if sample.image is not None:
        content.append({"type": "image"})
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]
