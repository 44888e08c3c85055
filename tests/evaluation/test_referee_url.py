"""A server as the referee: its verdicts, its faults, and its key, which is nowhere to be read."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TASK

from evaluation.referee import Referee
from evaluation.win_rate import win_rate
from rldatasets import Problem
from tasks.asks import Ask
from utils import UserError

pytest.importorskip("openai", reason="pip install openai, see requirements-dev.txt")

from evaluation.referee_url import UrlReferee, key_for, read_verdict

KEY = "sk-canary-4242"
CATS = Problem("Tell me about cats.", "cats", "")


class Server:
    """Answers as it is told: a text, or a function of the prompt; or fails as it is told."""

    def __init__(self, answer="A", faults=()):
        self.answer, self.faults, self.requests = answer, list(faults), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((body, self.headers["Authorization"]))
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == "stall":
                    time.sleep(3)
                    return
                text = outer.answer
                text = text(body["messages"][-1]["content"]) if callable(text) else text
                reply = {"choices": [{"index": 0, "message": {"role": "assistant",
                                                              "content": text}}]}  # fmt: skip
                if fault == "shape":
                    reply = {"choices": []}
                data = json.dumps(reply).encode()
                if fault == "nonsense":
                    data = b"<html>not JSON"
                if isinstance(fault, int):
                    data = json.dumps({"error": {"message": f"no, {KEY}"}}).encode()
                self.send_response(fault if isinstance(fault, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("REFEREE_API_KEY", KEY)
    servers = []

    def start(*args, retries=2, seconds=5.0, **more):
        servers.append(Server(*args, **more))
        server = servers[-1]
        judge = UrlReferee(server.url, "some-model", seconds=seconds, retries=retries)
        return server, Referee(judge, TASK)

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def longer(prompt):
    """The verdict of a server that likes the longer text, and is told nothing of orders."""
    a, b = (prompt.partition(f"Reply {letter}:")[2].partition("\n\n")[0] for letter in "AB")
    return "A" if len(a) > len(b) else "B"


def test_openai_s_key_goes_to_openai_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    monkeypatch.delenv("REFEREE_API_KEY", raising=False)
    for url in ("https://api.openai.com/v1", "https://eu.api.openai.com/v1"):
        assert key_for(url) == "theirs"
    for url in ("http://127.0.0.1:8000/v1", "https://api.openai.com.example/v1",
                "https://myapi.openai.com/v1"):  # fmt: skip
        assert key_for(url) == "none"
    monkeypatch.setenv("REFEREE_API_KEY", "ours")
    assert key_for("https://api.openai.com/v1") == key_for("http://x/v1") == "ours"


def test_agreeing_verdicts_win_and_the_server_is_asked_in_both_orders(serve):
    server, referee = serve(longer)
    pairs = [("a long text", "short"), ("x", "xx")]
    asked = Problem(CATS.question, "", "")
    referee.task = type("Task", (), {"system_prompt": "", "criterion": "is better", "rubric": ()})
    assert referee.prefers(asked, pairs) == [1.0, 0.0]
    assert len(server.requests) == 4
    body, key = server.requests[0]
    assert (body["model"], body["temperature"], key) == ("some-model", 0, f"Bearer {KEY}")


@pytest.fixture
def plain(serve):
    def start(*args, **more):
        server, referee = serve(*args, **more)
        task = {"system_prompt": "", "criterion": "is better", "rubric": ()}
        referee.task = type("Task", (), task)
        return server, referee

    return start


def test_verdicts_that_go_by_the_place_are_ties_and_unreadable_ones_are_dropped(plain):
    _, referee = plain("A")
    assert referee.win_rates(CATS, ["a", "b", "c"]) == [0.5] * 3
    assert referee.counts()["unread"] == 0
    _, referee = plain("Both A and B are fine.")
    assert referee.prefers(CATS, [("a", "b")]) == [None]
    assert referee.win_rates(CATS, ["a", "b", "c"]) == [0.5] * 3  # and nobody has lost
    assert referee.counts()["unread"] == 6
    assert win_rate([None, None], "referee") == {}


def test_texts_alone_win_where_one_is_yes_and_the_other_no(plain):
    _, referee = plain(lambda prompt: "Yes." if "good" in prompt.partition("Reply:")[2] else "No")
    rates = referee.win_rates(CATS, ["good 1", "bad 1", "good 2"], "is fine", alone=True)
    assert rates == [0.75, 0.0, 0.75]


@pytest.mark.parametrize("fault", [500, 429, 503, "stall"])
def test_what_passes_is_waited_out(plain, fault):
    server, referee = plain("A", faults=[fault], seconds=1.0)
    assert referee.answer([Ask("is better", "Q", "a", "b")]) == [1.0]
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [500, 429, 401, 404, "stall"])
def test_what_does_not_pass_is_one_line_without_the_key_and_nothing_is_kept(plain, fault, caplog):
    caplog.set_level(logging.DEBUG)
    server, referee = plain("A", faults=[fault] * 9, retries=1, seconds=0.3)
    with pytest.raises(UserError) as raised:
        referee.answer([Ask("is better", "Q", "a", "b")])
    assert f"--referee_url {server.url}: " in str(raised.value)
    assert KEY not in str(raised.value) + caplog.text and "\n" not in str(raised.value)
    assert referee.answers == {}


def test_a_reply_without_a_text_is_no_verdict_and_what_is_no_reply_at_all_is_told(plain):
    _, referee = plain("A", faults=["shape"])
    assert referee.answer([Ask("is better", "Q", "a", "b")]) == [None]
    server, referee = plain("A", faults=["nonsense"])
    with pytest.raises(UserError, match=f"--referee_url {server.url}: JSONDecodeError"):
        referee.answer([Ask("is better", "Q", "a", "b")])


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1), ("B", -1), ("A is better.", 1), ("A good reply.", None),
        (" B.", -1), ("**A**", 1), ("Reply B", -1), ("Answer: A", 1),
        ("The answer is B.", -1), ('"A"', 1), ("<think>A or B</think>\nB", -1), ("A, not B", None),
        ("", None), ("Apple", None), ("C", None), ("Both A and B", None), ("I prefer A", None),
        ("A and B", None), ("AB", None),
    ],
)  # fmt: skip
def test_a_verdict_is_one_word_and_nothing_else_counts(text, verdict):
    assert read_verdict(text, ("A", "B")) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"), [("Yes.", 1), ("no, it is", -1), ("Yes and no", None)]
)
def test_yes_and_no_are_read_alike(text, verdict):
    assert read_verdict(text, ("Yes", "No")) == verdict
