"""What judges a run's completions, as fingerprints of its source: a run goes on, and is compared,
under the rewards and the verdicts that it began with."""

import ast
import functools
import hashlib
import inspect

from tasks import wants_referee

DOCUMENTED = (ast.Module, ast.FunctionDef, ast.ClassDef)


def sources_of(task):
    """Facts of a task for config.json: SHA-256 of the source of its rewards, with that of a game's
    rules, of what its world replies and of what a referee is asked, and of its verdict."""
    rules = filter(None, [task.game and task.game.payoff, task.reply, task.rebut])
    functions = [*task.reward_functions, *rules]
    asks = any(map(wants_referee, task.reward_functions))
    asked = [repr((task.criterion, task.rubric, task.golden))] if asks else []
    return {
        "rewards_sha256": fingerprint(functions, asked),
        "verdict_sha256": fingerprint([task.is_correct]),
    }


def fingerprint(functions, more=()):
    """The SHA-256 of these functions' names and of the files that they stand in, helpers included,
    less comments, white space and docstrings, and of `more` texts. Imported modules do not
    count."""
    functions = [_plain(function) for function in functions]
    files = {inspect.getsourcefile(f) for f in functions if inspect.isfunction(f)}
    parts = [getattr(f, "__name__", repr(f)) for f in functions]
    for file in sorted(files, key=str):
        with open(file, encoding="utf-8") as source:
            tree = ast.parse(source.read())
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        parts.append(ast.unparse(tree))
    return hashlib.sha256("\0".join([*parts, *more]).encode(errors="backslashreplace")).hexdigest()


def _plain(function):
    """What a partial or a wrapper calls in the end."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)
