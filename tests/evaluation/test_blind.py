"""The blind baseline: whose picture a question is asked with, and what is said of it."""

import pytest

from evaluation.blind import blind_figures, with_others_pictures
from evaluation.significance import paired_difference
from records.alarms import new_alarms
from rldatasets import Problem


def problem(images):
    return Problem("How many?", "1", "", images=tuple(images))


def test_each_question_gets_the_next_other_picture_and_no_own_one():
    problems = [problem(images) for images in ("a", "", "a", "b", "cd")]
    shown = {i: "".join(p.images) for i, p in with_others_pictures(problems)}
    assert shown == {0: "b", 2: "b", 3: "cd", 4: "a"}
    assert with_others_pictures([problem("a"), problem("a"), problem("")]) == []


def test_both_accuracies_are_of_the_same_questions():
    outcomes = [(True, True), (True, False), (True, False), (False, False)]
    records = [{"correct": own, "blind_correct": other} for own, other in outcomes]
    records.append({"correct": False})  # which shows nothing
    figures = blind_figures(records)
    assert figures["blind_accuracy"] == 0.25
    own, other = ([pair[i] for pair in outcomes] for i in (0, 1))
    above = tuple(figures[f"above_blind{end}"] for end in ("", "_low", "_high"))
    assert above == paired_difference(other, own)
    assert above[0] == 0.5
    assert blind_figures([{"correct": True}]) == {}


@pytest.mark.parametrize(("low", "alarmed"), [(0.01, False), (0.0, True), (-0.02, True)])
def test_an_alarm_says_that_the_pictures_do_not_count(low, alarmed):
    evaluation = {"step": 1, "accuracy": 0.4, "accuracy_low": 0.3, "accuracy_high": 0.5,
                  "blind_accuracy": 0.35, "above_blind": 0.05, "above_blind_low": low}  # fmt: skip
    lines = new_alarms([{"step": 0, "reward": 1.0}], [evaluation], "eval")
    assert any("no sign that it looks" in line for line in lines) == alarmed
