"""A response and its sample -> accuracy in [0, 1], by the sample's own problem type.

The measures are Video-R1's (src/r1-v/src/open_r1/grpo.py), with its string comparisons replaced by the
package's parser: there `B.` is not `B` and `1,000` is not `1000`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from appo.data.schema import VideoSample
from appo.errors import MissingPackage
from appo.rewards.answers import extract_answer, extract_choice, extract_number

# ROUGE stems and aligns in Python, and a reference is a few sentences: past this much text a candidate's
# F score is next to nothing whatever follows.
MAX_ROUGE_CHARACTERS = 20_000


def accuracy_reward(text: str, sample: VideoSample) -> float:
    """How right the response's `<answer>` is, in [0, 1]; 0 when there is none or it cannot be read."""
    answer = extract_answer(text)
    if answer is None:
        return 0.0
    return MEASURES[sample.problem_type](answer, sample)


def choice_accuracy(answer: str, sample: VideoSample) -> float:
    """1 when the answer names the right option, by letter or by its text."""
    letter = extract_choice(answer, sample.options)
    if letter is None:
        return 0.0
    # A few published records give the right option twice: either letter is right.
    return float(sample.options[ord(letter) - ord("A")] == sample.options[ord(sample.answer) - ord("A")])


def numerical_accuracy(answer: str, sample: VideoSample) -> float:
    """1 when both numbers agree to two decimals."""
    predicted, true = extract_number(answer), extract_number(sample.answer)
    return float(predicted is not None and true is not None and round(predicted, 2) == round(true, 2))


def regression_accuracy(answer: str, sample: VideoSample) -> float:
    """1 minus the relative error, clipped to [0, 1]."""
    predicted, true = extract_number(answer), extract_number(sample.answer)
    if predicted is None or true is None:
        return 0.0
    return 1.0 - min(1.0, (abs(predicted - true) + 1e-9) / (abs(true) + 1e-9))


def ocr_accuracy(answer: str, sample: VideoSample) -> float:
    """1 minus the word error rate over whitespace words, clipped to [0, 1]."""
    return 1.0 - min(1.0, word_error_rate(sample.answer.split(), answer.split()))


def free_form_accuracy(answer: str, sample: VideoSample) -> float:
    """Mean of the ROUGE-1, ROUGE-2 and ROUGE-L F scores, stemmed."""
    scores = _rouge().score(sample.answer, answer[:MAX_ROUGE_CHARACTERS])
    return float(sum(score.fmeasure for score in scores.values()) / len(scores))


def word_error_rate(reference: Sequence[str], hypothesis: Sequence[str]) -> float:
    """Edits (insert, delete, substitute) that turn one word list into the other, over the reference's length.

    Time is linear in the hypothesis: from twice the reference's length on, the rate is at least 1 and its
    lower bound is returned without aligning.
    """
    if not reference:
        return float(bool(hypothesis))
    if len(hypothesis) >= 2 * len(reference):
        return (len(hypothesis) - len(reference)) / len(reference)
    row = list(range(len(reference) + 1))
    for i, word in enumerate(hypothesis, start=1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(reference, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != wanted))
    return row[-1] / len(reference)


@lru_cache(maxsize=1)
def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise MissingPackage(
            "rouge_score: is not installed, and free-form answers are scored with ROUGE; pip install 'appo[eval]'"
        ) from error
    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


MEASURES: dict[str, Callable[[str, VideoSample], float]] = {
    "multiple choice": choice_accuracy,
    "temporal grounding": choice_accuracy,
    "numerical": numerical_accuracy,
    "regression": regression_accuracy,
    "OCR": ocr_accuracy,
    "free-form": free_form_accuracy,
}
