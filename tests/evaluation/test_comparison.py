"""Two runs compared: what is said of the difference, what is shown, what is refused."""

import pytest
from toys import answers, record, write_run

from launch.commands import main


@pytest.fixture
def two(tmp_path):
    """Two runs from numbers of questions: both right, only A, only B, neither."""

    def make(*counts):
        sides = answers(*counts)
        return [
            write_run(tmp_path / name, {0: [record(f"{i}?", v) for i, v in enumerate(side)]})
            for name, side in zip("AB", sides)
        ]

    return make


def said(capsys, *argv):
    assert main(["compare", *argv]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    assert main(["compare", *argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("main.py compare: error: ") and message.count("\n") == 1
    return message


def test_a_difference_outside_the_noise_is_called_better_with_its_figures(two, capsys):
    text = said(capsys, *two(36, 2, 12, 0), "--show", "0")  # as in Newcombe's table III
    assert "B is better: accuracy +20.0 points [+5.7, +34.0], p = 0.013." in text
    assert "12 questions gained (only B is right), 2 lost (only A is right)." in text
    row = next(line for line in text.splitlines() if line.startswith("accuracy"))
    assert row.split()[1] == "76.0%" and " 96.0% [" in row and row.endswith(" 0.013")
    assert "--- gained" not in text


def test_the_first_run_may_be_the_better_one(two, capsys):
    assert "A is better: accuracy -15.0 points" in said(capsys, *two(40, 20, 5, 35))


@pytest.mark.parametrize("counts", [(40, 10, 19, 31), (50, 0, 0, 50), (10, 0, 5, 85)])
def test_within_the_noise_nothing_is_called_better(two, capsys, counts):
    text = said(capsys, *two(*counts))
    assert "is within the noise." in text
    assert "better" not in text


def test_a_gain_in_the_tags_alone_is_said_to_be_one(tmp_path, capsys):
    a, b = (
        write_run(tmp_path / name, {0: [
            record(f"{i}?", i < right, lenient_correct=i < 50, format=i < right) for i in range(100)
        ]})
        for name, right in (("a", 10), ("b", 50))
    )  # fmt: skip
    text = said(capsys, a, b)
    assert "B is better: accuracy +40.0 points" in text
    assert "what differs may be the format alone" in text


def test_a_step_may_be_named_and_the_last_one_is_the_default(tmp_path, capsys):
    steps = {0: [record("1?", False)], 20: [record("1?", True)], 100: [record("1?", False)]}
    run = write_run(tmp_path / "run@7", steps, model_name="toy", max_completion_length=12)
    text = said(capsys, f"{run}@20", run)
    assert f"A  {run}@20  toy, up to 12 tokens" in text and f"B  {run}@100" in text
    assert "no evaluation of step 7; there are 0 20 100" in refused(capsys, f"{run}@7", run)


def test_gained_and_lost_questions_are_shown_whole_and_control_characters_are_not(tmp_path, capsys):
    a = write_run(tmp_path / "a", {0: [
        record("one?", False, "wrong \x1b[2Jone"), record("two?", True), record("three?", False)
    ]})  # fmt: skip
    b = write_run(tmp_path / "b", {0: [
        record("one?", True, "right\none"), record("two?", False), record("three?", True)
    ]})  # fmt: skip
    text = said(capsys, a, b, "--show", "1")
    shown = text[text.index("--- gained, 1 of 2") :].splitlines()
    assert shown[1:8] == ["one?", "gold answer: 7", "--- A, wrong:", "wrong \ufffd[2Jone",
                          "--- B, right:", "right", "one"]  # fmt: skip
    assert "--- lost, 1 of 1" in text and "two?" in text and "three?" not in text
    assert "\x1b" not in text


def test_the_order_of_the_questions_does_not_matter(tmp_path, capsys):
    records = [record(f"{i % 7}?", i % 2 == 0, completion=f"{i}") for i in range(7)]
    a, b = write_run(tmp_path / "a", {0: records}), write_run(tmp_path / "b", {0: records[::-1]})
    assert "0 questions gained (only B is right), 0 lost" in said(capsys, a, b)


def test_runs_of_an_older_form_are_compared_by_what_both_know(tmp_path, capsys):
    old = [{"question": "1?", "answer": "7", "completion": "7", "correct": True}]
    a, b = write_run(tmp_path / "a", {0: old}), write_run(tmp_path / "b", {0: [record("1?", True)]})
    text = said(capsys, a, b)
    assert "accuracy" in text and "lenient_accuracy" not in text and "format_rate" not in text


def test_sampled_answers_are_compared_by_their_chances(tmp_path, capsys):
    def sampled(*right):
        samples = [{"correct": hit, "lenient_correct": hit} for hit in right]
        return record("1?", True, samples=samples), record("2?", True, samples=samples)

    a = write_run(tmp_path / "a", {0: sampled(True, False)})
    b = write_run(tmp_path / "b", {0: sampled(True, True)})
    text = said(capsys, a, b)
    row = next(line for line in text.splitlines() if line.startswith("pass@1"))
    assert row.split()[1] == "50.0%" and "+50.0 points" in row


def test_more_room_to_answer_on_one_side_is_noted(tmp_path, capsys):
    a, b, c = (
        write_run(tmp_path / name, {0: [record("1?", True)]}, max_completion_length=length)
        for name, length in (("a", 48), ("b", 96), ("c", 48))
    )
    note = "Note: not only the models differ: --max_completion_length."
    assert note in said(capsys, a, b)
    assert "Note" not in said(capsys, a, c)


def test_an_evaluation_is_not_compared_with_itself(tmp_path, capsys):
    run = write_run(tmp_path / "a", {0: [record("1?", True)], 4: [record("1?", True)]})
    assert main(["compare", f"{run}@4", run]) == 2
    assert "@4: is compared with itself; name another run, or a step" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_in_one_line(two, tmp_path, capsys):
    a, _ = two(1, 1, 1, 1)
    other = write_run(tmp_path / "other", {0: [record(f"{i}?", True) for i in range(2, 9)]})
    assert "different questions: 4 and 7, of which 2 in common" in refused(capsys, a, other)
    assert "nowhere: no such directory" in refused(capsys, a, str(tmp_path / "nowhere"))
    empty = write_run(tmp_path / "empty", {})
    assert "empty: no evaluation there" in refused(capsys, empty, a)
    damaged = write_run(tmp_path / "damaged", {3: [{"question": "1?"}]})
    assert "eval_00003.jsonl: not an evaluation's records" in refused(capsys, a, damaged)
