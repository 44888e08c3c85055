"""Every command in README, CONTRIBUTING and docs/ is one that the program understands.

All are read by the parsers that will read them: those of main.py, of the benchmarks, of torchrun,
accelerate and make. Some are carried out, on a toy model; why others are not stands in NOT_RUN.
docs/log.md is left out: its commands are those of their day.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from conftest import ROOT
from matplotlib.figure import Figure
from torch.distributed.run import get_args_parser

import main
import utils
from launch import checks, commands
from launch.commands import COMMANDS, build_command_parser, parse_command
from launch.parser import build_parser, parse_args
from records.files import LABELS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "log.md"]
STARTS = ("python ", "make ", "accelerate launch", "torchrun", "pip install")
OF_MAKE = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "ARGS")
OTHERS_FLAGS = {"--nnodes", "--cpu"}  # of torchrun and of accelerate
# What stands for something of the user's, where it is not a file: see `places`.
STANDS_FOR = {"N": "1", "M": "2", "W": "0.1", "NAME=WEIGHT": "correctness=2", "RUN@STEP": "RUN@0"}
TOY = shlex.split("--num_train_iters 1 --cold_start_steps 0 --questions_per_step 2 --group_size 2 "
                  "--max_completion_length 6 --eval_problems 2")  # fmt: skip
# Commands that are carried out, in this order, with more flags where they would take long.
MODEL = ["--model_name", "toy"]
RUN = {
    "python main.py --preset cpu --output_dir runs/demo": [*MODEL, *TOY],
    "python main.py --resume --output_dir runs/demo": [],
    "python main.py chat runs/demo/model --preset cpu --question 3": [],
    'python main.py group runs/demo/model --preset cpu "Anna has 8 apples. Anna finds 5 more '
    'apples. How many apples does Anna have now?" --answer 13 --group_size 8': [],
    "python main.py evaluate MODEL --preset cpu --eval_samples 8": TOY[-4:],
    "python main.py --model_name path/or/hub-name --dataset_path mine.jsonl --evaluator "
    "rewards.py": ["--preset", "cpu", *TOY],
    "python main.py --preset cpu --save_rollouts --output_dir runs/a": [*MODEL, *TOY],
    "python main.py compare runs/a@0 runs/a": [],
    "python main.py compare runs/a runs/b": [],
    "python main.py plot runs/a runs/b": [],
    "python main.py report runs/a": [],
    "python main.py lint": [],
    "python main.py lint --evaluator rewards.py --reward_weights brevity=0.2": [],
}
STATUS = {"python main.py lint --evaluator rewards.py --reward_weights brevity=0.2": 1}  # a finding
# What the others begin with, and who carries them out, or why nobody does.
NOT_RUN = {
    "make ": "builds an environment; what it would run is read here",
    "pip install": "needs a package index; versions are compared here",
    "torchrun ": "several GPUs; on two CPU processes: tests/launch/test_launchers.py",
    "accelerate launch ": "the same",
    "python benchmarks/": "minutes; on toy models: tests/test_benchmarks.py",
    "python tests/launch/freeze_command_line.py": "tests/launch/test_command_line.py",
    "python plotter.py ": "tests/records/test_plots.py",
    "python main.py plot ": "others of the same command are run here",
    "python main.py plan": "a minute; tests/launch/test_planner.py",
    "python main.py --plan": "the same",
    "python main.py --help": "tests/launch/test_parser.py",
    "python main.py --preset cpu --help": "the same",
    "python main.py --resume --output_dir runs/NAME": "as for runs/demo",
    "python main.py chat runs/demo/model --preset cpu": "asks; tests/evaluation/test_chat.py",
    "python main.py evaluate MODEL": "the hub: GSM8K",
    "python main.py --preset cpu --dataset_name kuhn": "minutes; tests/test_self_play_run.py",
    "python main.py --preset cpu --dataset_name nim": "the same",
    "python main.py play runs/demo-selfplay/model": "asks; tests/evaluation/test_play.py",
    "python main.py lint --dataset_name": "tests/evaluation/test_verdicts.py",
    "python main.py lint --preset cpu --dataset_name tell": "minutes; test_referee_run.py",
    "python main.py --preset cpu --dataset_name tell": "the same",
    "python main.py --preset cpu --dataset_name judging/tell": "minutes; test_judging.py",
    "python main.py --preset cpu --dataset_name debate": "a referee; tests/tasks/test_debate.py",
    "python main.py --model_name path/or/hub-name": "the hub: GSM8K, or as with --evaluator",
    "python main.py --dataset_name": "the hub; tests/reading/test_shapes.py",
    "python main.py --dataset_path": "a GPU; tests/reading/",
    "python main.py --model_name Qwen/Qwen2.5-VL-3B-Instruct": "the same; tests/vision/",
    "python main.py --model_name HuggingFaceTB/SmolVLM": "the same",
    "python main.py chat runs/clock/model": "the same",
    "python main.py --sampler vllm": "vLLM and a GPU; tests/sampling/test_real_vllm.py",
    "python main.py --lora_rank": "a GPU and the hub; tests/training/test_lora.py",
    "python main.py --preset cpu --seed": "minutes each; tests/test_main.py, tests/launch/test_*",
    "python main.py --preset cpu --dataset_name gsm8k": "an hour, and the hub",
    "python main.py --preset cpu --dataset_name calculator": "minutes; tests/tasks/",
}
ONLY = {
    "python main.py": "a GPU and the hub",
    "python main.py --tis_cap 2": "the same",
}  # as they stand, not what they begin


def blocks_and_rest(text):
    """The lines of fenced blocks without a language, and the text without any block."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = [match[2] for match in fence.finditer(text) if not match[1]]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()], fence.sub("", text)


def code(page):
    """Everything that a page shows as code, a line each: of its blocks, and within its text."""
    lines, rest = blocks_and_rest(page.read_text(encoding="utf-8"))
    spans = (" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest))
    return [" ".join(line.split("#")[0].split()) for line in lines], list(spans)


def documented():
    """{command: the page that has it first}."""
    found = {}
    for page in PAGES:
        for text in [text for part in code(page) for text in part]:
            if text.startswith(STARTS):
                found.setdefault(text, page.name)
    return found


DOCUMENTED = documented()


# --- reading a command -----------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A directory with the files that the pages speak of, and a hub that has whatever is asked."""
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "qwen2", "max_position_embeddings": 32768}
    for model in ("MODEL", "runs/demo/model", "runs/demo-selfplay/model", "RUN/model",
                  "runs/clock/model", "START/model", "path/or/hub-name",
                  "runs/referee/model", "runs/demo-judge-referee/model"):  # fmt: skip
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "config.json").write_text(json.dumps(config))
        (tmp_path / model / "model.safetensors").touch()
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-vllm" / "bin" / "python").symlink_to(sys.executable)
    for run in ("runs/demo", "runs/NAME"):
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / "config.json").write_text('{"flags": {"seed": 7111994}}')
    user_files(tmp_path)
    monkeypatch.setattr(
        checks, "hub_file", lambda *_, **__: str(tmp_path / "MODEL" / "config.json")
    )
    monkeypatch.setattr(checks, "check_output_dir", lambda args: None)
    for module in (commands, sys.modules["launch.parser"]):
        monkeypatch.setattr(module, "check_output_dir", lambda args: None)
    return tmp_path


def user_files(folder):
    rows = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "GSM8K_DIRECTORY").mkdir()
    for name in ("GSM8K_DIRECTORY/train.jsonl", "GSM8K_DIRECTORY/test.jsonl", "mine.jsonl"):
        (folder / name).write_text(text)
    (folder / "mine.csv").write_text("question,answer\nWhat is 1 and 1?,2\n")
    (folder / "tasks").symlink_to(ROOT / "tasks")
    [brevity] = re.findall(r"^def brevity.*?\n\n", (ROOT / "README.md").read_text(), re.M | re.S)
    rewards = (
        "from evaluator import correctness\n\n\n%s\nREWARD_FUNCTIONS = [correctness, brevity]\n"
    )
    (folder / "rewards.py").write_text(rewards % brevity)


def words_of(text):
    return [STANDS_FOR.get(word, word) for word in shlex.split(text) if word != "..."]


def read_main(words):
    """What `python main.py WORDS` makes of its words, as the door does; --help is understood."""
    try:
        if words and not words[0].startswith("-") and words[0] != "COMMAND":
            parse_command(words)
        else:
            parse_args([word for word in words if word != "COMMAND"])
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in words, f"refused: {words}"


def read_script(path, words, monkeypatch):
    """Run a benchmark up to where it has read its flags."""

    class Read(Exception):
        pass

    def parse(parser, argv=None):
        original(parser, argv)
        raise Read

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(sys, "argv", [path, *words])
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    with monkeypatch.context() as patched, pytest.raises(Read):
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        runpy.run_path(str(ROOT / path), run_name="__main__")


def read_make(target, words):
    """What make would run. Its commands of main.py are read too."""
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target in targets
    if shutil.which("make") is None:
        pytest.skip("make is not there")
    # As from a shell, though `make test ARGS=...` may have started this.
    env = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), target, *words],
        capture_output=True, text=True, check=True, env=env,
    )  # fmt: skip
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if " main.py" in line and "mv " not in line:
            read_main(shlex.split(line.split(" main.py", 1)[1]))


def read_pip(words):
    pinned = "".join((ROOT / name).read_text() for name in ("requirements-dev.txt", "Makefile"))
    for word in words:
        if word.endswith(".txt"):
            assert (ROOT / word).is_file()
        elif not word.startswith("-"):
            assert "==" in word and word in pinned


@pytest.mark.parametrize("text", DOCUMENTED)
def test_a_command_in_the_docs_is_understood(text, places, monkeypatch):
    program, *words = words_of(text)
    if program == "make":
        read_make(*words[:1], words[1:])
    elif program == "pip":
        read_pip(words[1:])
    elif program in ("torchrun", "accelerate"):
        parser = get_args_parser() if program == "torchrun" else launch_command_parser()
        args = parser.parse_args(words if program == "torchrun" else words[1:])
        config = getattr(args, "config_file", None)
        assert args.training_script == "main.py" and (config is None or (ROOT / config).is_file())
        read_main(args.training_script_args)
    elif words[0] == "main.py":
        read_main(words[1:])
    elif words[0] == "plotter.py":
        read_main(["plot", *words[1:]])
    elif words[0].startswith("benchmarks/") and words[1:]:
        read_script(words[0], words[1:], monkeypatch)
    else:
        assert (ROOT / words[0]).is_file() and not words[1:]


def test_a_command_that_is_none_is_refused(places, monkeypatch):
    for words in (["--lerning_rate", "1"], ["comapre", "a", "b"], ["compare", "a"]):
        with pytest.raises(AssertionError, match="refused"):
            read_main(words)
    with pytest.raises(AssertionError):
        read_make("demoo", [])
    with pytest.raises(AssertionError):
        read_pip(["peft==0.0.1"])
    with pytest.raises(SystemExit):
        read_script("benchmarks/memory.py", ["--complexions", "2"], monkeypatch)


# --- carrying it out -------------------------------------------------------------------------


def neither(texts):
    """Those that are not carried out, and of which NOT_RUN does not say why."""
    starts = tuple(NOT_RUN)
    return [text for text in texts if not (text in RUN or text in ONLY or text.startswith(starts))]


def test_every_command_is_carried_out_or_it_is_said_why_not():
    assert neither(DOCUMENTED) == []
    assert neither(["python main.py --kl_beta 0", "python setup.py"]) == [
        "python main.py --kl_beta 0", "python setup.py",
    ]  # fmt: skip
    # Nothing is listed that no page has any more, and whoever is named is there.
    assert {*RUN, *ONLY} <= set(DOCUMENTED)
    for start, reason in NOT_RUN.items():
        assert any(text.startswith(start) and text not in RUN for text in DOCUMENTED), start
        for path in re.findall(r"tests/[\w/*.]+", reason):
            assert list(ROOT.glob(path)), path


@pytest.mark.figures
def test_the_docs_commands_run_on_a_toy_model(saved_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "keep_freed_memory", lambda: None)  # it would stay
    # Figures are composed but not painted, which would take most of the time.
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **more: Path(path).touch())
    (tmp_path / "path/or").mkdir(parents=True)
    for name in ("toy", "MODEL", "path/or/hub-name"):
        (tmp_path / name).symlink_to(saved_models["qwen2"])
    user_files(tmp_path)
    for text, more in RUN.items():
        if "runs/b" in text and not (tmp_path / "runs/b").exists():
            shutil.copytree("runs/a", "runs/b")
        words = [*words_of(text)[2:], *more]
        status = commands.main(words) if words[0] in COMMANDS else main.command(parse_args(words))
        assert status == STATUS.get(text, 0), f"{text}\n{capsys.readouterr().err}"
        said = capsys.readouterr().out
        assert said, text
        AcceleratorState._reset_state(reset_partial_state=True)
    # What the README says that a run leaves.
    left = {path.name for path in (tmp_path / "runs/demo").iterdir()}
    assert left >= {"config.json", "metrics.jsonl", "eval.jsonl", "completions", "checkpoints",
                    "model", "plots", "report.html"}  # fmt: skip


# --- the rest of what pages name -------------------------------------------------------------


def test_blocks_hold_commands_alone():
    for page in PAGES:
        for line in code(page)[0]:
            assert line.startswith((*STARTS, "export ", "source ")), f"{page.name}: {line}"


def flags_of_all():
    parsers = [build_parser("cpu"), *map(build_command_parser, COMMANDS)]
    return {flag for parser in parsers for flag in parser._option_string_actions}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_a_page_names_exist_and_take_what_it_gives_them(page):
    spans = [span for span in code(page)[1] if span.startswith("--")]
    for span in spans:
        words = words_of(span)
        named = {word for word in words if word.startswith("--")}
        assert named <= flags_of_all() | OTHERS_FLAGS, f"{page.name}: {span}"
        if any(not word.startswith("--") for word in words) and not re.search("[A-Z]{2}", span):
            build_parser("cpu").parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    folders = r"(?:sampling|training|evaluation|records|launch|tasks|tests|configs|benchmarks)/"
    for span in code(page)[1]:
        if re.fullmatch(rf"{folders}[\w./]*|\w+\.py", span) and span not in MADE_UP:
            assert any((ROOT / place / span).exists() for place in (".", *FOLDERS)), span


MADE_UP = {"rewards.py", "tasks/NAME.py"}
FOLDERS = ("sampling", "training", "configs/accelerate")


def test_every_metric_has_its_meaning():
    [spans] = [code(page)[1] for page in PAGES if page.name == "runs.md"]
    for name in LABELS:
        assert name in spans or f"{name.split('/')[0]}/…" in spans, f"docs/runs.md: {name}"


def test_the_readme_is_short_and_every_page_is_linked_from_it():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 10_000
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", readme.decode()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert len((ROOT / "CONTRIBUTING.md").read_bytes()) <= 3000
