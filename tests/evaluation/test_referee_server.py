"""A real server with OpenAI's API, `transformers serve`, as the referee. Not in the default suite:
it needs fastapi, uvicorn and openai, the embedded model, and a minute."""

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
from reading.embedded import embedded_folder

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


def test_a_real_server_s_verdicts_are_read(url, tmp_path):
    """SmolLM2's, which says A or B to every other ask (3 of 6), else explains itself."""
    from evaluation.referee_url import UrlReferee

    file, texts = tmp_path / "referee.jsonl", ["Cats are small animals.", "Cats cats cats.", "no"]
    judge = UrlReferee(url, str(embedded_folder()), seconds=120.0, retries=1)
    referee = Referee(judge, ASKING, file=file)
    rates = referee.win_rates(CATS, texts)
    counts = referee.counts()
    assert counts["calls"] == 6
    assert counts["verdicts"] + counts["unread"] == 6 and counts["verdicts"] > 0
    assert all(0 <= rate <= 1 for rate in rates)
    again = Referee(judge, ASKING, file=file)
    assert again.win_rates(CATS, texts) == rates
    assert again.counts()["calls"] == 0
