"""What judges a run's completions, as fingerprints of its source: a run goes on, and is compared,
under the rewards and the verdicts that it began with."""

import ast
import functools
import hashlib
import inspect

DOCUMENTED = (ast.Module, ast.FunctionDef, ast.ClassDef)


def sources_of(task):
    """Facts of a task for config.json: SHA-256 of the source of its rewards, with that of what its
    world replies, and of its verdict."""
    return {
        "rewards_sha256": fingerprint([*task.reward_functions, *filter(None, [task.reply])]),
        "verdict_sha256": fingerprint([task.is_correct]),
    }


def fingerprint(functions):
    """The SHA-256 of these functions' names and of the files that they stand in, helpers included,
    less comments, white space and docstrings. Imported modules do not count."""
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
    return hashlib.sha256("\0".join(parts).encode(errors="backslashreplace")).hexdigest()


def _plain(function):
    """What a partial or a wrapper calls in the end."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function)
