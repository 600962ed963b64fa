"""A question and its options -> the text of the prompt, for training, evaluation and scoring alike.

One definition of the paper's templates (APPO supplement E, figures D and E) and of the tags that the answer
parsers look for. Pure text: imports nothing of the package.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from appo.errors import SettingError

THINK, ANSWER, TIME, OBSERVATION = "think", "answer", "time", "observation"

REASONING_TEMPLATE = (
    "{question} Output the thinking process in <think> </think> and final answer in <answer> </answer> tags, "
    "i.e., <think> reasoning process here </think><answer> answer here </answer>."
)

GROUNDING_TEMPLATE = (
    "The video is {duration} seconds long, with {frame_nums} frames evenly sampled from it.\n"
    "Based on the video content, think about the question deeply, select the correct option, and provide ONE or "
    "MORE time periods in the video where the clues corresponding to the correct option occur.\n"
    "Question: {question}\n"
    "Output the thinking process in <think> </think> tags, final answer in <answer> </answer> tags and time clues "
    "in <time> </time> tags, i.e., <think> reasoning process here </think> <answer> answer here </answer> "
    "<time> 8.4 to 12.5, 25 to 30.2 </time>"
)

# VideoP2R (arXiv 2511.11113): what is seen is written down before it is reasoned about.
OBSERVATION_TEMPLATE = (
    "{question} First write down what you observe in the video in <observation> </observation> tags, then the "
    "thinking process in <think> </think> and the final answer in <answer> </answer> tags, i.e., <observation> "
    "observation here </observation><think> reasoning process here </think><answer> answer here </answer>."
)

# The demo's model knows 72 tokens; a template it would have to spell letter by letter would only cost time.
BARE_TEMPLATE = "{question}"

TEMPLATES = {
    "reasoning": REASONING_TEMPLATE,
    "grounding": GROUNDING_TEMPLATE,
    "observation": OBSERVATION_TEMPLATE,
    "bare": BARE_TEMPLATE,
}


def option_letter(index: int) -> str:
    """The letter of the option at `index`, counted from 0: 0 -> "A"."""
    return string.ascii_uppercase[index]


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with its options, one a line: `A. text`. Without options, the question itself."""
    lines = [f"{option_letter(index)}. {option}" for index, option in enumerate(options)]
    return "\n".join([question, *lines])


def build_prompt(
    question: str,
    options: Sequence[str] = (),
    *,
    template: str = "reasoning",
    duration_s: float | None = None,
    num_frames: int | None = None,
) -> str:
    """The user text of one sample.

    template: a key of TEMPLATES. The grounding template also needs `duration_s` (seconds) and `num_frames` (the
    frames the model really sees). Raises KeyError for an unknown template, SettingError when those are missing.
    """
    if template == "grounding" and (duration_s is None or num_frames is None):
        raise SettingError(
            "data.template=grounding: needs duration_s and num_frames of a sampled video; "
            "choose another template for samples without one"
        )
    return TEMPLATES[template].format(
        question=with_options(question, options),
        duration="" if duration_s is None else f"{duration_s:g}",
        frame_nums=num_frames,
    )
