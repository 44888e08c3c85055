"""Tasks that draw: scenes in one split alone, answers that nobody guesses, clocks that are read."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from rldatasets import Problem, fingerprint
from tasks import clock, load_task, shapes


@pytest.fixture(scope="module")
def made():
    """{variant: {split: problems}}, fewer than there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SIZES", {"train": 600, "test": 300})
        return {
            variant: {split: shapes.problems(split, 0, variant) for split in ("train", "test")}
            for variant in shapes.VARIANTS
        }


@pytest.mark.parametrize("variant", shapes.VARIANTS)
def test_no_scene_is_in_both_splits_and_no_answer_is_frequent(variant, made):
    train, test = made[variant].values()
    assert not {p.images[0].cells for p in train} & {p.images[0].cells for p in test}
    for problems in (train, test):
        by_kind = Counter(p.answer for p in problems)
        assert max(by_kind.values()) / len(problems) <= 0.4
        assert len(by_kind) == 4


def test_answers_are_what_a_second_reader_of_the_scene_finds(made):
    for problem in made["count"]["test"]:
        kind = problem.question.split()[2].removesuffix("s")
        *rows, sentence = problem.solution.split("\n")
        assert ", ".join(rows).split(", ").count(kind) == int(problem.answer)
        assert sentence == f"The number of {kind}s is {problem.answer}."
    for problem in made["colour"]["test"]:
        kind = problem.question.rstrip("?").split()[-1]
        [cell] = [cell for cell in problem.images[0].cells if cell and cell[1] == kind]
        assert cell == (problem.answer, kind)
        assert problem.solution == f"The {kind} is {problem.answer}."
    for problem in made["position"]["test"]:
        (scene,), words = problem.images, problem.question.rstrip("?").split()
        at = scene.cells.index(tuple(words[-2:]))
        step = {"left": -1, "right": 1, "above": -3, "below": 3}[words[5]]
        assert scene.cells[at + step][1] == problem.answer


def test_a_scene_is_drawn_where_it_says(made):
    scene = made["colour"]["test"][0].images[0]
    pixels = np.asarray(scene()).astype(int)
    assert pixels.shape == (128, 128, 3)
    assert np.array_equal(pixels, np.asarray(scene()))
    for number, cell in enumerate(scene.cells):
        row, column = divmod(number, 3)
        middle = pixels[32 + 64 * row, int(42.7 * (column + 0.5))]
        if cell is None:
            assert middle.min() >= 225
        else:
            assert abs(middle - shapes.COLOURS[cell[0]]).max() <= 20


def test_problems_are_the_same_in_every_process_and_differ_by_what_they_show():
    args = SimpleNamespace(dataset_name="shapes/count", dataset_path=None, difficulty=1,
                           evaluator=None, seed=3)  # fmt: skip
    first = load_task(args).problems("test")[:4]
    assert fingerprint(first) == (
        fingerprint([Problem(p.question, p.answer, p.solution, {}, p.images) for p in first])
    )
    other = [Problem(p.question, p.answer, p.solution) for p in first]
    assert fingerprint(first) != fingerprint(other)


CLOCK = Problem(clock.QUESTION, "12:05", "")


@pytest.mark.parametrize(
    ("answer", "minutes"),
    [("12:05", 0), ("0:05", None), ("12.05", 0), ("11:50", 15), ("6:05", 360), ("1:00", 55),
     ("12:5", None), ("13:00", None), ("12:60", None), ("five past twelve", None)],
)  # fmt: skip
def test_a_clocks_answer_is_as_far_off_as_the_hands_are(answer, minutes):
    said = f"<reasoning>\n\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
    assert clock.distance(said, CLOCK) == minutes
    assert clock.is_correct(said, CLOCK) == (minutes == 0)
    near = 0.0 if minutes is None else max(0.0, 1 - minutes / 30)
    assert clock.nearness(said, CLOCK) == pytest.approx(near)


def test_a_time_is_in_one_split_alone(monkeypatch):
    monkeypatch.setattr(clock, "SIZES", {"train": 2000, "test": 500})
    train, test = (clock.problems(split, 0) for split in ("train", "test"))
    assert not {p.answer for p in train} & {p.answer for p in test}
    assert max(Counter(p.answer for p in test).values()) / len(test) < 0.02
    assert np.asarray(test[0].images[0]()).shape == (224, 224, 3)
