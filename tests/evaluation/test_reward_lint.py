"""The lint passes on our rewards and finds every defect that is planted."""

import math
import re
import time
from dataclasses import replace

import pytest
from conftest import TASK

import evaluator
from evaluation import reward_lint
from evaluation.reward_lint import golden_set, lint, report, total, warn
from evaluator import REWARD_FUNCTIONS, TAGS, extract_answer, parse_number
from launch.commands import main


def with_planted(function):
    """Our rewards, with this one in the place of its namesake, or as one more."""
    names = [f.__name__ for f in REWARD_FUNCTIONS]
    if function.__name__ not in names:
        return [*REWARD_FUNCTIONS, function]
    return [function if f.__name__ == function.__name__ else f for f in REWARD_FUNCTIONS]


def found(function, weights=None):
    return "\n".join(lint(with_planted(function), weights).findings)


@pytest.mark.megabytes
def test_our_rewards_pass_and_the_perfect_answer_ranks_first():
    started = time.process_time()
    result = lint(REWARD_FUNCTIONS)
    assert time.process_time() - started < 1
    assert result.findings == []
    name, score = result.ranking[0]
    assert name == "right, perfect format" and total(score) == 4.0
    totals = [total(score) for _, score in result.ranking]
    assert totals == sorted(totals, reverse=True)
    assert {name for name, _ in result.ranking} == set(golden_set())


# --- the original's defects --------------------------------------------------------------------


def last_tag_or_all(text):
    """The answer as the original reads it: with no tag, the whole text."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def strict_without_dotall():
    def strict_format(completion, problem):
        pattern = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?$"
        return 0.5 if re.match(pattern, completion) else 0.0

    return strict_format


def soft_without_dotall():
    def soft_format(completion, problem):
        pattern = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
        return 0.5 if re.match(pattern, completion) else 0.0

    return soft_format


def taxed_length():
    def tag_count(completion, problem):
        count = 0.125 * sum(completion.count(tag) == 1 for tag in TAGS)
        return count - 0.001 * len(completion.split("\n</answer>\n")[-1])

    return tag_count


def answer_without_tags():
    def correctness(completion, problem):
        number = parse_number(last_tag_or_all(completion))
        return 2.0 if number == parse_number(problem.answer) else 0.0

    return correctness


def exact_string():
    def correctness(completion, problem):
        return 2.0 if extract_answer(completion) == problem.answer else 0.0

    return correctness


def digits_only():
    def integer_format(completion, problem):
        return 0.5 if (extract_answer(completion) or "").isdigit() else 0.0

    return integer_format


@pytest.mark.parametrize(
    ("plant", "finding"),
    [
        (strict_without_dotall, "strict_format depends on the length of the reasoning"),
        (soft_without_dotall, "soft_format depends on the length of the reasoning"),
        (soft_without_dotall, "soft_format earns 0.5 with no newlines at all, 0 in perfect"),
        (taxed_length, "tag_count depends on the length of the reasoning"),
        (answer_without_tags, "an answer counts without its tags, the bare number: 2 to 0"),
        (answer_without_tags, "hedging pays: two answers, the right one last"),
        (exact_string, "where 1080 is right, `1,081` earns as much as `1,080`"),
        (digits_only, "a perfect answer earns 3.5 where it is `-3`, 4 where it is `72`"),
        (digits_only, "where it is `1,080`"),
    ],
)
def test_each_of_the_original_s_defects_is_found(plant, finding):
    assert finding in found(plant())


# --- other defects -----------------------------------------------------------------------------


def substring(completion, problem):
    return 5.0 if problem.answer in completion.rpartition("<answer>")[2] else 0.0


def boastful(completion, problem):
    return 5.0 if "this answer is right" in completion else 0.0


def farmed(completion, problem):
    return 0.1 * completion.count("<reasoning>")


def contrary(completion, problem):
    return 0.0 if evaluator.is_correct(completion, problem) else 3.0


def brevity(completion, problem):
    return 0.5 if len(completion) < 400 else 0.0


def hedged(completion, problem):
    answers = re.findall(r"<answer>([^<]*)</answer>", completion)
    return 1.0 if problem.answer in [answer.strip() for answer in answers] else 0.0


@pytest.mark.parametrize(
    ("function", "finding"),
    [
        (substring, "where 5 is right, `15` earns as much as `5`"),
        (boastful, "`prompt injection` outranks the right answer in perfect format"),
        (farmed, "`tag spam` outranks the right answer in perfect format"),
        (contrary, "a wrong answer outranks the right one, perfect format: 5 to 4"),
        (brevity, "brevity depends on the length of the reasoning"),
        (hedged, "hedging pays: two answers, the right one first"),
    ],
)
def test_what_a_model_could_exploit_is_found(function, finding):
    weights = {"correctness": 0.0} if function is substring else None
    assert finding in found(function, weights)


def test_a_reward_that_wants_a_field_of_its_own_is_told_why_it_finds_none():
    def short(completion, problem):
        return float(len(completion) < problem.extra["limit"])

    finding = next(x for x in lint(with_planted(short)).findings if "KeyError" in x)
    assert "the golden set's problems have no `extra`" in finding


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "2.0", KeyError("surprise")])
def test_a_function_that_raises_or_returns_no_finite_number_is_found_once(value):
    def picky(completion, problem):
        if len(completion) < 5_000:
            return 0.0
        if isinstance(value, Exception):
            raise value
        return value

    [finding] = lint(with_planted(picky)).findings
    reason = "raises KeyError: 'surprise'" if isinstance(value, Exception) else f"returns {value!r}"
    assert finding.startswith(f"picky {reason}") and "\n" not in finding and len(finding) < 200


@pytest.mark.megabytes
def test_a_function_that_fails_on_long_text_alone_is_found():
    def picky(completion, problem):
        return 1 / (len(completion) < 500_000)

    assert "picky raises ZeroDivisionError" in lint([picky]).findings[0]


def exponential(completion, problem):
    return 0.0 if re.fullmatch(r"(<|<<)*x", completion) else 0.5


def cubic(completion, problem):
    try:
        return 0.0 * len(re.findall(r"<answer>.*<answer>.*</answer>x", completion, re.DOTALL))
    except Exception:  # a function may catch everything and is stopped nevertheless
        return 0.0


def busy(completion, problem):
    until = time.thread_time() + 0.06 * (len(completion) > 500_000)
    while time.thread_time() < until:
        pass
    return 0.0


@pytest.mark.megabytes
@pytest.mark.parametrize("function", [exponential, cubic, busy])
def test_a_slow_function_is_found_and_does_not_stop_the_lint(function):
    started = time.process_time()
    assert f"{function.__name__} is slow: above 50 ms" in "\n".join(lint([function]).findings)
    assert time.process_time() - started < 2


def computes(completion, problem):
    while True:
        pass


def waits(completion, problem):
    time.sleep(60)


@pytest.mark.parametrize("function", [computes, waits])
def test_a_function_that_never_returns_is_found_once_and_does_not_stop_the_lint(function):
    started = time.perf_counter()
    complaints = [line for line in lint([function], timeout=0.1).findings if "takes more" in line]
    assert [line.partition(" for ")[0] for line in complaints] == [
        f"{function.__name__} takes more than 0.1 seconds"
    ]
    assert time.perf_counter() - started < 10


# --- weights, report, warnings -----------------------------------------------------------------


def test_the_weights_decide_what_outranks_what():
    assert lint(REWARD_FUNCTIONS, {"tag_count": 3.0, "soft_format": 0.0}).findings == []
    assert "outranks the right one" in lint(REWARD_FUNCTIONS, {"correctness": -1.0}).findings[0]
    [finding] = lint(REWARD_FUNCTIONS, {"correctness": 0.0}).findings
    assert finding == "right and wrong answers earn the same, perfect format: 2"
    assert found(taxed_length(), {"tag_count": 0.0}) == ""
    ranking = dict(lint(REWARD_FUNCTIONS, {"correctness": 3.0}).ranking)
    assert ranking["right, perfect format"]["correctness"] == 6.0


def test_the_command_prints_the_ranking_and_fails_where_there_is_a_finding(capsys):
    assert main(["lint"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["total", "correctness"]
    assert lines[2].startswith("4.000") and lines[2].endswith("right, perfect format")
    assert lines[-1] == "No findings."
    assert main(["lint", "--reward_weights", "correctness=-1"]) == 1
    assert "- a wrong answer outranks the right one, perfect format" in capsys.readouterr().out


def test_findings_are_one_line_each_and_warnings_at_the_start_of_a_run(capsys, monkeypatch):
    planted = replace(TASK, reward_functions=with_planted(taxed_length()))
    warn(planted, [], {})
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("main.py: warning: rewards: ") for line in lines)
    monkeypatch.setattr(reward_lint, "WARNINGS", len(lines) - 1)
    warn(planted, [], {})
    shortened = capsys.readouterr().err.splitlines()
    assert shortened[:-1] == lines[:-1] and "and 1 more: see" in shortened[-1]
    warn(TASK, [], {})
    assert capsys.readouterr().err == ""
    assert "1 finding:" in report(lint(with_planted(brevity)))
