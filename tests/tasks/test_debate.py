"""Debate: two sides of a question in one step, arguments against the other side's, accuracy."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, make_setup

from evaluation.held_out import measured
from evaluation.referee import Referee, Scale, bound
from evaluation.scoring import judged_ahead, score
from grpo import has_signal
from launch.loading import held_out_problems
from rldatasets import Problem, Problems, Transcript, whole_blocks
from tasks import Task, debate, load_task, tell
from tasks.debate import gives_up, is_correct, persuasion, said, sides, slip
from utils import UserError

ASKED = Problem("How many?", "13", "8 + 5 = 13")
FLAGS = {"dataset_path": None, "difficulty": 1, "evaluator": None, "seed": 3}


class Stub:
    """Likes texts by their scores, and the first place."""

    name, scale = "stub", Scale()

    def __init__(self, scores, slot=4.0):
        self.scores, self.slot, self.asked = scores, slot, []

    def log_odds(self, asks):
        self.asked += asks
        return [self.scores(ask.first) - self.scores(ask.second) + self.slot for ask in asks]


def task():
    return load_task(SimpleNamespace(dataset_name="debate", **FLAGS))


def test_both_sides_are_asked_for_and_know_each_other():
    first, second = sides(ASKED)
    assert {first.answer, second.answer} == {"13", slip(ASKED)} and slip(ASKED) != "13"
    for own, other in ((first, second), (second, first)):
        assert own.extra["against"] == other.answer and own.extra["rival"] == other.question
        assert own.question.endswith(f"that the answer is {own.answer}.")
        assert own.extra["asked"] == "How many?" and own.extra["right"] == "13"
    begins = [sides(Problem(f"How many {n}?", "13", ""))[0].answer for n in range(40)]
    assert 10 < begins.count("13") < 30  # neither side always comes first


def test_the_referee_reads_all_turns_of_a_side_and_not_what_it_was_told():
    assert said("13", " So it is. ") == "The answer is 13. So it is."
    assert said("13", "") == "The answer is 13."
    turns = ("8 + 5 is 13.", "Your opponent says: 14.", "14 is one too many.")
    text = Transcript(turns[-1], turns)
    assert said("13", text) == "The answer is 13. 8 + 5 is 13. 14 is one too many."


def test_thoughts_are_nobody_s_argument():
    turns = ("<think>He is wrong.</think>It is 13.", "No.", "I count.</think> Still 13.")
    assert said("13", Transcript(turns[-1], turns)) == "The answer is 13. It is 13. Still 13."
    one, other = sides(ASKED)
    heard = task().rebut(one, ("x",), {other.question: ("<think>Hm.</think>It is 12.",)})
    assert heard.startswith("Your opponent says: It is 12.")


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_task_has_two_problems_for_each_question(split):
    found = task().problems(split)
    assert len(found) % 2 == 0 and (split == "train" or len(found) == 256)
    for one, other in zip(found[::2], found[1::2]):
        assert one.extra["rival"] == other.question and one.answer != other.answer


def test_what_belongs_together_comes_in_one_step_and_every_pass_has_all():
    pairs = [Problem(f"{n // 2} {n % 2}", "1", "") for n in range(14)]
    problems = Problems(pairs, 5, together=2)
    seen = []
    for step in range(7):
        batch = [problem.question.split() for problem in problems.batch(step, 4)]
        for one, other in zip(batch[::2], batch[1::2]):
            assert one[0] == other[0] and (one[1], other[1]) == ("0", "1")
        seen += [" ".join(words) for words in batch]
    assert sorted(seen[:14]) == sorted(seen[14:]) == sorted(p.question for p in pairs)
    assert seen[:14] != seen[14:]
    plain = [p.question for p in Problems(pairs, 5).batch(0, 14)]
    assert [p.question for p in Problems(pairs, 5, together=1).batch(0, 14)] == plain
    kept = [p for n, p in enumerate(pairs) if n != 5]
    assert whole_blocks(pairs, kept, 2) == pairs[:4] + pairs[6:]
    assert whole_blocks(pairs, kept, 1) is kept


def scored(judge, groups, problems):
    debated = task()
    referee = Referee(judge, debated)
    functions = [bound(persuasion, referee=referee)]
    setup = make_setup(None, make_args(), task=replace(debated, reward_functions=functions))
    setup = replace(setup, referees={"referee": referee})
    rollouts = SimpleNamespace(texts=groups)
    judged_ahead(rollouts, problems, setup, functions)
    asked = len(judge.asked)
    rewards = score(rollouts, problems, functions)
    assert len(judge.asked) == asked
    return rewards.total


def test_an_argument_earns_its_chances_against_the_other_side_s_and_not_for_being_right():
    problems = sides(ASKED)
    groups = [["aaaa", "a", "aa"], ["bbb", "b", "bbbb"]]
    judge = Stub(lambda text: text.count("a") + text.count("b"))
    totals = scored(judge, groups, problems)

    def chance(m):
        return torch.tensor(float(m)).sigmoid().item()

    # In "The answer is ..." stands one a, on both sides. The first two arguments are the rivals.
    expected = [[(chance(x - y) + chance(x - z)) / 2 for x in row] for row, y, z in
                (((4, 1, 2), 3, 1), ((3, 1, 4), 4, 1))]  # fmt: skip
    assert torch.allclose(totals, torch.tensor(expected, dtype=torch.float64))
    assert {ask.question for ask in judge.asked} == {"How many?"}
    for ask in judge.asked:  # each text stands behind its own side's answer
        answers = [text.split()[3] for text in (ask.first, ask.second)]
        assert sorted(answers) == sorted(f"{problem.answer}." for problem in problems)
    # Who has the right answer makes no difference within a group, though the referee sees it.
    knowing = Stub(lambda text: 9.0 * ("is 13." in text))
    assert not has_signal(scored(knowing, groups, problems)).any()


def test_after_rebuttals_an_argument_is_judged_beside_the_one_that_it_answers():
    groups = [[Transcript(f"{side}{g} again", (f"{side}{g}", "told", f"{side}{g} again"))
               for g in range(4)] for side in "PQ"]  # fmt: skip
    judge = Stub(lambda text: len(text))
    scored(judge, groups, sides(ASKED))
    beside = {tuple(sorted(text.split()[4][:2] for text in (ask.first, ask.second)))
              for ask in judge.asked}  # fmt: skip
    assert beside == {(f"P{g}", f"Q{g}") for g in range(4)}


def test_who_comes_to_the_other_side_s_answer_earns_nothing():
    one, other = sides(ASKED)
    groups = [[f"No, it is {one.extra['against']}.", f"It is {one.answer}."], ["So.", "It is."]]
    [given_up, held], _ = scored(Stub(lambda text: 3.0 * ("No" in text)), groups, [one, other])
    assert given_up == 0 and held > 0.1
    against = f"My opponent says {other.answer}, but it is {one.answer}, not {other.answer}.0."
    both = Transcript(against, ("It is so.", "told", against))
    assert not gives_up(against, one) and not gives_up(both, one)
    assert gives_up(f"It is {other.answer}.0", one) and not gives_up("It is 7.", one)


def test_a_side_whose_other_is_missing_earns_nothing_either_way():
    one, _ = sides(ASKED)
    assert scored(Stub(len), [["a", "bbb"]], [one]).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(("count", "whole"), [(7, 8), (64, 64), (0, 256)])
def test_held_out_questions_have_both_their_sides(count, whole):
    test = task().problems("test")
    args = SimpleNamespace(dataset_name="debate", eval_problems=count)
    chosen = held_out_problems(args, test, together=task().together)
    assert len(chosen) == whole and whole_blocks(list(test), chosen, 2) == chosen


def test_the_referee_s_accuracy_is_measured_with_and_without_debate():
    problems = [side for n in range(8) for side in sides(replace(ASKED, question=f"{n}?"))]
    referee = Referee(Stub(lambda text: 2.0 * ("true" in text) - ("13" in text)), task())
    answers = ["it is true" if p.answer == "13" else "it is so" for p in problems]
    setup = make_setup(None, make_args(), task=task(), tokenizer=SimpleNamespace())
    records = [{"completion": text} for text in answers]
    assert measured(setup, problems, records) == {}  # nobody to ask
    summary = measured(replace(setup, referees={"referee": referee}), problems, records)
    assert summary["debate/accuracy"] == 1.0 and summary["debate/without"] == 0.0
    assert referee.counts()["calls"] == 0  # a step that follows has not asked for this
    assert summary["debate/accuracy_low"] == pytest.approx(0.676, abs=1e-3)
    assert debate.measured(problems[::2], answers[::2], referee) == {}  # no two sides
    assert measured(make_setup(None), problems, records) == {}
    mine = replace(task(), measured=lambda *_: {"good": [1.5]})
    with pytest.raises(UserError, match=r"measured returned .*, not {name: \[numbers from 0 to 1"):
        measured(replace(setup, task=mine), problems, records)


def test_an_argument_is_checked_for_its_own_side():
    one, other = sides(ASKED)
    text = f"8 and 5 make {one.answer}."
    assert is_correct(text, one) and not is_correct(text, other)
    assert said("13", "  so  ") == "The answer is 13. so" and said("13", "") == "The answer is 13."


# --- tell --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("A bicycle has two wheels.", True), ("Bicycles have two wheels!", True),
        ("It has two wheels.", False), ("A bicycle has two wheels", False),
        ("A bicycle has wheels. It has two.", False), ("A bicycle.", False), ("", False),
        ("A bicycle has " + "very " * 30 + "many wheels.", False),
        ("A bicycle is a thing and a bicycle is a thing.", False),
        ("A bicycle\nhas two wheels.", False),
    ],
)  # fmt: skip
def test_tell_counts_one_whole_sentence_that_names_its_subject(text, right):
    assert tell.is_correct(text, Problem("?", "bicycles", "")) is right


def test_tell_pays_nothing_for_saying_nothing():
    for text, pays in (("", -1.0), ("Solution:", -1.0), ("A bicycle has wheels.", 0.0)):
        assert tell.says_something(text, Problem("?", "bicycles", "")) == pays


def test_a_subject_is_named_in_one_or_many_and_by_no_other_word():
    for subject, one in (("mice", "mouse"), ("wolves", "wolf"), ("berries", "berry"),
                         ("potatoes", "potato"), ("boxes", "box"), ("glass", "glass"),
                         ("horses", "horse"), ("knives", "knife")):  # fmt: skip
        assert tell.is_correct(f"The {one} is a thing.", Problem("?", subject, "")), subject
        assert not tell.is_correct("The other is a thing.", Problem("?", subject, ""))


def test_tell_holds_out_subjects_and_its_golden_pairs_are_what_they_say():
    splits = {split: tell.problems(split, 0) for split in ("train", "test")}
    subjects = {split: {p.answer for p in found} for split, found in splits.items()}
    assert not subjects["train"] & subjects["test"] and len(splits["test"]) >= 256
    assert len(tell.GOLDEN) == 48 and len(set(tell.GOLDEN)) == 48
    by_question = {p.question: p for found in splits.values() for p in found}
    for question, better, worse in tell.GOLDEN:
        assert tell.is_correct(better, by_question[question])
        assert better != worse
    assert isinstance(load_task(SimpleNamespace(dataset_name="tell", **FLAGS)), Task)
