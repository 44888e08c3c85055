"""A server with OpenAI's API as the referee: any of them, through the `openai` client.

Its verdicts are words, A or B, Yes or No, and count 1 or -1: where the two orders of a pair agree,
one text has won, where they do not it is a tie, and what cannot be read is no verdict at all.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai

from evaluation.referee import Scale
from evaluator import after_thoughts
from tasks.asks import SYSTEM
from training.progress import progress
from utils import UserError

AT_ONCE = 8  # requests
SECONDS, RETRIES = 60.0, 5  # of one request; the client waits longer before each further one
TOKENS = 16  # of a reply
KEY, OPENAI_KEY, OPENAI_HOSTS = "REFEREE_API_KEY", "OPENAI_API_KEY", ".api.openai.com"


class UrlReferee:
    """Asks a server's model. Raises UserError where the server does not answer for good; a reply
    that is no verdict is None."""

    scale = Scale(tau=0.0, tie=0.0)
    at_once = 8 * AT_ONCE  # asks whose answers are kept, whatever becomes of the next ones

    def __init__(self, url, model, seconds=SECONDS, retries=RETRIES):
        self.url, self.model, self.name = url, model, f"{model} of a server"
        self.key = key_for(url)
        self.client = openai.OpenAI(
            base_url=url, api_key=self.key, timeout=seconds, max_retries=retries
        )

    def log_odds(self, asks):
        pool, answers = ThreadPoolExecutor(AT_ONCE), []
        try:
            for answer in pool.map(self.verdict, asks):
                answers.append(answer)
                progress.tick(1, "asks", of=len(asks))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return answers

    def verdict(self, ask):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": ask.text},
        ]
        try:
            reply = self.client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=TOKENS
            )
            text = reply.choices[0].message.content or ""
        except (openai.OpenAIError, ValueError) as error:  # the latter: not JSON
            reason = " ".join(str(error).split()).replace(self.key, "***")
            raise UserError(f"--referee_url {self.url}: {type(error).__name__}: {reason[:80]}; "
                            "see whether it runs and has the model") from None  # fmt: skip
        except (AttributeError, IndexError, TypeError):  # JSON, but not a reply
            return None
        return read_verdict(text, ask.words)


def key_for(url):
    """The key for a server, from the environment. OpenAI's own goes to OpenAI alone."""
    theirs = f".{urlsplit(url).hostname}".endswith(OPENAI_HOSTS)
    names = (KEY, OPENAI_KEY) if theirs else (KEY,)
    return next((os.environ[name] for name in names if os.environ.get(name)), "none")


def read_verdict(text, words):
    """1 for a reply that says the first of two words, -1 for the second, None for any other: one
    that names both, or has the letter as an article ("A good reply ...")."""
    letter = len(words[0]) == 1
    flags = 0 if letter else re.IGNORECASE
    text = after_thoughts(text)
    said = rf"\W*(?:(?i:(?:the )?(?:answer|reply)(?: is)?)\W+)*({'|'.join(words)})\b(?! (?!is\b))"
    found = re.match(said if letter else said.removesuffix(r"(?! (?!is\b))"), text, flags)
    if not found:
        return None
    first = found[1].lower() == words[0].lower()
    other = re.search(rf"\b{words[first]}\b", text[found.end() :], flags)
    return None if other else 1.0 if first else -1.0
