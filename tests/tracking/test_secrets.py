"""What looks like a secret never leaves; what does not look like one is not touched."""

from __future__ import annotations

import pytest

from appo.tracking.secrets import REMOVED, is_secret_name, scrub, scrub_items


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "s3.secret_access_key",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "db.password",
        "judge.api_key",
        "apikey",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert scrub_items({name: "x9"}) == {name: REMOVED}


@pytest.mark.parametrize(
    "name",
    ["evaluation.max_tokens", "tokens_per_second", "num_tokens", "author", "perception.k1", "key_moment"],
)
def test_ordinary_names_stay(name: str) -> None:
    assert scrub_items({name: 512}) == {name: "512"}


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("postgresql://mlflow:hunter2@db:5432/mlflow", "hunter2"),
        ("https://u:p%40ss@host/x?y=1", "p%40ss"),
        ("https://s3/x?X-Amz-Signature=abcdef0123&X-Amz-Credential=AKIA0", "abcdef0123"),
        ("Authorization: Bearer abcdef123456789", "abcdef123456789"),
        ("see hf_abcdefghijklmnopqrstuvwxyz", "hf_abcdefghijklmnopqrstuvwxyz"),
        ("key AKIAABCDEFGHIJKLMNOP used", "AKIAABCDEFGHIJKLMNOP"),
    ],
)
def test_shapes_of_secrets(text: str, secret: str) -> None:
    assert secret not in scrub(text, {})


def test_values_of_secret_variables_are_removed_wherever_they_stand() -> None:
    environment = {"HF_TOKEN": "correct-horse", "HOME": "/root", "DB_PASSWORD": "x"}
    assert (
        scrub("could not log in with correct-horse at /root", environment)
        == f"could not log in with {REMOVED} at /root"
    )


def test_ordinary_text_is_unchanged() -> None:
    text = "s3://bucket/data/video.mp4 at 3:20, mail someone@example.org, cost 5 tokens"
    assert scrub(text, {}) == text
