"""Tasks: what the model is asked and how it is judged. A file here is one task.

To add one, write NAME.py here; `--dataset_name NAME` picks it and no other file changes; so does
`--dataset_name FILE.py`, wherever that lies (with
`--preset cpu`, give --max_completion_length and --temperature too). A whole task:

    from rldatasets import Problem

    def problems(split, seed):
        numbers = range(0, 100, 2) if split == "train" else range(1, 100, 2)
        return [Problem(f"What is twice {n}?", str(2 * n), f"{n} + {n} = {2 * n}") for n in numbers]

A Problem is (question, answer, solution, extra={}); where the solution is "", --cold_start_steps is
0. "test" is the same for every seed, or runs could not be compared. A file defines some of the
following; what it leaves out is the default:

problems(split, seed)    the Problems of "train" or "test", two lists without a common question;
                         default: the lines of --dataset_path
SYSTEM_PROMPT            default: rldatasets.SYSTEM_PROMPT
REWARD_FUNCTIONS         functions (completion, problem) -> float, and with @evaluator.of_group
                         (completions, problem) -> floats, or (completions, problem, referee);
                         default: those in evaluator.py
is_correct               what accuracy counts, (completion, problem) -> bool; default: evaluator.py
worked_answer(problem)   what a cold start teaches to write; default: rldatasets.worked_answer
reply(problem, turns)    what the world answers after a completion, a text, or None where that is
                         the end; turns: what policy and world said so far, in turn. Rewards and
                         is_correct then read the policy's last turn, whose .turns are all, and
                         worked_answer may be a list of the policy's turns: see docs/episodes.md
rebut(problem, turns, others)  with --rebuttals: what a completion is told before its next turn,
                         or None; others: {question: the turns so far of its completion in the same
                         place of its group}, of all that is sampled with it
VARIANTS                 for --dataset_name NAME/VARIANT and problems(split, seed, variant)
TOGETHER                 so many problems that follow each other come in one step
measured                 (problems, answers, referee) -> {name: shares}: more held-out figures
CRITERION                what a referee prefers a text for: "answers the question better"
RUBRIC                   [(weight, criterion), ...], for the reward `rubric`
GOLDEN                   [(question, better text, worse text), ...] that a referee is tried on; a
                         fourth names the one criterion, of several, that a pair is about
LESSONS                  the same, of other questions, for tasks/judging.py to teach a referee by
JUDGE                    a verifier_process.Judge that rewards and is_correct ask, and ...
payoff, and more          of a game that the policy plays against itself, see tasks/games.py
judge_request            (completion, problem) -> what they will ask it, or None: --reward_workers
                         then judges a step's completions side by side

`--evaluator FILE.py` names a file anywhere with a REWARD_FUNCTIONS, and a SYSTEM_PROMPT, is_correct
and worked_answer if it likes, that win over the task's. It may import what lies beside it.
"""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import evaluator
import rldatasets
from reading.columns import Fields
from rldatasets import BUILT_IN, Problem, Problems, hub_dataset, load_problems
from tasks import games
from tasks.guarded import errors_of, guarded, replied, takes, worked
from utils import UserError, hint

TASKS = Path(__file__).parent
# The files here that are none.
NO_TASKS = ("__init__", "asks", "expressions", "games", "guarded", "verifier_process")


def dataset_names():
    """What --dataset_name may be, variants aside: the built-in datasets and the tasks."""
    found = (path.stem for path in TASKS.glob("*.py"))
    return [*BUILT_IN, *sorted(name for name in found if name not in NO_TASKS)]


def is_on_hub(dataset_name):
    """Whether this --dataset_name is OWNER/NAME[/CONFIGURATION] of a dataset on the hub."""
    known = dataset_name.partition("/")[0] in dataset_names() or dataset_name.endswith(".py")
    return not known and hub_dataset(dataset_name) is not None


@dataclass(frozen=True)
class Task:
    """A dataset and its rewards. `problems(split)` are the Problems of "train" or "test"."""

    problems: Callable
    system_prompt: str
    reward_functions: list
    is_correct: Callable
    worked_answer: Callable
    reply: Callable | None = None  # where a completion may be one turn of several
    rebut: Callable | None = None  # where completions answer each other
    judge: object = None  # a verifier_process.Judge, where judge_request says what it is asked
    judge_request: Callable | None = None
    together: int = 1
    measured: Callable | None = None
    criterion: str = "answers the question better"  # these three are for a referee
    rubric: tuple = ()
    golden: tuple = ()
    game: games.Game | None = None  # which the policy plays against itself, for its questions


def load_task(args):
    """The Task that these flags name: dataset_name, dataset_path, difficulty, evaluator, seed.

    Raises UserError, naming file and line where there is one, for whatever is wrong with the files
    of the task and of --evaluator, and for a flag that does not fit the task.
    """
    name, path, variant = task_file(args.dataset_name)
    if is_on_hub(args.dataset_name):
        name, variant = args.dataset_name, ""
    of_file = path.parent != TASKS or (name in dataset_names() and name not in BUILT_IN)
    task = _definitions_of_task(name, path) if of_file else {}
    if game := games.game_of(task, path):
        task = {**games.as_task(game), **task}
    _check_variant(name, variant, task.get("VARIANTS"))
    if "problems" in task:
        if args.dataset_path is not None:
            raise UserError(f"--dataset_path: {name} makes its own problems; leave it out")
        more = (variant,) if variant else ()
        make, together = task["problems"], task.get("TOGETHER", 1)
        problems = partial(_made, make, path, together, args.seed, *more)
    else:
        if args.dataset_path is None and of_file:
            raise UserError(f"--dataset_name {name}: reads files; name them by --dataset_path")
        problems = partial(_read, args)
    if has_own_evaluator(args):
        task = {**task, **own_evaluator(args.evaluator)}
    whole = Task(
        problems=problems,
        system_prompt=task.get("SYSTEM_PROMPT", rldatasets.SYSTEM_PROMPT),
        reward_functions=task.get("REWARD_FUNCTIONS", evaluator.REWARD_FUNCTIONS),
        is_correct=task.get("is_correct", evaluator.is_correct),
        worked_answer=task.get("worked_answer", rldatasets.worked_answer),
        reply=task.get("reply"),
        rebut=task.get("rebut"),
        judge=task.get("JUDGE") if "judge_request" in task else None,
        judge_request=task.get("judge_request"),
        together=task.get("TOGETHER", 1),
        measured=task.get("measured"),
        criterion=task.get("CRITERION", Task.criterion),
        rubric=tuple(task.get("RUBRIC", ())),
        golden=tuple(task.get("GOLDEN", ())),
        game=game,
    )
    if game and "outcome" in [function.__name__ for function in whole.reward_functions]:
        raise UserError(f"--dataset_name {args.dataset_name}: how a game ends is a reward called "
                        "outcome already; rename yours")  # fmt: skip
    if variant and not getattr(args, "allow_weak_verifier", False):
        return replace(whole, problems=partial(_verifiable, whole, args.dataset_name))
    return whole


def task_file(name):
    """(a dataset's name, its task's file, its variant) of a --dataset_name: NAME, NAME/VARIANT or
    FILE.py, which has no variants."""
    if name.endswith(".py"):
        return Path(name).stem, Path(name), ""
    name, _, variant = name.partition("/")
    return name, TASKS / f"{name}.py", variant


def _definitions_of_task(name, path):
    if path.parent == TASKS:
        return definitions(path, f"tasks.{name}")
    if not path.is_file():
        raise UserError(f"--dataset_name {path}: no such file; name one that is there")
    module_name = f"task {path.absolute()}"
    with _files_beside(path, module_name):
        return definitions(path, module_name)


def has_own_evaluator(args):
    """Whether --evaluator names a file. `gsm8k` is its only value in the original repository."""
    return args.evaluator not in (None, "gsm8k")


def check_weights(weights, reward_functions, overlong_buffer=0):
    """Raise UserError where --reward_weights names no reward function, or where one has the name
    that --overlong_buffer gives to its own."""
    names = [function.__name__ for function in reward_functions]
    if overlong_buffer and "overlong" in names:
        raise UserError(f"--overlong_buffer {overlong_buffer}: its reward is called overlong, and "
                        "so is one of yours; rename that, or leave the flag out")  # fmt: skip
    known = " ".join(names) or "none"
    for name in weights:
        if name not in names:
            raise UserError(f"--reward_weights {name}: no such reward; there are {known}")


def own_evaluator(path):
    """What the file of --evaluator defines: REWARD_FUNCTIONS at least. Raises UserError."""
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise UserError(
            f"--evaluator {path}: no such file; expected a FILE.py with REWARD_FUNCTIONS"
        )
    name = f"evaluator {os.path.abspath(path)}"
    with _files_beside(path, name):
        found = definitions(path, name)
    if "REWARD_FUNCTIONS" not in found:
        raise UserError(f"{path}: no REWARD_FUNCTIONS; add REWARD_FUNCTIONS = [your_function]")
    found.pop("problems", None)  # a task's file serves too, for its rewards
    return found


def _read(args, split):
    said = {field.name: getattr(args, field.name, field.default) for field in fields(Fields)}
    return load_problems(
        args.dataset_name, args.dataset_path, split, args.seed, args.difficulty, Fields(**said)
    )


def _made(make, path, together, seed, *rest):
    """Problems from a task's own function, on whose errors the user hears of the task's file."""
    *variant, split = rest
    with errors_of(path):
        problems = list(make(split, seed, *variant))
    if not problems or not all(isinstance(problem, Problem) for problem in problems):
        raise UserError(f"{path}: problems({split!r}, {seed}) is not a list of Problems, or empty; "
                        "see rldatasets.Problem")  # fmt: skip
    if len(problems) % together:
        raise UserError(f"{path}: problems({split!r}, {seed}) are {len(problems)}, no multiple of "
                        f"TOGETHER = {together}")  # fmt: skip
    return Problems(problems, seed)


# (an answer that says nothing of a problem, how it is called, the share of problems beyond which a
# verifier that takes it for right is weak); None: the answer to the next problem, which among two
# or three possible ones is often right.
NOTHING = (("", "an empty answer", 1 / 2), ("?", "the answer ?", 1 / 2),
           ("0", "the answer 0", 1 / 2), (None, "another problem's answer", 3 / 4))  # fmt: skip
JUDGED = 64  # problems that this is tried on


def _verifiable(task, name, split):
    """The problems of a variant. Raises UserError where its verifier is weak."""
    problems = task.problems(split)
    sample = problems[:JUDGED] if split == "test" else []
    for text, called, share in NOTHING:
        right = 0
        for problem, following in zip(sample, [*sample[1:], *sample[:1]]):
            answer = following.answer if text is None else text
            if answer != problem.answer or text is not None:
                said = task.worked_answer(replace(problem, answer=answer))
                right += bool(task.is_correct(said, problem))
        if right > share * len(sample):
            raise UserError(f"--dataset_name {name}: its verifier takes {called} for right in "
                            f"{right} of {len(sample)} problems; choose another, or add "
                            "--allow_weak_verifier")  # fmt: skip
    return problems


def _check_variant(name, variant, variants):
    flag = f"--dataset_name {name}/{variant}" if variant else f"--dataset_name {name}"
    if variants is None and variant:
        raise UserError(f"{flag}: {name} has no variants; leave out /{variant}")
    if variants is not None and variant not in variants:
        advice = hint(variant, variants) if variant else f"add one, e.g. {name}/{variants[0]}"
        raise UserError(f"{flag}: no such variant; {advice}")


# --- files that users write ----------------------------------------------------------------------


def definitions(path, module_name):
    """{name: value} of what a task needs in a file, which is carried out once. Raises UserError."""
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        try:
            with errors_of(path):
                spec.loader.exec_module(module)
                _check(vars(module), path)
        except BaseException:
            del sys.modules[module_name]
            raise
    found = vars(sys.modules[module_name])
    names = ("problems", *DEFAULTS, "reply", "rebut", "VARIANTS", "JUDGE", "judge_request",
             "CRITERION", "RUBRIC", "GOLDEN", "TOGETHER", "measured",
             *games.NAMES)  # fmt: skip
    # A default that was imported to be used is not a choice.
    chosen = {k: found[k] for k in names if k in found and found[k] is not DEFAULTS.get(k)}
    chosen |= {k: replied(chosen[k], path) for k in ("reply", "rebut") if k in chosen}
    if "measured" in chosen:
        chosen["measured"] = guarded(chosen["measured"], path)
    if "worked_answer" in chosen:
        make = chosen["worked_answer"]
        chosen["worked_answer"] = partial(worked, make, path, chosen.get("reply"))
    return chosen


@contextmanager
def _files_beside(path, its_name):
    """Inside, what lies beside this file can be imported, but for modules whose name is taken, by
    this project or by an installed package. Afterwards those names are free for other files."""
    folder, before, known = os.path.dirname(os.path.abspath(path)), [*sys.path], {*sys.modules}
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path[:] = before
        for name in {*sys.modules} - known - {its_name}:
            module = sys.modules[name]
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
            if any(place and Path(place).is_relative_to(folder) for place in places):
                del sys.modules[name]


DEFAULTS = {
    "SYSTEM_PROMPT": rldatasets.SYSTEM_PROMPT,
    "REWARD_FUNCTIONS": evaluator.REWARD_FUNCTIONS,
    "is_correct": evaluator.is_correct,
    "worked_answer": rldatasets.worked_answer,
}


REFEREE_S = (
    ("RUBRIC", "(weight above 0, criterion)", [(int | float, str)]),
    ("GOLDEN", "(question, better text, worse text)", [(str,) * 3, (str,) * 4]),
)


def fits(row, kinds):
    """Whether a row has the types of one of these kinds, and no number of 0 or less."""
    return isinstance(row, tuple) and any(
        len(row) == len(kind)
        and all(isinstance(x, t) and (isinstance(x, str) or x > 0) for x, t in zip(row, kind))
        for kind in kinds
    )


def wants(function, name):
    """Whether a reward is one of a group that takes the referee, or the step, by this name."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # written in C, and does not say what it takes
        return False
    return evaluator.sees_group(function) and name in parameters


def wants_referee(function):
    return wants(function, "referee")


def _check(found, path):
    """Raise UserError for definitions that are not of the kind that a task needs."""

    def wrong(name, complaint):
        with open(path, encoding="utf-8") as lines:
            starts = (name, f"def {name}")
            at = next((n for n, line in enumerate(lines, 1) if line.startswith(starts)), 1)
        raise UserError(f"{path}:{at}: {name} {complaint}")

    for name in (
        "problems",
        "is_correct",
        "worked_answer",
        "reply",
        "rebut",
        "judge_request",
        "measured",
    ):
        if not callable(found.get(name, print)):
            wrong(name, "is no function; write it as def")
    if "reply" in found and not takes(found["reply"], "problem", "turns"):
        wrong("reply", "does not take (problem, turns)")
    if "rebut" in found and not takes(found["rebut"], "problem", "turns", "others"):
        wrong("rebut", "does not take (problem, turns, others)")
    for name in ("SYSTEM_PROMPT", "CRITERION"):
        if not isinstance(found.get(name, ""), str):
            wrong(name, "is no text; put it in quotes")
    together = found.get("TOGETHER", 1)
    if type(together) is not int or together < 1:
        wrong("TOGETHER", "is no whole number of at least 1")
    for name, form, kinds in REFEREE_S:
        rows = found.get(name, [])
        if not isinstance(rows, list) or not all(fits(row, kinds) for row in rows):
            wrong(name, f"is no list of {form}")
    if "REWARD_FUNCTIONS" not in found:
        own = found.get("is_correct", evaluator.is_correct) is not evaluator.is_correct
        if own and "payoff" not in found:  # in a game its end is the reward
            wrong("is_correct", "needs REWARD_FUNCTIONS beside it, or the default ones judge")
        return
    functions = found["REWARD_FUNCTIONS"]
    if not isinstance(functions, list) or not functions:
        wrong("REWARD_FUNCTIONS", "is no list of functions; write [one, another]")
    names = [getattr(function, "__name__", "") for function in functions]
    for function, name in zip(functions, names):
        if not callable(function) or not name.isidentifier():
            wrong("REWARD_FUNCTIONS", f"holds {function!r:.40}, no function with a name; use def")
        if names.count(name) > 1:
            wrong("REWARD_FUNCTIONS", f"holds {name} twice; rename one, metrics go by name")
        judged = "completions" if evaluator.sees_group(function) else "completion"
        more = {name: name for name in ("referee", "step") if wants(function, name)}
        if not takes(function, judged, "problem", **more):
            wrong("REWARD_FUNCTIONS", f"holds {name}, which does not take ({judged}, problem)")
