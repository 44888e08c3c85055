"""What is right for nothing, or not for the gold answer, is told before a run: verifiers that pay
for any text, for a constant, or not for their own answer."""

import re
import time
from dataclasses import replace

import pytest
from conftest import ROOT, TASK

from evaluation import verdicts
from evaluation.reward_lint import warn
from evaluation.verdicts import (
    EMPTY,
    OTHER,
    OWN,
    complaint,
    dataset_complaints,
    unmatched_golds,
    verifier_facts,
)
from evaluator import extract_answer
from launch.commands import main
from rldatasets import Problem
from utils import UserError

NUMBERS = [Problem(f"{n} + 1?", str(n + 1), f"{n} + 1 = {n + 1}") for n in range(40)]


def task_of(is_correct, reward_functions=None, **more):
    return replace(
        TASK, is_correct=is_correct,
        reward_functions=reward_functions or [float_of(is_correct)], **more,
    )  # fmt: skip


def float_of(is_correct):
    def correctness(completion, problem):
        return float(is_correct(completion, problem))

    return correctness


def test_a_sound_verdict_is_no_finding_and_its_numbers_are_known():
    facts = verifier_facts(TASK, NUMBERS)
    assert (facts.problems, facts.form) == (20, "worked_answer")
    assert facts.right == {OWN: 1.0, EMPTY: 0.0, OTHER: 0.0, "1": 0.05, "0": 0.0}
    assert facts.earned[OWN] == 4.0 and complaint(facts) is None
    assert dataset_complaints(TASK, NUMBERS, {}, 1.0)[0] == []


def any_text(completion, problem):
    return True


def any_answer(completion, problem):
    return extract_answer(completion) is not None


def never_for_itself(completion, problem):
    return extract_answer(completion) == f"<{problem.answer}>"


def refuses_even_ones(completion, problem):
    return int(problem.answer) % 2 == 1 and extract_answer(completion) == problem.answer


def substring(completion, problem):
    return (extract_answer(completion) or "") in problem.answer


def by_length(completion, problem):
    return len(extract_answer(completion) or "") == len(problem.answer)


def divides(completion, problem):
    """Like a verifier that takes 0 for most: 0 is right, or the answer."""
    return extract_answer(completion) in ("0", problem.answer)


def nothing_or_right(completion, problem):
    return (extract_answer(completion) or problem.answer) == problem.answer


@pytest.mark.parametrize(
    ("is_correct", "kind", "share", "words"),
    [
        (nothing_or_right, EMPTY, 1.0, "an empty answer 100 %, `101` 5 %, `0` 0 %"),
        (any_text, EMPTY, 1.0, "an empty answer 100 %"),
        (any_answer, EMPTY, 1.0, "an empty answer 100 %"),
        (any_answer, OTHER, 1.0, "another problem's answer 100 %"),
        (substring, EMPTY, 1.0, "an empty answer 100 %"),
        (refuses_even_ones, OWN, 0.5, "its own gold answer 50 %"),
        (by_length, OTHER, 0.95, "another problem's answer 95 %"),
        (divides, "0", 1.0, "`0` 100 %"),
    ],
)
def test_what_is_right_for_nothing_or_not_for_the_gold_is_one_line(is_correct, kind, share, words):
    problems = [Problem(f"{n}?", str(n), "So.") for n in range(101, 121)]
    if is_correct is by_length:
        problems[-1] = Problem("9?", "9", "So.")
    if is_correct is refuses_even_ones:
        problems[::2] = [Problem(f"{n}?", str(n), "So.") for n in range(201, 220, 2)]
        problems[1::2] = [Problem(f"{n}?", str(n), "So.") for n in range(202, 221, 2)]
    task = task_of(is_correct)
    facts = verifier_facts(task, problems)
    assert facts.right[kind] == pytest.approx(share, abs=0.051)
    [line] = dataset_complaints(task, problems, {}, 1.0)[0]
    assert line.startswith("is_correct calls right, of 20 problems: ") and "\n" not in line
    assert words in line or kind == OTHER


def test_partial_credit_for_a_constant_is_told_by_what_it_earns():
    def grid(completion, problem):
        return 1.0 if extract_answer(completion) == problem.answer else 0.96

    task = task_of(TASK.is_correct, [grid])
    [line] = dataset_complaints(task, NUMBERS, {}, 1.0)[0]
    assert re.fullmatch(r"`1` earns 0\.96 on average over 20 problems, their own gold "
                        r"answers 1\.00", line)  # fmt: skip
    assert dataset_complaints(task_of(TASK.is_correct), NUMBERS, {}, 1.0)[0] == []


def test_a_constant_that_half_of_the_golds_are_is_told():
    problems = [Problem(f"{n}?", "yes" if n % 3 else "no", "So.") for n in range(30)]
    [line] = dataset_complaints(TASK, problems, {}, 1.0)[0]
    assert "`yes` " in line and "`0` 0 %" in line
    problems = [Problem(f"{n}?", "ABCD"[n % 4], "So.") for n in range(30)]
    assert dataset_complaints(TASK, problems, {}, 1.0)[0] == []


@pytest.mark.parametrize(
    ("pattern", "form"),
    [
        (r"\\boxed\{(.*?)\}", r"\boxed{ }"), (r"#### (.*)", "####"), (r"^Answer: (.*)$", "Answer:"),
        (r"^<think>.*</think>\s*\\boxed\{(.*?)\}\s*$", r"<think>, then \boxed{ }"),
        (r"^([^<>]*)$", "the answer alone"),
    ],
)  # fmt: skip
def test_a_form_of_the_user_s_is_found_by_what_is_correct_accepts(pattern, form):
    def is_correct(completion, problem):
        found = re.search(pattern, completion, re.DOTALL | re.MULTILINE)
        return bool(found) and found[1].strip() == problem.answer

    if form == "the answer alone":

        def is_correct(completion, problem):  # fmt: skip
            return completion.strip() == problem.answer

    facts = verifier_facts(task_of(is_correct), NUMBERS)
    assert facts.form == form and facts.right[OWN] == 1.0 and complaint(facts) is None


def test_a_form_that_nobody_knows_is_said_to_be_unknown(capsys):
    task = task_of(never_for_itself)
    assert verifier_facts(task, NUMBERS) is None
    [line] = dataset_complaints(task, NUMBERS, {}, 1.0)[0]
    assert line.startswith("cannot be judged: ") and line.endswith("define worked_answer")
    warn(task, NUMBERS, {})
    assert capsys.readouterr().err.startswith("main.py: warning: answers: cannot be judged")
    known = task_of(never_for_itself, worked_answer=lambda p: f"<answer><{p.answer}></answer>")
    assert verifier_facts(known, NUMBERS).right[OWN] == 1.0


def test_a_verdict_that_raises_or_hangs_is_no_verdict_and_ends_nothing():
    def hangs(completion, problem):
        if "..." in completion:
            time.sleep(10)
        raise KeyError("no such field")

    started = time.perf_counter()
    assert verifier_facts(task_of(hangs), NUMBERS[:3], timeout=0.05) is None

    def sometimes(completion, problem):
        if "..." in completion:
            time.sleep(10)
        return extract_answer(completion) == problem.answer

    facts = verifier_facts(task_of(sometimes), NUMBERS[:3], timeout=0.05)
    assert facts.right[OWN] == 1.0 and facts.right["0"] == 0.0
    assert time.perf_counter() - started < 5


def test_a_verdict_that_always_hangs_costs_no_more_than_its_time(monkeypatch):
    monkeypatch.setattr(verdicts, "SECONDS", 0.3)

    def hangs(completion, problem):
        time.sleep(10)

    started = time.perf_counter()
    assert verifier_facts(task_of(hangs), NUMBERS, timeout=0.1) is None
    assert time.perf_counter() - started < 3


def test_a_worked_answer_that_fails_or_gives_the_gold_away_accuses_nobody():
    def fails(problem):
        raise UserError("own.py:2: KeyError: 'steps'; mend this line")

    facts = verifier_facts(task_of(TASK.is_correct, worked_answer=fails), NUMBERS)
    assert (facts.form, facts.right[OWN]) == ("<think>, then <answer>", 1.0)

    def from_elsewhere(problem):
        return f"<answer>{problem.extra['gold']}</answer>"

    problems = [replace(p, extra={"gold": p.answer}) for p in NUMBERS]
    facts = verifier_facts(task_of(TASK.is_correct, worked_answer=from_elsewhere), problems)
    assert facts.right[OWN] == 1.0 and facts.right["0"] == facts.right[EMPTY] == 0.0


def test_weights_count_in_what_is_earned():
    facts = verifier_facts(TASK, NUMBERS, weights={"correctness": 0.0, "integer_format": 4.0})
    assert facts.earned[OWN] == 3.5 and facts.earned["0"] == 3.5


# --- golds that begin with a number --------------------------------------------------------------


def test_golds_that_are_more_than_a_number_are_counted_with_the_shortest_as_example():
    golds = ["7", "1,080", "-3", "$5.00", "3/4", "2 1/2", "1e16", "2e-06", "½", "B", "blue", "x7",
             "7 (pens)", "7\nThe answer is: 7", "12:45", "9 AM", "50%", "3 to 1"]  # fmt: skip
    problems = [Problem("?", gold, "") for gold in golds]
    assert unmatched_golds(problems) == (6, "50%")
    assert unmatched_golds(problems[:4] + problems[9:12]) == (1, "$5.00")
    assert unmatched_golds(problems[:3]) == (0, None)
    [line, *_] = dataset_complaints(TASK, problems, {}, 1.0)[0]
    assert line == "6 of 18 gold answers are more than a number, e.g. `50%`: an answer needs the " \
                   "same behind it"  # fmt: skip


def test_the_gold_answers_of_gsm8k_are_bare_numbers(gsm8k):
    from rldatasets import load_problems

    for split in ("train", "test"):
        assert unmatched_golds(load_problems("gsm8k", str(gsm8k), split, 0)) == (0, None)


# --- lint with a dataset, and with a form of one's own --------------------------------------------

BOXED = '''
    import re

    SYSTEM_PROMPT = "Put the answer into a box."


    def boxed(completion, problem):
        """2 where the last box holds the answer."""
        found = re.findall(r"\\\\boxed{([^{}]*)}", completion)
        return 2.0 * (found[-1:] == [problem.answer])


    def is_correct(completion, problem):
        return boxed(completion, problem) > 0


    REWARD_FUNCTIONS = [boxed]
'''


def lint(capsys, *argv):
    status = main(["lint", *map(str, argv)])
    return status, capsys.readouterr().out.splitlines()


def test_lint_judges_a_box_as_a_box_and_says_so(tmp_path, capsys):
    file = tmp_path / "boxed.py"
    file.write_text(re.sub(r"(?m)^    ", "", BOXED))
    _, lines = lint(capsys, "--evaluator", file)
    assert any("judged on numbers in a form they read: \\boxed{ }" in line for line in lines)
    assert lines[2].split()[0] == "2.000" and "right, perfect format" in "\n".join(lines)
    assert not any("right and wrong answers earn the same" in line for line in lines)
    assert not any("without its tags" in line for line in lines)
    assert lines[-2:] == [
        "1 finding:",
        "- right answers earn no more than wrong ones where written so: `1,080` for 1080, "
        "`1080` for 1,080, `−3` for -3, `0.50` for 0.5, `72.0` for 72, `$72` for 72, "
        "`72 coins` for 72",
    ]


def test_lint_says_of_letters_that_it_cannot_judge_their_rewards(tmp_path, capsys):
    file = tmp_path / "letters.py"
    file.write_text(
        "def letter(completion, problem):\n"
        "    return float(problem.answer in 'ABCD' and completion.endswith(problem.answer))\n"
        "\n\nREWARD_FUNCTIONS = [letter]\n"
    )
    status, lines = lint(capsys, "--evaluator", file)
    assert status == 0 and any("it can say nothing about another one" in line for line in lines)
    assert lines[-1] == "No findings."


def test_lint_of_a_dataset_judges_its_own_problems(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"question": "{i}?", "answer": "{i} pens"}}\n' for i in range(60)))
    status, lines = lint(capsys, "--dataset_path", data)
    assert status == 1 and any("The golden set knows numbers in the tags" in line for line in lines)
    assert re.search(r"^- \d+ of \d+ gold answers are more than a number, e\.g\. `\d+ pens`",
                     "\n".join(lines), re.MULTILINE)  # fmt: skip
    data.write_text("".join(f'{{"question": "{i}?", "answer": {i}}}\n' for i in range(60)))
    status, lines = lint(capsys, "--dataset_path", data)
    assert status == 0 and "right, perfect format" in "\n".join(lines)
    assert "its own gold answer 100 %" in lines[-2]
    assert lint(capsys, "--dataset_name", "countdown")[0] == 0
    assert main(["lint", "--dataset_path", str(tmp_path / "none.jsonl")]) == 2
    assert "--dataset_path" in capsys.readouterr().err


def test_lint_without_flags_reads_no_dataset(capsys, monkeypatch):
    from launch import commands

    monkeypatch.setattr(commands, "load_task", None)
    status, lines = lint(capsys)
    assert status == 0 and lines[-1] == "No findings."
    assert "Judged on numbers in the tags" in lines[-3]


def test_the_imports_of_lint_are_light():
    import subprocess
    import sys

    code = ("import sys\nfrom launch.commands import main\nmain(['lint'])\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
