"""Anything that is about to leave for MLflow -> the same without passwords, tokens and keys.

Used by every event before it is written to the journal, so that neither disk nor server sees a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

REMOVED = "[removed]"

# The last word of a name decides: `hf_token` is a secret, `max_tokens` and `tokens_per_second` are not.
_SECRET_NAME = re.compile(
    r"(^|[._\-/])(token|secret|password|passwd|passphrase|credentials?|api_?key|access_?key(_?id)?|private_?key"
    r"|secret_?key|secret_?access_?key|session_?token|authorization|auth)$",
    re.IGNORECASE,
)
# user:password@ and user@ in any URL, as in database and S3 addresses
_USERINFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.\-]*://)[^/\s@]+@", re.IGNORECASE)
# signed URLs and keys in query strings
_QUERY = re.compile(
    r"(?P<name>[?&;](?:[a-z0-9_\-]*(?:token|secret|password|signature|credential|api_?key|access_?key))=)[^&\s'\"]+",
    re.IGNORECASE,
)
_KNOWN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|sk-[A-Za-z0-9_\-]{20,}"
    r"|eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{5,})"
)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9_\-.=+/]{8,}", re.IGNORECASE)
# A shorter value could be a common word; removing it everywhere would garble honest text.
_SHORTEST_SECRET = 6


def is_secret_name(name: str) -> bool:
    """True for names whose value must never be shown: `s3.secret_access_key`, `HF_TOKEN`."""
    return bool(_SECRET_NAME.search(name))


def scrub(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` without credentials in URLs, known key shapes, and the values of secret environment variables.

    environment: defaults to this process's; every variable with a secret name is looked for by its value.
    """
    environment = os.environ if environment is None else environment
    for name, value in environment.items():
        if len(value) >= _SHORTEST_SECRET and is_secret_name(name):
            text = text.replace(value, REMOVED)
    text = _USERINFO.sub(rf"\g<scheme>{REMOVED}@", text)
    text = _QUERY.sub(rf"\g<name>{REMOVED}", text)
    text = _BEARER.sub(rf"\1 {REMOVED}", text)
    return _KNOWN_SHAPES.sub(REMOVED, text)


def scrub_items(values: Mapping[str, object]) -> dict[str, str]:
    """Names and values as text: the value of a secret name is removed whole, any other is scrubbed."""
    return {
        name: REMOVED if is_secret_name(name) and value not in (None, "") else scrub(str(value))
        for name, value in values.items()
    }


def scrub_cell(value: object) -> object:
    """A cell that JSON and MLflow's table can hold; text is scrubbed."""
    return value if value is None or isinstance(value, bool | int | float) else scrub(str(value))
