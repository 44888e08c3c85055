"""A real server with OpenAI's API, `transformers serve`, as the referee. Not in the default suite:
it needs fastapi, uvicorn and openai, and a minute."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib import util

import pytest
from test_referee import ASKING, CATS

from evaluation.referee import Referee

NEEDED = ("openai", "fastapi", "uvicorn")
pytestmark = pytest.mark.slow


@pytest.fixture
def url(tmp_path):
    if missing := [name for name in NEEDED if not util.find_spec(name)]:
        pytest.skip(f"pip install {' '.join(missing)} for this test")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve",
        "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        until = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (
                    tmp_path / "log"
                ).read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_a_real_server_answers_and_what_it_says_is_read_or_counted(url, saved_models, tmp_path):
    from evaluation.referee_url import UrlReferee

    file = tmp_path / "referee.jsonl"
    judge = UrlReferee(url, str(saved_models["qwen2"]), seconds=120.0, retries=1)
    referee = Referee(judge, ASKING, file=file)
    rates = referee.win_rates(CATS, ["a cat", "cats", "no"])
    counts = referee.counts()
    assert counts["calls"] == 6
    assert counts["verdicts"] + counts["unread"] == 6  # a random model hardly ever says A or B
    assert all(0 <= rate <= 1 for rate in rates)
    again = Referee(judge, ASKING, file=file)
    assert again.win_rates(CATS, ["a cat", "cats", "no"]) == rates
    assert again.counts()["calls"] == 0
