"""Chat and group: what they show is what training samples, scores and compares."""

import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_setup, make_tokenizer

import rldatasets
from evaluation import chat
from evaluation.scoring import score
from evaluator import REWARD_FUNCTIONS
from grpo import group_advantages
from launch import commands
from llms import chat_prompt, load_model
from rldatasets import SYSTEM_PROMPT, Problem, load_problems
from sampling.drawing import Filters
from sampling.groups import sample_rollouts
from sampling.rollouts import as_rollouts
from utils import EMBEDDED_MODEL, printable

RIGHT = "<reasoning>\n3 + 4 = 7\n</reasoning>\n<answer>\n7\n</answer>\n"
WRONG = RIGHT.replace("7\n</answer>", "8\n</answer>")
SPOKEN = "It is 7."
EVIL = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e" + RIGHT
TEXTS = [RIGHT, WRONG, SPOKEN, EVIL]


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def said(saved_models, capsys):
    """Runs a command with a toy model; what it prints."""

    def run(name, *argv, status=0):
        assert commands.main([name, str(saved_models["qwen2"]), *map(str, argv)]) == status
        out, error = capsys.readouterr()
        return error if status else out

    return run


def written(*texts):
    """Rollouts (1, G, C) of one question with these texts and log-probs -0.1, -0.2, ... a token."""
    tokenizer = make_tokenizer()
    rows = [tokenizer(text).input_ids for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    logprobs = -0.1 * torch.arange(1, len(rows) + 1)[:, None] * mask
    finished = torch.tensor([True] * (len(rows) - 1) + [False])
    return as_rollouts(tokenizer, [[1, 2, 3]], len(texts), ids, mask, logprobs, finished)


@pytest.fixture
def writes(monkeypatch):
    """Has the model write these texts."""

    def replace(*texts):
        monkeypatch.setattr(chat, "load", lambda *_: make_setup(None, tokenizer=make_tokenizer()))
        monkeypatch.setattr(chat, "sample_group", lambda *_: written(*texts))

    return replace


def assert_harmless(text):
    assert all(c.isprintable() or c == "\n" for c in text)


# --- one answer --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_the_streamed_answer_is_what_training_would_sample(temperature, said, saved_models):
    out = said("chat", "What is 3 + 4?", "--temperature", temperature, "--seed", "5",
               "--max_completion_length", "60")  # fmt: skip
    model, tokenizer = load_model(str(saved_models["qwen2"]), "cpu")
    prompt = chat_prompt(tokenizer, SYSTEM_PROMPT, "What is 3 + 4?")
    rollouts = sample_rollouts(model, tokenizer, [prompt], 1, 60, temperature, [5])
    [[text]] = rollouts.texts
    assert out.startswith(f"What is 3 + 4?\n\n{printable(text, kept=chr(10))}\n\nparsed answer  ")
    assert_harmless(out)
    tokens = int(rollouts.completion_mask.sum())
    assert re.search(rf"^length +{tokens} tokens{'' if rollouts.finished else ', cut off'}$", out,
                     re.MULTILINE)  # fmt: skip


def test_an_answer_is_printed_while_it_is_written(capsys):
    printer = chat.Printer(make_tokenizer(), skip_special_tokens=True)
    tokens = torch.tensor(make_tokenizer()(EVIL + "caf\u00e9 \u6a21\u578b").input_ids)
    pieces = []
    for token in tokens:
        printer.put(token[None])
        pieces.append(capsys.readouterr().out)
    printer.end()
    pieces.append(capsys.readouterr().out)
    whole = "".join(pieces)
    assert whole == printable(EVIL, kept="\n") + "caf\u00e9 \u6a21\u578b\n"
    assert r"\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e<reasoning>" in whole
    assert_harmless(whole)
    assert sum(map(bool, pieces)) > 10


def test_whoever_watches_sees_every_token_of_the_rows_that_go_on(saved_models):
    model, tokenizer = load_model(str(saved_models["llama"]), "cpu")
    prompts = [chat_prompt(tokenizer, "", text) for text in ("a", "ab ba")]
    seen = []
    rollouts = sample_rollouts(model, tokenizer, prompts, 8, 80, 1.5, [0, 1], watch=seen.append)
    ids, mask = rollouts.completion_ids.flatten(0, 1), rollouts.completion_mask.flatten(0, 1)
    assert 0 < rollouts.finished.sum() < 16
    assert [tokens.tolist() for tokens in seen] == [ids[mask[:, t], t].tolist() for t in range(80)]


def rows_of(out):
    """{name: value} of the lines under an answer."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if "  " in line)


@pytest.mark.parametrize(
    ("text", "answer", "parsed", "right"),
    [
        (RIGHT, "7", "7", "yes"),
        (RIGHT, "8", "7", "no"),
        (RIGHT, None, "7", "?"),
        (SPOKEN, "7", "none: no one pair of answer tags", "no"),
        (EVIL, "7", "7", "yes"),
    ],
)
def test_an_answer_is_judged_by_what_training_rewards(text, answer, parsed, right, writes, said):
    writes(text)
    gold = ["--answer", answer] if answer else []
    out = said("chat", "What is 3 + 4?", *gold, "--reward_weights", "tag_count=3")
    rows = rows_of(out)
    assert (rows["parsed answer"], rows["right"]) == (parsed, right)
    assert rows["gold answer"] == (answer or chat.NEEDS_ONE)
    problem = Problem("What is 3 + 4?", answer or "none", "")
    total = 0
    for function in REWARD_FUNCTIONS:
        value = function(text, problem)
        assert float(rows[function.__name__]) == pytest.approx(value, rel=1e-3)
        total += value * (3 if function.__name__ == "tag_count" else 1)
    assert float(rows["total reward"]) == pytest.approx(total, rel=1e-3)
    assert_harmless(out)


def test_a_question_of_a_dataset_brings_its_answer(writes, said, monkeypatch):
    monkeypatch.setattr(rldatasets, "ARITHMETIC_SIZES", {"train": 20, "test": 10})
    problem = load_problems("arithmetic", None, "test", 0, 3)[2]
    writes(RIGHT.replace("\n7\n", f"\n{problem.answer}\n"))
    where = ["--dataset_name", "arithmetic", "--difficulty", "3", "--question", "2"]
    out = said("chat", *where)
    assert out.startswith(f"{problem.question}\n")
    assert (rows_of(out)["gold answer"], rows_of(out)["right"]) == (problem.answer, "yes")
    train = load_problems("arithmetic", None, "train", 4, 3)[2]
    out = said("chat", *where, "--split", "train", "--seed", "4")
    assert out.startswith(f"{train.question}\n") and train != problem
    message = said("chat", *where[:-1], "10", status=2)
    assert message == (
        "main.py chat: error: --question 10: the test split has 10 questions, counted from 0\n"
    )


def typed(monkeypatch, *lines):
    """Has these lines typed at the prompt; a line that is an exception is raised."""
    waiting = list(lines)

    def read(prompt):
        line = waiting.pop(0)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_questions_are_answered_one_by_one_until_there_are_no_more(said, monkeypatch):
    typed(monkeypatch, "What is 3 + 4?", "", "x" * 2000, "And 5 + 6?", EOFError)
    out = said("chat", "--max_completion_length", "20")
    monkeypatch.undo()
    first, rest = out.split("--max_completion_length 20: with the longest")
    alone = [said("chat", text, "--max_completion_length", "20").split("\n\n")[1]
             for text in ("What is 3 + 4?", "And 5 + 6?")]  # fmt: skip
    assert alone[0] != alone[1] and alone[0] in first and alone[1] in rest


def test_ctrl_c_ends_a_chat_in_one_line(said, monkeypatch):
    typed(monkeypatch, KeyboardInterrupt)
    assert said("chat", status=130) == "\nmain.py chat: interrupted\n"


# --- a group -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_group_is_shown_with_the_rewards_and_advantages_that_training_uses(scale, writes, said):
    writes(*TEXTS)
    out = said("group", "What is 3 + 4?", "--answer", "7", "--group_size", "4",
               "--advantage_scale", scale)  # fmt: skip
    problem = Problem("What is 3 + 4?", "7", "")
    rewards = score(written(*TEXTS), [problem], REWARD_FUNCTIONS)
    totals = [sum(f(text, problem) for f in REWARD_FUNCTIONS) for text in TEXTS]
    mean = sum(totals) / 4
    std = math.sqrt(sum((total - mean) ** 2 for total in totals) / 3)
    assert f"4 completions at temperature 0.9: reward mean {mean:.3f}, std {std:.3f}\n" in out
    blocks = re.findall(
        r"^ *(\d+)  reward (\S+)   advantage (\S+)   (\d+) tokens(, cut off)?   "
        r"mean log-prob (\S+)\n((?:    [a-z].*\n)+)", out, re.MULTILINE,
    )  # fmt: skip
    advantages = group_advantages(rewards.total, scale)[0].tolist()
    assert len(blocks) == 4
    for i, (number, reward, advantage, length, cut_off, logprob, parts) in enumerate(blocks):
        by_hand = (totals[i] - mean) / (std + 1e-4 if scale == "std" else 1)
        assert int(number) == i + 1
        assert float(reward) == pytest.approx(totals[i], abs=6e-4)
        assert float(advantage) == pytest.approx(by_hand, abs=1e-3)
        assert float(advantage) == pytest.approx(advantages[i], abs=6e-4)
        assert int(length) == len(make_tokenizer()(TEXTS[i]).input_ids)
        assert bool(cut_off) == (i == 3)
        assert float(logprob) == pytest.approx(-0.1 * (i + 1), abs=1e-3)
        earned = dict(pair.rsplit(" ", 1) for pair in " ".join(parts.split()).split(", "))
        expected = dict(zip(rewards.names, rewards.per_function[0, i].tolist()))
        assert {name: float(value) for name, value in earned.items()} == pytest.approx(expected)
    assert_harmless(out)
    assert max(map(len, out.splitlines())) <= 80


def test_a_group_without_a_gold_answer_says_what_needs_one(writes, said):
    writes(RIGHT, RIGHT)
    out = said("group", "What is 3 + 4?", "--group_size", "2")
    assert f"gold      {chat.NEEDS_ONE}\n" in out and "correctness 0, " in out
    assert "All earned the same: no advantage" in out and out.count("advantage +0.000") == 2


def test_a_group_is_sampled_as_in_training(said, saved_models):
    out = said(
        "group", "What is 3 + 4?", "--group_size", "3", "--seed", "9", "--temperature", "1.3",
        "--max_completion_length", "40", "--top_k", "50", "--full",
    )  # fmt: skip
    model, tokenizer = load_model(str(saved_models["qwen2"]), "cpu")
    prompt = chat_prompt(tokenizer, SYSTEM_PROMPT, "What is 3 + 4?")
    rollouts = sample_rollouts(model, tokenizer, [prompt], 3, 40, 1.3, [9], Filters(top_k=50))
    for text in rollouts.texts[0]:
        lines = printable(text.rstrip("\n"), kept="\n").split("\n")
        assert "".join(f"    | {line}\n" for line in lines) in out
    assert_harmless(out)


def test_a_long_completion_is_shown_in_short_and_whole_on_request():
    text = "\n".join(f"line {i} " + "word " * 30 for i in range(9)) + "\n<answer>\n7\n</answer>\n"
    lines = chat.excerpt(text, 74)
    assert max(map(len, lines)) <= 74
    assert len(lines) == 7 and lines[2] == "... 24 more lines ..."
    assert lines[0].startswith("line 0 word") and lines[-3:] == ["<answer>", "7", "</answer>"]
    assert chat.excerpt(text, 74, whole=True) == text.rstrip("\n").split("\n")
    assert chat.excerpt(RIGHT, 74) == RIGHT.rstrip("\n").split("\n")
    assert chat.excerpt("", 74) == [""]


# --- the command lines -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([""], ["main.py: error: unknown command ;", "there are lint, compare, "]),
        (["chta"], ["main.py: error: ", "unknown command chta; did you mean chat?"]),
        (["chat"], ["main.py chat: error:", "MODEL"]),
        (["chat", "nowhere"], ["MODEL nowhere: no such directory"]),
        (["chat", EMBEDDED_MODEL, "--anwser", "x"], ["--anwser; did you mean --answer?"]),
        (["chat", EMBEDDED_MODEL, "--group_size", "4"], ["unknown argument --group"]),
        (["chat", EMBEDDED_MODEL, "--temperature", "-1"], ["--temperature", "'-1'"]),
        (["chat", EMBEDDED_MODEL, " "], ["the question ' ': is empty"]),
        (["chat", EMBEDDED_MODEL, "\udcff"], ["not text"]),
        (["chat", EMBEDDED_MODEL, "--answer", "7"], ["--answer: goes with"]),
        (["chat", EMBEDDED_MODEL, "--preset", "tpu"], ["main.py chat: ", "'tpu'"]),
        (["chat", EMBEDDED_MODEL, "--max_completion_length", "9000"],
         ["--max_completion_length 9000: above the model's context"]),
        (["group"], ["main.py group: error:", "MODEL"]),
        (["group", EMBEDDED_MODEL], ["which question?", "--question N"]),
        (["group", EMBEDDED_MODEL, "1?", "--question", "1"], ["--question 1: there is a"]),
        (["group", EMBEDDED_MODEL, "1?", "--answer", ""], ["--answer '': is empty"]),
        (["group", EMBEDDED_MODEL, "1?", "--group_size", "1"], ["--group_size", "at least 2"]),
        (["group", EMBEDDED_MODEL, "1?", "--fulll"], ["--fulll; did you mean --full?"]),
        (["group", EMBEDDED_MODEL, "--question", "1", "--split", "dev"], ["--split", "'dev'"]),
        (["group", EMBEDDED_MODEL, "--question", "1", "--dataset_path", "no"],
         ["--dataset_path no: no file"]),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_line_with_status_2(argv, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and len(message) <= 201
    assert message.startswith("main.py") and all(part in message for part in parts), message


def test_an_unknown_reward_is_named_before_the_model_loads(said, monkeypatch):
    monkeypatch.setattr(chat, "load", None)
    message = said("group", "1?", "--reward_weights", "corectness=2", status=2)
    assert message.startswith("main.py group: error: --reward_weights corectness: no such reward;")


def test_help_and_mistakes_do_not_wait_for_torch():
    script = """
import runpy, sys
for argv in (["-h"], ["chat", "-h"], ["chat", "/nowhere"], ["group", "--help"],
             ["group", "/nowhere", "1?"]):
    sys.argv = ["main.py", *argv]
    sys.modules.pop("launch.door", None)
    try:
        runpy.run_path("main.py", run_name="__main__")
    except SystemExit as stop:
        print("status", stop.code)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    statuses = [line for line in lines if line.startswith("status")]
    assert statuses == [f"status {code}" for code in (0, 0, 2, 0, 2)], done.stderr
    assert lines[-1] == "False"
    assert sum(line.startswith("usage: ") for line in lines) == 3
