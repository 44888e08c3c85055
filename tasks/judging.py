"""Judging: which of two replies is better. It teaches a model to be a referee, for --referee.

    question  Question: Tell me about cats.

              Reply A: Cats cats cats cats.

              Reply B: Cats are small animals that many people keep as pets.

              Which reply answers the question better? Answer with one letter, A or B.
    answer    B

The pairs are the LESSONS of another task, --dataset_name judging/TASK, word for word as a referee
of that task is asked; none of them is among its GOLDEN pairs, which a referee is tried on. Both
orders of a pair come in one step, so that neither letter is ever the better guess. One question in
five, with all its pairs, is held out, by its hash.
"""

from importlib import import_module

from rldatasets import Problem, is_held_out
from tasks import asks

SYSTEM_PROMPT = asks.SYSTEM
VARIANTS = ("tell", "debate")
TOGETHER = 2  # the two orders of a pair


def problems(split, seed, variant):
    task = import_module(f"tasks.{variant}")
    return [
        problem
        for question, better, worse in task.LESSONS
        if is_held_out(question) == (split == "test")
        for problem in both_orders(task.CRITERION, question, better, worse)
    ]


def both_orders(criterion, question, better, worse):
    """The two Problems of a pair: with the better text first, and second."""
    orders = {"A": (better, worse), "B": (worse, better)}
    return [
        Problem(asks.Ask(criterion, question, *texts).text, letter, letter)
        for letter, texts in orders.items()
    ]


def right(completion, problem):
    return float(is_correct(completion, problem))


REWARD_FUNCTIONS = [right]


def is_correct(completion, problem):
    return completion.strip().rstrip(".") == problem.answer


def worked_answer(problem):
    return problem.answer
