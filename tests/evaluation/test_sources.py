"""The fingerprint of what judges: it changes with what a function does, and with nothing else."""

import importlib.util
from functools import partial

import pytest

from evaluation.sources import fingerprint

FILE = '''
"""A file of rewards."""
LIMIT = 400


def helper(text):
    return len(text)


def brevity(completion, problem):
    """0.5 for short ones."""
    return 0.5 if helper(completion) < LIMIT else 0.0  # counted in characters
'''


def of(text, tmp_path, name="brevity"):
    path = tmp_path / "rewards.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("rewards_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return fingerprint([getattr(module, name)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("< LIMIT", "<= LIMIT"),
        ("LIMIT = 400", "LIMIT = 40"),
        ("return len(text)", "return len(text.split())"),
        ("0.5 if", "0.6 if"),
        ("def helper(text):", "def helper(text, more=1):"),
    ],
)
def test_what_a_reward_does_is_in_its_fingerprint(old, new, tmp_path):
    assert FILE.count(old) == 1
    assert of(FILE.replace(old, new), tmp_path) != of(FILE, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # counted in characters", ""),
        ('"""0.5 for short ones."""', '"""Half a point for brevity."""'),
        ('"""A file of rewards."""', ""),
        ("\n\n\ndef helper", "\n\n\n\n# helps\ndef helper"),
        ("LIMIT = 400", "LIMIT  =  400"),
    ],
)
def test_how_it_is_written_is_not(old, new, tmp_path):
    assert of(FILE.replace(old, new), tmp_path) == of(FILE, tmp_path)


def test_names_order_and_wrappers(tmp_path):
    def one(completion, problem):
        return 1.0

    def two(completion, problem):
        return 1.0

    assert fingerprint([one]) != fingerprint([two])
    assert fingerprint([one, two]) != fingerprint([two, one])
    assert fingerprint([partial(one, problem=None)]) == fingerprint([one])
    assert fingerprint([max]) != fingerprint([min])  # written in C: by name
