"""What looks like a secret never leaves; what does not look like one is not touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from appo.config import RecipeError, load_recipe
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


@pytest.mark.parametrize("key", ["tracking.uri", "policy.judge.url", "training.vllm_server_url"])
def test_a_recipe_with_a_password_is_refused_without_repeating_it(key: str, tmp_path: Path) -> None:
    """The page of a comparison, MLflow and Kubeflow show the whole recipe."""
    *sections, name = key.split(".")
    lines = ["name: mine", "model: {path: somewhere}"] + [
        f"{'  ' * i}{section}:" for i, section in enumerate(sections)
    ]
    lines.append(f"{'  ' * len(sections)}{name}: postgresql://user:hunter2@db.example:5432/x")
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=f"{key}: holds a password") as caught:
        load_recipe(str(path))
    assert "hunter2" not in str(caught.value)


def test_addresses_without_a_password_are_taken() -> None:
    uri = "postgresql://user@db.example:5432/x"
    assert load_recipe("demo", [f"tracking.uri={uri}"]).tracking.uri == uri
