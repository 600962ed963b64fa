"""The parser: what counts as an answer, and that no text can hang or crash it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.rewards.answers import extract_answer, extract_choice, extract_number, extract_tag
from appo.rewards.temporal import extract_spans, parse_spans

OPTIONS = ("a dog", "a cat", "A person walks", "red.")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> cross shows red </think> <answer> B </answer>", "B"),
        ("<THINK>x</THINK><Answer>B</ANSWER>", "B"),
        ("B", None),
        ("<answer>B", None),
        ("<answer></answer>", None),
        ("<answer> \n </answer>", None),
        # the reasoning is not the answer
        ("<think>maybe <answer>A</answer> but</think><answer>C</answer>", "C"),
        ("<think>maybe <answer>A</answer> but", None),
        ("<think>never closed <answer>A</answer>", None),
        # the opening tag stood in the prompt
        ("so <answer>A</answer> no</think><answer>D</answer>", "D"),
        ("<answer>A</answer><answer>B</answer>", "A"),
        ("<answer>it is <answer>B</answer>", "B"),
        ("<think>x</think></think><answer>B</answer>", "B"),
    ],
)
def test_answer_is_what_stands_in_the_tag_outside_of_reasoning(text, answer):
    assert extract_answer(text) == answer


def test_other_tags_are_read_by_name():
    text = "<observation> o </observation><think>t</think><answer>A</answer><time> 1 to 2 </time>"
    assert extract_tag(text, "observation") == "o"
    assert extract_tag(text, "think") == "t"
    assert extract_tag(text, "time") == "1 to 2"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(
            (text, "B")
            for text in ("B", "b", "(B)", "( b )", "B.", "B:", "B. a cat", "B) a cat", "(B) a cat")
        ),
        *((text, "B") for text in ("Answer: B", "The correct answer is B", "Option B.", "a cat", "A  CAT")),
        ("A", "A"),
        ("a", "A"),
        ("Red", "D"),
        ("A person walks", "C"),  # the text of option C, not the letter A
        ("A person", None),
        ("E", None),
        ("because", None),
        ("A and B", None),
        ("", None),
    ],
)
def test_choice(answer, letter):
    assert extract_choice(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,000", 1000.0), ("1000", 1000.0), ("-2.5", -2.5), ("3 meters", 3.0), ("40%", 40.0), ("1e3", 1000.0)]
    + [(text, None) for text in ("", "two", "3 to 4", "it is 5", "1,00", "nan", "inf", "1e999", "9" * 40)],
)
def test_number(text, number):
    assert extract_number(text) == number


def test_first_number_of_a_sentence():
    assert extract_number("about 2.5 of 7", where="first") == 2.5
    assert extract_number("none", where="first") is None


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<time>",
        "</time>",
        "A",
        "(B)",
        "1:02",
        " to ",
        "9",
        "-",
        ",",
    ]
)


@given(st.lists(st.one_of(st.text(max_size=20), PIECES), max_size=30).map("".join))
@settings(max_examples=300, deadline=None)
def test_parsers_survive_any_text(text):
    answer = extract_answer(text)
    assert answer is None or (answer and answer in text)
    assert extract_choice(text, OPTIONS) in {None, "A", "B", "C", "D"}
    extract_number(text)
    extract_number(text, where="first")
    assert all(span[0] >= 0 and span[1] >= 0 for span in extract_spans(text) or [])


HOSTILE = [
    "<think>",
    "</think>",
    "<answer>",
    "a",
    " ",
    "9",
    "9:",
    "1,",
    "( ",
    "1 to ",
    "1 -",
    "e1",
    "é",
    "\U0001f600",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_megabyte_is_read_in_linear_time(piece):
    """Quadratic time on 1 MB would be hours; measured: 0.1 to 0.4 s."""
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    extract_answer("<answer>" + text + "</answer>")
    extract_choice("A" + text + "x", OPTIONS)
    extract_number(text)
    extract_number(text, where="first")
    parse_spans(text)
    assert time.process_time() - start < 5.0
