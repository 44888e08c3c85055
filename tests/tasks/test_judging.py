"""Lessons for a referee: asked as it is asked, in both orders, of other questions than its exam."""

from types import SimpleNamespace

import pytest

from evaluation.referee import Referee
from tasks import asks, debate, load_task, tell
from utils import UserError

LESSONS = {"tell": tell.LESSONS, "debate": debate.LESSONS}


def task_of(name):
    flags = {"dataset_path": None, "evaluator": None, "seed": 0}
    return load_task(SimpleNamespace(dataset_name=name, **flags))


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_word_for_word_what_a_referee_of_the_task_is_asked(name):
    """Taken down from a Referee that is asked about a held-out pair, in both orders."""
    judging, asked = task_of(f"judging/{name}"), []
    judge = SimpleNamespace(
        name="", scale=None, log_odds=lambda asks: asked.extend(asks) or [0.0] * len(asks)
    )
    task = task_of(name)
    Referee(judge, task).margins(LESSONS[name], task.criterion)
    taught = {p.question: p.answer for split in ("train", "test") for p in judging.problems(split)}
    assert {ask.text for ask in asked} == {*taught}
    for ask in asked:
        better_is_first = (ask.question, ask.first, ask.second) in LESSONS[name]
        assert taught[ask.text] == ("A" if better_is_first else "B")
    assert judging.system_prompt == asks.SYSTEM


@pytest.mark.parametrize("name", LESSONS)
def test_what_a_referee_is_tried_on_is_no_lesson(name):
    golden = {question for question, *_ in task_of(name).golden}
    assert len(LESSONS[name]) >= 100
    assert not golden & {question for question, *_ in LESSONS[name]}


@pytest.mark.parametrize("name", LESSONS)
def test_the_letter_says_nothing_and_a_question_is_in_one_split(name):
    task = task_of(f"judging/{name}")
    questions = {}
    for split in ("train", "test"):
        problems = task.problems(split)
        assert [p.answer for p in problems] == ["A", "B"] * (len(problems) // 2)
        questions[split] = {p.question.split("\n\n")[0] for p in problems}
        assert task.together == 2
    assert not questions["train"] & questions["test"]


def test_a_letter_is_right_with_or_without_a_full_stop_and_nothing_else_is():
    task = task_of("judging/tell")
    problem = task.problems("test")[0]
    assert all(task.is_correct(text, problem) for text in ("A", " A\n", "A."))
    assert not any(task.is_correct(text, problem) for text in ("B", "", "A or B", "A good one"))
    assert task.is_correct(task.worked_answer(problem), problem)


def test_only_tasks_with_lessons_can_be_judged():
    with pytest.raises(UserError, match="--dataset_name judging/kuhn: no such variant"):
        task_of("judging/kuhn")
