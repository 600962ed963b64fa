"""What a completion claims to have seen -> PA-GRPO's perception reward (VideoP2R, arXiv 2511.11113).

A judge reads the question and the observation, never the video, and says whether the right answer follows.
Two kinds: fixed rules, which need nothing, and a text model behind an OpenAI-compatible server (vLLM's, say).
No verdict is not a bad verdict: a judge that fails or is late gives None, and `advantages` leaves that
completion out.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from appo.errors import SettingError
from appo.policy.spans import tag_text
from appo.prompts import OBSERVATION, option_letter, with_options

if TYPE_CHECKING:
    from appo.config import Judge as JudgeSettings

log = logging.getLogger(__name__)


class Asked(Protocol):
    """What a judge needs to know of a sample; `VideoSample` has it."""

    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def options(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Claim:
    """One observation to be judged. answer: an option's letter, or text where there are no options."""

    question: str
    options: tuple[str, ...]
    answer: str
    observation: str

    @property
    def answer_text(self) -> str:
        """The right answer in words."""
        letters = [option_letter(index) for index in range(len(self.options))]
        return self.options[letters.index(self.answer)] if self.answer in letters else self.answer


class Judge(Protocol):
    """Scores observations. The result has one entry per claim: a reward in [0, 1], or None for no verdict."""

    def score(self, claims: Sequence[Claim]) -> list[float | None]: ...


def perception_rewards(
    judge: Judge, completions: Sequence[str], samples: Sequence[Asked]
) -> list[float | None]:
    """The perception reward of each completion, judged in one batch.

    None where the completion has no <observation> part: there is no token it could be credited to, and the
    format reward answers for the omission. An empty part is judged like any other.
    """
    claims: dict[int, Claim] = {}
    for index, (text, sample) in enumerate(zip(completions, samples, strict=True)):
        observation = tag_text(text, OBSERVATION)
        if observation is not None:
            claims[index] = Claim(sample.question, sample.options, sample.answer, observation)
    scores = dict(zip(claims, judge.score(list(claims.values())), strict=True))
    return [scores.get(index) for index in range(len(completions))]


def judge_for(settings: JudgeSettings) -> Judge:
    """The judge that a recipe's `policy.judge` asks for."""
    if settings.kind == "rules":
        return RuleJudge()
    if settings.url is None or settings.model is None:
        raise SettingError("policy.judge.kind=server: needs policy.judge.url and policy.judge.model")
    return ServerJudge(
        settings.url,
        settings.model,
        timeout_s=settings.timeout_s,
        workers=settings.workers,
        cache=Path(settings.cache) if settings.cache else None,
    )


class RuleJudge:
    """Deterministic: does the observation speak of the right answer, and more than of any wrong one?

    With options, 1 when the share of the right option's words that stand in the observation is above every
    wrong option's, else 0. Without, that share itself. None when the answer has no word to look for.
    """

    def score(self, claims: Sequence[Claim]) -> list[float | None]:
        return [self._one(claim) for claim in claims]

    def _one(self, claim: Claim) -> float | None:
        said = _words(claim.observation)
        right = _share(claim.answer_text, said)
        if right is None:
            return None
        if not claim.options:
            return right
        wrong = [_share(option, said) or 0.0 for option in claim.options if option != claim.answer_text]
        return float(right > max(wrong, default=0.0))


_INSTRUCTION = (
    "You are given a question about a video that you cannot see, its correct answer, and what a viewer wrote "
    "down. Does the correct answer follow from what the viewer wrote, without seeing the video and without "
    "guessing? Reply with one word: yes or no."
)


class ServerJudge:
    """Asks a text model at `url` + /v1/chat/completions; greedy, so that a verdict can be kept and given
    again.

    timeout_s: how long one claim may take, of which `workers` are asked at once. cache: SQLite file of
    verdicts by hash of model and prompt, shared by processes; None keeps them in memory. A failed request is
    logged once a batch, with the count, and not kept.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout_s: float = 30.0,
        workers: int = 16,
        cache: Path | None = None,
        api_key: str | None = None,
    ) -> None:
        self._endpoint = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        self._model = model
        self._timeout_s = timeout_s
        self._workers = workers
        self._api_key = api_key
        self._verdicts = _Verdicts(cache)

    def score(self, claims: Sequence[Claim]) -> list[float | None]:
        bodies = {self._key(body): body for body in map(self._body, claims)}
        keys = [self._key(self._body(claim)) for claim in claims]
        known = self._verdicts.read(list(bodies))
        asked = [key for key in bodies if key not in known]
        problems: list[str] = []
        if asked:
            with ThreadPoolExecutor(min(self._workers, len(asked)), thread_name_prefix="judge") as pool:
                answers = list(pool.map(lambda key: self._ask(bodies[key], problems), asked))
            fresh = {key: v for key, v in zip(asked, answers, strict=True) if v is not None}
            self._verdicts.write(fresh)
            known |= fresh
        if problems:
            log.warning(
                "judge at %s: %d of %d observations without a verdict; the first because: %s",
                self._endpoint, len(problems), len(asked), problems[0],
            )  # fmt: skip
        return [known.get(key) for key in keys]

    def _read(self, reply: http.client.HTTPResponse, deadline: float) -> bytes:
        """The whole reply, or TimeoutError: the socket's own timeout starts anew with every byte."""
        parts = []
        while part := reply.read1(65536):
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no complete reply within {self._timeout_s} s")
        return b"".join(parts)

    def _body(self, claim: Claim) -> bytes:
        question = with_options(claim.question, claim.options)
        answer = claim.answer if claim.answer == claim.answer_text else f"{claim.answer}. {claim.answer_text}"
        prompt = (
            f"{_INSTRUCTION}\n\nQuestion: {question}\n\nCorrect answer: {answer}\n\n"
            f"What the viewer wrote:\n{claim.observation}"
        )
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 8,
        }
        return json.dumps(body, sort_keys=True).encode()

    def _key(self, body: bytes) -> str:
        return hashlib.sha256(body).hexdigest()

    def _ask(self, body: bytes, problems: list[str]) -> float | None:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self._endpoint, data=body, headers=headers, method="POST")
        deadline = time.monotonic() + self._timeout_s
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:
                text = json.loads(self._read(reply, deadline))["choices"][0]["message"]["content"]
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as error:
            problems.append(f"{type(error).__name__}: {error}")
            return None
        except (ValueError, KeyError, IndexError, TypeError) as error:  # a reply that is no chat completion
            problems.append(f"reply not understood: {type(error).__name__}: {error}")
            return None
        verdict = _yes_or_no(str(text))
        if verdict is None:
            problems.append(f"neither yes nor no: {str(text)[:80]!r}")
        return verdict


class _Verdicts:
    """Verdicts by key. One connection under one lock: workers only ask the server, they do not come here."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path or ":memory:", timeout=30.0, check_same_thread=False)
        with self._lock, self._database:
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL)"
            )

    def read(self, keys: Sequence[str]) -> dict[str, float]:
        with self._lock:
            found = (
                self._database.execute("SELECT key, score FROM verdicts WHERE key = ?", (key,)).fetchone()
                for key in keys
            )
            return {row[0]: row[1] for row in found if row is not None}

    def write(self, scores: dict[str, float]) -> None:
        with self._lock, self._database:
            self._database.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", scores.items())


def _yes_or_no(text: str) -> float | None:
    word = re.search(r"[a-z]+", text.lower())
    return {"yes": 1.0, "no": 0.0}.get(word[0]) if word else None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _share(text: str, said: set[str]) -> float | None:
    words = _words(text)
    return len(words & said) / len(words) if words else None
