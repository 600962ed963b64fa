"""Judges: fixed rules by example, and the server's client against a real HTTP server on the loopback."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from appo.config import Judge as JudgeSettings
from appo.data.schema import VideoSample
from appo.policy.judge import Claim, RuleJudge, ServerJudge, judge_for, perception_rewards

OPTIONS = ("a red disc", "a blue disc", "a green square")


def claim(observation: str, options: tuple[str, ...] = OPTIONS, answer: str = "B") -> Claim:
    return Claim("What carries the marker?", options, answer, observation)


class Server:
    """A small OpenAI-compatible server: yes where there is "blue", and misbehaviour on other words."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body | {"path": self.path})
                observation = body["messages"][0]["content"].rsplit("\n", 1)[1]
                if "sleeps" in observation:
                    time.sleep(1.5)
                if "drips" in observation:
                    self.drip()
                    return
                if "fails" in observation:
                    self.send_error(500)
                    return
                answer = "Yes." if "blue" in observation else "perhaps" if "unclear" in observation else " no"
                reply = {"choices": [{"message": {"content": answer}}]}
                self.reply(b"<html>" if "html" in observation else json.dumps(reply).encode())

            def reply(self, data: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(BrokenPipeError):  # the client gave up, as it should
                    self.wfile.write(data)

            def drip(self) -> None:
                self.send_response(200)
                self.end_headers()
                with suppress(BrokenPipeError, ConnectionResetError):
                    for _ in range(20):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                        time.sleep(0.1)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize(
    ("observation", "reward"),
    [
        ("There is a BLUE disc, marked.", 1.0),
        ("a red disc", 0.0),
        ("a disc", 0.0),  # says as much for another option
        ("a red disc and a blue disc", 0.0),
        ("", 0.0),
    ],
)
def test_rules_want_the_right_option_above_all_others(observation: str, reward: float) -> None:
    assert RuleJudge().score([claim(observation)]) == [reward]


def test_rules_without_options_give_the_share_of_words_found() -> None:
    judge = RuleJudge()
    assert judge.score([claim("the cat runs", (), "a cat runs fast")]) == [0.5]
    assert judge.score([claim("anything", (), "?!")]) == [None]


def test_rewards_are_asked_for_observations_only() -> None:
    sample = VideoSample("1", "s", "multiple choice", "What?", "B", OPTIONS, video="v.mp4")
    texts = [
        "<observation>a blue disc</observation><answer>B</answer>",
        "<answer>B</answer>",
        "<observation>a blue disc",
        "<observation>a red disc</observation>",
    ]
    assert perception_rewards(RuleJudge(), texts, [sample] * 4) == [1.0, None, None, 0.0]
    assert perception_rewards(RuleJudge(), [], []) == []


def test_server_judges_and_is_asked_greedily(server: Server) -> None:
    judge = ServerJudge(server.url, "judge-model", timeout_s=5)
    assert judge.score([claim("a blue disc"), claim("a red disc"), claim("a blue disc")]) == [1.0, 0.0, 1.0]
    assert len(server.bodies) == 2, "the same observation is asked once"
    assert {body["path"] for body in server.bodies} == {"/v1/chat/completions"}
    assert all(body["temperature"] == 0 and body["model"] == "judge-model" for body in server.bodies)
    prompt = server.bodies[0]["messages"][0]["content"]
    assert "Correct answer: B. a blue disc" in prompt
    assert "A. a red disc\nB. a blue disc" in prompt


def test_no_verdict_is_none_and_not_zero(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    judge = ServerJudge(server.url + "/v1/", "m", timeout_s=0.5)
    said = ["it sleeps, blue", "it drips", "it fails", "html", "unclear", "a blue disc", "a red disc"]
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        scores = judge.score([claim(text) for text in said])
    assert scores == [None, None, None, None, None, 1.0, 0.0]
    assert time.monotonic() - started < 1.4, "a late answer is not waited for"
    assert "5 of 7 observations without a verdict" in caplog.text
    before = len(server.bodies)
    assert judge.score([claim("unclear"), claim("a red disc")]) == [None, 0.0]
    assert len(server.bodies) == before + 1, "a missing verdict is asked for again, a given one is not"


def test_verdicts_survive_the_process_and_depend_on_the_model(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "judge" / "verdicts.sqlite"
    settings = JudgeSettings(kind="server", url=server.url, model="m", cache=str(cache), timeout_s=5)
    assert judge_for(settings).score([claim("a blue disc")]) == [1.0]
    assert judge_for(settings).score([claim("a blue disc")]) == [1.0]
    assert len(server.bodies) == 1
    other = settings.model_copy(update={"model": "another"})
    assert judge_for(other).score([claim("a blue disc")]) == [1.0]
    assert len(server.bodies) == 2


def test_nobody_listening_gives_no_reward() -> None:
    assert ServerJudge("http://127.0.0.1:9", "m", timeout_s=1).score([claim("a blue disc")]) == [None]


def test_recipe_without_a_server_to_ask_is_refused() -> None:
    with pytest.raises(ValueError, match="kind=server: needs url and model"):
        JudgeSettings(kind="server", url="http://127.0.0.1:8000")
    assert isinstance(judge_for(JudgeSettings()), RuleJudge)
