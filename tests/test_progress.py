"""What runs is on the screen: nothing stands still for long, and a file gets a line per step."""

import io
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from terminal import changes, longest_gap, recorded
from toys import flags_of

import training.progress
from records.budget import FEW, how_long, in_words
from training.progress import Progress, Stopwatch, phase, progress

# A toy run whose stages each last six seconds: longer than anything may be silent.
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
sys.argv = ["main.py", *sys.argv[1:]]
from launch import door
args = door.enter(sys.argv[1:])
import main, records.run
from launch import loading
from evaluation import held_out
from training import update
from records import checkpoints

def slow(owner, name, seconds=6, only=1):
    original, calls = getattr(owner, name), iter(range(10**6))
    def wrapper(*args, **kwargs):
        if next(calls) < only:
            time.sleep(seconds)
        return original(*args, **kwargs)
    setattr(owner, name, wrapper)

for owner, name in ((loading, "load_policy"), (loading, "warn"), (main, "cold_start"),
                    (main, "score"), (held_out, "evaluate"), (main, "sample_groups"),
                    (update, "grpo_loss"), (checkpoints, "save_model")):
    slow(owner, name)
slow(records.run, "plot_run", 11)  # six of them beside save_model's
sys.exit(main.command(args))
"""


@pytest.mark.slow
def test_nothing_is_silent_for_five_seconds(saved_models, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT)))
    flags = [*flags_of(saved_models, tmp_path / "run"), "--eval_problems", FEW + 1]
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() * 2)  # a fifth of it is held out: more than a FEW
    status, writes = recorded([sys.executable, str(script), *map(str, flags)], seconds=240)
    text = "".join(text for _, text in writes)
    assert status == 0, text
    gap, line = longest_gap(writes)
    assert gap < 5, (gap, line)
    for stage in ("starting", "loading", "lint", "cold start", "evaluation", "sampling", "rewards",
                  "policy", "saving", "drawing figures"):  # fmt: skip
        assert re.search(rf"\r *{stage}, .*\b[3-6] s", text), stage
    assert re.search(r"about .* for 3 steps: ", text)


@pytest.mark.slow
def test_a_file_gets_a_line_per_step_and_no_redraws(saved_models, tmp_path):
    flags = map(str, flags_of(saved_models, tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *flags], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    steps = re.findall(r"^step (\d)/3: reward .*; \d+ s, \d+ s left at this pace$", done.stdout,
                       re.MULTILINE)  # fmt: skip
    assert steps == ["1", "2", "3"]
    assert len(done.stdout.splitlines()) < 50


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """A Progress that draws on a screen, and the screen."""
    screen, one = Screen(), Progress()
    monkeypatch.setattr(training.progress, "progress", one)
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, "100")
    one.open(bar_format="{desc}", leave=False, file=screen)
    yield one, screen
    one.close()


def test_what_runs_is_told_with_how_far_it_is(shown):
    one, screen = shown
    with one:
        assert one.text() == "starting, 0 s"
        with phase("evaluation"):
            one.tick(1200, "tokens")
            one.tick(128, "answers", of=512)
            one.tick(100, "tokens")
            assert one.text() == "evaluation, 1,300 tokens, 128 of 512 answers, 0 s"
            with Stopwatch()("rewards"):
                assert one.text() == "rewards, 0 s"
            time.sleep(1.2)  # the thread draws
        assert "evaluation, 1,300 tokens, 128 of 512 answers, 1 s" in screen.getvalue()
        assert one.text() == ""
    seconds, counts = one.past["evaluation"]
    assert seconds > 1 and counts == {"tokens": 1300, "answers": 128}


def test_a_stage_that_fails_is_over(shown):
    one, _ = shown
    with one, pytest.raises(KeyError), phase("loading"):
        raise KeyError
    assert one.stages == [] and one.bar is None


def test_without_a_terminal_nothing_is_drawn(capsys):
    with Progress() as one, one.shown("loading"):
        assert one.bar.disable and one.thread is None
    one.tick(1, "tokens")  # where nothing runs
    assert capsys.readouterr() == ("", "")
    assert progress.stages == []


def args(**changes):
    flags = {"questions_per_step": 8, "group_size": 8, "num_inner_epochs": 1, "eval_iterations": 0,
             "short_eval_iterations": 0}  # fmt: skip
    return type("Args", (), {**flags, **changes})


def test_the_estimate_is_that_of_its_arithmetic():
    """512 answers of 40 tokens in 20 s; 4 cold-start steps of 8 times 140 tokens in 28 s."""
    past = {"evaluation": (20.0, {"answers": 512, "tokens": 512 * 40}),
            "cold start": (28.0, {"steps": 4, "tokens": 4 * 8 * 140})}  # fmt: skip
    # A step: 64 answers at 20/512 s = 2.5 s; 64 * 40 + 8 * 100 tokens at 28/4480 s = 21 s.
    assert how_long(args(), 20, past).startswith(f"about {in_words(20 * 23.5 + 20)} for 20 steps")
    longer = how_long(args(eval_iterations=5, num_inner_epochs=2), 20, past)
    assert longer.startswith(f"about {in_words(20 * 44.5 + 4 * 20)} for 20 steps")
    assert "first evaluation" in longer and "cold start" in longer
    for missing in past:
        assert how_long(args(), 20, {k: v for k, v in past.items() if k != missing}) is None
    assert how_long(args(), 0, past) is None
    game = {"evaluation": (27.0, {"answers": 7, "tokens": 40}), "cold start": past["cold start"]}
    assert how_long(args(), 20, game) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (720, "12 min"), (5400, "1.5 h"), (11160, "3.1 h")],
)
def test_a_time_to_plan_with(seconds, words):
    assert in_words(seconds) == words


def test_a_screen_changes_with_its_last_line_and_with_lines_above():
    writes = [(0.0, "\rstarting"), (1.0, "\rstarting"), (4.0, "\r\x1b[Kloading"), (9.0, "a\n"),
              (9.5, "\r"), (12.0, "")]  # fmt: skip
    assert [when for when, _ in changes(writes)] == [0.0, 0.0, 4.0, 9.0, 12.0]
    assert longest_gap(writes) == (5.0, "loading")
