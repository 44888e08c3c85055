"""Functions that users write in a task, guarded: what they raise or return by mistake is told in a
line."""

import inspect
import os
import traceback
from contextlib import contextmanager
from functools import wraps

from rldatasets import Transcript
from utils import UserError

LONGEST_REPLY = 2000  # characters; what is longer is cut


@contextmanager
def errors_of(path):
    """An error of this file becomes a UserError of one line: where, what, and no traceback."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        file = os.path.abspath(path)
        if isinstance(error, SyntaxError) and error.filename == file:
            line, text = error.lineno, error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line, text = next((f.lineno for f in frames[::-1] if f.filename == file), None), error
        place = f"{path}:{line}" if line else path
        text = f"{type(error).__name__}: {' '.join(str(text).split())}"
        raise UserError(f"{place}: {text[:80]}; mend this line") from None


def guarded(function, path):
    """The same function, whose errors are told as those of its file, without a traceback."""

    @wraps(function)
    def call(*inputs):
        try:
            return function(*inputs)
        except Exception:
            with errors_of(path):
                raise

    return call


def worked(make, path, reply, problem):
    """The worked answer from a task's own function; its errors are told as those of `_made`. Where
    there is a reply, several turns become a Transcript, as a completion of several would be."""
    with errors_of(path):
        text = make(problem)
    turns = text if isinstance(text, list) and text and reply else [text]
    for turn in turns:
        if not isinstance(turn, str):
            raise UserError(f"{path}: worked_answer returned {turn!r:.40}, not text, for "
                            f"{problem.question[:40]!r}")  # fmt: skip
    said = turns[:1]
    for turn in turns[1:]:
        told = reply(problem, tuple(said))
        if told is None:
            raise UserError(f"{path}: worked_answer has a turn after {said[-1]!r:.40}, where reply "
                            f"ends the episode, for {problem.question[:40]!r}")  # fmt: skip
        said += [told, turn]
    return Transcript(said[-1], said) if reply else text


def replied(reply, path):
    """What a task's own reply, or its rebut, says, bare and at most LONGEST_REPLY long."""

    @wraps(reply)
    def checked(problem, turns, *others):
        with errors_of(path):
            text = reply(problem, turns, *others)
        if not isinstance(text, str | None):
            raise UserError(f"{path}: {reply.__name__} returned {text!r:.40}, neither text nor "
                            f"None, for {problem.question[:40]!r}")  # fmt: skip
        return text if text is None else text[:LONGEST_REPLY].strip()

    return checked


def takes(function, *arguments, **named):
    """Whether a function can be called with these."""
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError:
        return False
    except ValueError:  # written in C, and does not say what it takes
        pass
    return True
