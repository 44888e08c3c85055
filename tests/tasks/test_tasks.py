"""A task is a file; --evaluator is one of the user's; other people's verifiers are kept at bay."""

import hashlib
import json
import signal
import sys
import textwrap
import time
from dataclasses import replace
from importlib import util
from types import SimpleNamespace

import pytest
from conftest import ROOT, TASK

import evaluator
import main
import rldatasets
import tasks
from evaluation import reward_lint
from evaluation.comparison import compare, read_evaluation
from launch import commands, parser
from launch.parser import parse_args
from rldatasets import Problem, fingerprint, load_problems
from tasks import load_task
from tasks.verifier_process import Judge, without_eval
from utils import TimedOut, UserError, time_limit

TINY = [
    "--preset", "cpu", "--questions_per_step", "2", "--group_size", "2", "--num_train_iters", "1",
    "--eval_problems", "4", "--max_completion_length", "6", "--max_prompt_length", "500",
    "--cold_start_steps", "1",
]  # fmt: skip
needs_gym = pytest.mark.skipif(
    not util.find_spec("reasoning_gym"), reason="pip install reasoning-gym==0.1.25 for this test"
)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Which take longer than all else in a run of toys."""
    monkeypatch.setattr("records.run.plot_run", lambda path: None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return str(path)


def written(answer):
    return f"<reasoning>\nSo.\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A directory of tasks in the place of tasks/. Call it to add one, with its name and text."""
    monkeypatch.setattr(tasks, "TASKS", tmp_path)
    added = []

    def add(name, text):
        added.append(f"tasks.{name}")
        return write(tmp_path / f"{name}.py", text)

    yield add
    for name in added:
        sys.modules.pop(name, None)


def args_of(dataset_name, **more):
    return SimpleNamespace(**{
        "dataset_name": dataset_name, "dataset_path": None, "difficulty": 1, "evaluator": None,
        "seed": 3, **more,
    })  # fmt: skip


@pytest.fixture
def refused(capsys):
    """The one line that main.py's flags are refused with."""

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            parse_args(["--preset", "cpu", *map(str, argv)])
        message = capsys.readouterr().err
        assert stop.value.code == 2
        assert message.startswith("main.py: error: ")
        assert message.count("\n") == 1 and len(message) <= 201
        return message

    return run


# --- a task is a file ----------------------------------------------------------------------------

PARITY = '''
    """Even or odd?"""

    from rldatasets import Problem

    SYSTEM_PROMPT = "Say even or odd."


    def problems(split, seed):
        numbers = range(20) if split == "test" else range(20 + seed % 7, 60)
        return [Problem(f"{n}?", ("even", "odd")[n % 2], f"{n} mod 2") for n in numbers]


    def is_correct(completion, problem):
        return problem.answer in completion or len(completion) % 2 == int(problem.question[:-1]) % 2


    def even_length(completion, problem):
        """1 for an even number of characters."""
        return float(len(completion) % 2 == 0)


    def worked_answer(problem):
        return f"{problem.solution}: {problem.answer}"


    REWARD_FUNCTIONS = [even_length]
'''


def test_a_file_is_a_task_whose_prompt_rewards_and_verdict_a_run_uses(
    own_tasks, saved_models, tmp_path, monkeypatch
):
    own_tasks("parity", PARITY)
    run = tmp_path / "run"
    asked, taught = [], []

    def chat_prompt(tokenizer, *inputs):
        asked.append(tokenizer.decode(prompt := its_prompt(tokenizer, *inputs)))
        return prompt

    def worked_ids(tokenizer, *inputs):
        worked = its_ids(tokenizer, *inputs)
        taught.append([tokenizer.decode(ids) for ids, _ in worked])
        return worked

    its_prompt, its_ids = main.chat_prompt, main.worked_ids
    monkeypatch.setattr(main, "chat_prompt", chat_prompt)
    monkeypatch.setattr(main, "worked_ids", worked_ids)
    main.train(parse_args([
        *TINY, "--dataset_name", "parity", "--output_dir", str(run),
        "--model_name", str(saved_models["qwen2"]), "--reward_weights", "even_length=3",
    ]))  # fmt: skip
    assert len(asked) == 2 and all("Say even or odd." in text for text in asked)
    assert len(taught[-1]) == 2 and all(" mod 2: " in text for text in taught[-1])
    rows = lines(run / "completions" / "step_00000.jsonl")
    for row in rows:
        assert row["rewards"] == {"even_length": float(len(row["completion"]) % 2 == 0)}
        assert row["reward"] == 3 * row["rewards"]["even_length"]
    held_out = lines(run / "completions" / "eval_00001.jsonl")
    for row in held_out:
        assert "Say even or odd." in row["prompt"] and "<reasoning>" not in row["prompt"]
        expected = row["answer"] in row["completion"]
        expected |= len(row["completion"]) % 2 == int(row["question"][:-1]) % 2
        assert row["correct"] is expected
    summary = lines(run / "eval.jsonl")[-1]
    assert summary["accuracy"] == sum(row["correct"] for row in held_out) / 4
    assert "rewards/even_length" in summary and "rewards/correctness" not in summary
    assert json.loads((run / "config.json").read_text())["flags"]["dataset_name"] == "parity"


def test_what_a_task_leaves_out_is_the_default(own_tasks):
    own_tasks("plain", """
        from evaluator import is_correct  # to use it is not to choose it
        from rldatasets import SYSTEM_PROMPT, Problem

        def problems(split, seed):
            return [Problem(f"{split} {seed}?", "1", "")]
    """)  # fmt: skip
    task = load_task(args_of("plain"))
    assert [p.question for p in task.problems("train")] == ["train 3?"]
    assert (task.system_prompt, task.worked_answer) == (rldatasets.SYSTEM_PROMPT,
                                                        rldatasets.worked_answer)  # fmt: skip
    assert (task.reward_functions, task.is_correct) == (evaluator.REWARD_FUNCTIONS,
                                                        evaluator.is_correct)  # fmt: skip


def test_a_task_without_problems_reads_those_of_a_path(own_tasks, tmp_path):
    own_tasks("files", "SYSTEM_PROMPT = 'Short.'\n")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"question": "{i}?", "answer": {i}}}\n' for i in range(20)))
    task = load_task(args_of("files", dataset_path=str(path)))
    assert task.system_prompt == "Short."
    assert len(task.problems("train")) + len(task.problems("test")) == 20
    with pytest.raises(UserError, match="--dataset_name files: reads files; name them by"):
        load_task(args_of("files"))


def test_a_variant_is_named_after_a_slash(own_tasks):
    own_tasks("many", """
        from rldatasets import Problem

        VARIANTS = ["short", "long"]

        def problems(split, seed, variant):
            return [Problem(f"{variant} {split}?", "1", "")]
    """)  # fmt: skip
    assert load_task(args_of("many/long")).problems("test")[0].question == "long test?"
    for name, message in (
        ("many", "--dataset_name many: no such variant; add one, e.g. many/short"),
        ("many/lnog", "--dataset_name many/lnog: no such variant; did you mean long?"),
        ("gsm8k/long", "--dataset_name gsm8k/long: gsm8k has no variants; leave out /long"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(args_of(name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def problems(:\n", "bad.py:1: SyntaxError: invalid syntax"),
        ("import no_such_module\n", "bad.py:1: ModuleNotFoundError: No module named"),
        ("\nproblems = 3\n", "bad.py:2: problems is no function; write it as def"),
        ("SYSTEM_PROMPT = 3\n", "bad.py:1: SYSTEM_PROMPT is no text"),
        ("is_correct = print\n", "bad.py:1: is_correct needs REWARD_FUNCTIONS beside it"),
        ("TOGETHER = 2.0\n", "bad.py:1: TOGETHER is no whole number of at least 1"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_one_line(own_tasks, text, message):
    own_tasks("bad", text)
    with pytest.raises(UserError, match=message):
        load_task(args_of("bad"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return []", r"bad.py: problems\('train', 3\) is not a list of Problems, or empty"),
        ("return ['a']", r"problems\('train', 3\) is not a list of Problems"),
        (
            "return [Problem('1?', '1', '')] * 3\nTOGETHER = 2",
            r"problems\('train', 3\) are 3, no multiple of TOGETHER = 2",
        ),
        ("return [split[9]]", r"bad.py:2: IndexError: string index out of range; mend this line"),
    ],
)
def test_what_a_task_s_problems_may_not_be(own_tasks, body, message):
    imports = "from rldatasets import Problem\n" if "Problem(" in body else ""
    own_tasks("bad", f"def problems(split, seed):\n    {body}\n{imports}")
    with pytest.raises(UserError, match=message):
        load_task(args_of("bad")).problems("train")


def test_names_are_checked_before_torch_with_the_closest_one_as_a_hint(refused):
    assert "'countdwn' is unknown; did you mean countdown?" in refused("--dataset_name", "countdwn")
    message = refused("--dataset_name", "countdown", "--dataset_path", "x.jsonl")
    assert "--dataset_path: countdown makes its own problems; leave it out" in message
    message = refused("--dataset_name", "countdown/hard")
    assert "--dataset_name countdown/hard: countdown has no variants" in message


def test_presets_know_the_tasks_and_run_directories_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse_args(["--preset", "cpu", "--dataset_name", "countdown"])
    assert (args.max_completion_length, args.temperature) == (96, 1.0)
    assert args.output_dir.startswith("runs/countdown-smollm2-135m-2")
    args.dataset_name, args.evaluator = "reasoning_gym/chain_sum", "some/where/rewards.py"
    assert parser.run_directory(args, "m").startswith("runs/reasoning_gym-chain_sum-rewards-m-2")
    defaults = parser.build_parser("cpu", "reasoning_gym/chain_sum")
    assert defaults.get_default("max_completion_length") == 160
    names = {name.partition("/")[0] for _, name in parser.PRESETS_ON}
    assert names - {parser.A_GAME} <= set(tasks.dataset_names())


# --- rewards of one's own ------------------------------------------------------------------------

OWN = '''
    """Words with a given first letter."""

    from evaluator import extract_answer, soft_format


    def first_letter(completion, problem):
        """1 where the completion starts with the letter that the data asks for."""
        return float(completion[:1] == problem.extra["letter"])


    def is_correct(completion, problem):
        return len(completion) > problem.extra["least"]


    REWARD_FUNCTIONS = [first_letter, soft_format]
'''


@pytest.fixture
def own(tmp_path):
    """(rewards.py, data.jsonl): rewards of one's own, on fields of one's own."""
    rows = [
        {"question": f"Word {i}?", "answer": "x", "solution": "y", "letter": "ab"[i % 2],
         "least": i % 5}
        for i in range(30)
    ]  # fmt: skip
    data = write(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return write(tmp_path / "rewards.py", OWN), data


def test_one_s_own_rewards_and_data_train_resume_and_compare(own, saved_models, tmp_path, capfd):
    rewards, data = own
    run = tmp_path / "run"
    argv = [*TINY, "--evaluator", rewards, "--dataset_path", data, "--model_name",
            str(saved_models["llama"]), "--output_dir", str(run)]  # fmt: skip
    main.train(parse_args(argv))
    assert "warning: rewards" not in capfd.readouterr().err  # the lint knows no such task
    extras = {row["question"]: row for row in lines(tmp_path / "data.jsonl")}
    for row in lines(run / "completions" / "step_00000.jsonl"):
        first = float(row["completion"][:1] == extras[row["question"]]["letter"])
        assert row["rewards"] == {"first_letter": first, "soft_format": 0.0}
    for row in lines(run / "completions" / "eval_00001.jsonl"):
        assert row["correct"] is (len(row["completion"]) > extras[row["question"]]["least"])
    config = json.loads((run / "config.json").read_text())["flags"]
    assert (config["evaluator"], config["dataset_path"]) == (rewards, data)
    assert "first_letter" in (run / "report.html").read_text()
    main.train(parse_args(["--resume", "--output_dir", str(run), "--num_train_iters", "2"]))
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [0, 1]
    assert "rewards/first_letter" in lines(run / "metrics.jsonl")[1]
    text = compare(read_evaluation(f"{run}@0"), read_evaluation(str(run)), show=0)
    assert "accuracy" in text


def test_evaluation_alone_and_the_lint_take_the_same_file(own, saved_models, tmp_path, capsys):
    rewards, data = own
    run = tmp_path / "run"
    args = commands.parse_command([
        "evaluate", str(saved_models["qwen2"]), *TINY[:2], "--eval_problems", "3",
        "--max_completion_length", "4", "--evaluator", rewards, "--dataset_path", data,
        "--output_dir", str(run),
    ])  # fmt: skip
    assert commands.carry_out(args) == 0
    assert set(lines(run / "eval.jsonl")[0]) >= {"accuracy", "rewards/first_letter"}
    assert json.loads((run / "config.json").read_text())["flags"]["evaluator"] == rewards
    capsys.readouterr()
    assert commands.main(["lint", "--evaluator", rewards]) == 1
    assert "first_letter raises KeyError: 'letter'" in capsys.readouterr().out
    assert commands.main(["lint", "--evaluator", "nowhere.py"]) == 2
    assert "--evaluator nowhere.py: no such file" in capsys.readouterr().err
    fine = write(tmp_path / "fine.py", "from evaluator import correctness\n\n"
                 "REWARD_FUNCTIONS = [correctness]\n")  # fmt: skip
    assert commands.main(["lint", "--evaluator", fine, "--reward_weights", "correctness=2"]) == 0
    assert commands.main(["lint", "--evaluator", fine, "--reward_weights", "tag_count=2"]) == 2
    assert "there are correctness" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["--evaluator", "rewards.py: no such file; expected a FILE.py"]),
        ("", ["rewards.py: no REWARD_FUNCTIONS; add REWARD_FUNCTIONS = [your_function]"]),
        ("def good(c, p)\n    return 1\n", ["rewards.py:1: SyntaxError: expected ':'", "mend"]),
        ("x = 'a\n", ["rewards.py:1: SyntaxError: unterminated string literal"]),
        ("import math\n\n\nx = math.inf()\n", ["rewards.py:4: TypeError: 'float' object is not"]),
        ("import json\n\njson.loads('{')\n", ["rewards.py:3: JSONDecodeError: Expecting"]),
        ("import no_such\n", ["rewards.py:1: ModuleNotFoundError: No module named 'no_such'"]),
        ("raise SystemExit(3)\n", ["rewards.py:1: SystemExit: 3"]),
        ("raise RuntimeError('" + "long " * 100 + "')", ["rewards.py:1: RuntimeError: long lo"]),
        ("\0", ["rewards.py", "null bytes"]),
        ("\n\nREWARD_FUNCTIONS = 3\n", ["rewards.py:3: REWARD_FUNCTIONS is no list of functions"]),
        ("REWARD_FUNCTIONS = []\n", ["rewards.py:1: REWARD_FUNCTIONS is no list of functions"]),
        ("\nREWARD_FUNCTIONS = [3]\n", ["rewards.py:2: REWARD_FUNCTIONS holds 3, no function"]),
        ("REWARD_FUNCTIONS = [lambda c, p: 1]\n", ["rewards.py:1:", "no function with a name"]),
        ("REWARD_FUNCTIONS = [print, print]\n", ["rewards.py:1:", "holds print twice; rename one"]),
        ("def f(c):\n    return 1\n\n\nREWARD_FUNCTIONS = [f]\n",
         ["rewards.py:5: REWARD_FUNCTIONS holds f, which does not take (completion, problem)"]),
        ("is_correct = 3\nREWARD_FUNCTIONS = [print]\n", ["rewards.py:1: is_correct is no func"]),
        ("SYSTEM_PROMPT = None\nREWARD_FUNCTIONS = [print]\n", ["rewards.py:1: SYSTEM_PROMPT is"]),
    ],
)  # fmt: skip
def test_a_file_of_rewards_that_cannot_be_used(text, parts, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "rewards.py").write_text(text)
    message = refused("--evaluator", "rewards.py")
    assert all(part in message for part in parts), message


def test_other_mistakes_with_that_flag(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.txt").write_text("REWARD_FUNCTIONS = [print]\n")
    for value in ("mine", "rewards.txt", ".", "", "a" * 10_000):
        assert "no such file; expected a FILE.py" in refused("--evaluator", value)
    assert "holds characters that are not text" in refused("--evaluator", "a\nb.py")
    (tmp_path / "café.py").write_bytes(b"x = '\xe9'\n")
    assert "caf" in refused("--evaluator", "café.py")


def test_a_verdict_that_fails_names_the_function(own, saved_models, tmp_path):
    _, data = own
    rewards = write(tmp_path / "failing.py", """
        def is_correct(completion, problem):
            return problem.extra["no such field"]


        REWARD_FUNCTIONS = [is_correct]
    """)  # fmt: skip
    args = parse_args([*TINY, "--evaluator", rewards, "--dataset_path", data, "--cold_start_steps",
                       "0", "--model_name", str(saved_models["qwen2"]), "--output_dir",
                       str(tmp_path / "run")])  # fmt: skip
    with pytest.raises(UserError, match=r"is_correct raised KeyError: 'no such field' \(line 3\)"):
        main.train(args)


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("problem.extra['steps']", r"own\.py:2: KeyError: 'steps'; mend this line"),
        ("None", r"own\.py: worked_answer returned None, not text, for 'Word 0\?'"),
    ],
)
def test_a_worked_answer_that_fails_names_the_line(body, complaint, own, tmp_path):
    _, data = own
    text = f"def worked_answer(problem):\n    return {body}\n\n\n" + textwrap.dedent(OWN)
    args = args_of("gsm8k", dataset_path=data, evaluator=write(tmp_path / "own.py", text))
    problem = Problem("Word 0?", "x", "y")
    with pytest.raises(UserError, match=complaint):
        load_task(args).worked_answer(problem)


def test_a_task_s_rewards_serve_other_data(own):
    _, data = own
    args = args_of("gsm8k", dataset_path=data, evaluator=str(ROOT / "tasks" / "countdown.py"))
    task = load_task(args)
    assert [f.__name__ for f in task.reward_functions][:2] == ["correctness", "each_number_once"]
    assert len(task.problems("train")) + len(task.problems("test")) == 30


def test_further_fields_are_part_of_a_problem_and_of_the_data_s_fingerprint(tmp_path):
    rows = [{"problem": "2?", "answer": 2, "level": 3, "tags": ["a"]},
            {"problem": "q", "answer": 1}]  # fmt: skip
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    ours, plain = Problem("2?", "2", "", {"level": 3, "tags": ["a"]}), Problem("q", "1", "")
    assert [*load_problems("gsm8k", tmp_path, "train", 0)] == [ours, plain]
    assert len({ours, plain, Problem("2?", "2", "")}) == 3
    assert fingerprint([ours]) != fingerprint([Problem("2?", "2", "")])
    # Without further fields it is what it was before there were any: old runs can be resumed.
    text = b"[Problem(question='q', answer='1', solution='')]"
    assert fingerprint([plain]) == hashlib.sha256(text).hexdigest()


# --- the lint at the start of a run --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem", "warns"),
    [
        ({}, Problem("?", "1,080", ""), True),
        ({}, Problem("?", "blue", ""), False),
        ({}, Problem("?", "1", "", {"level": 3}), False),
        ({"system_prompt": "Think."}, Problem("?", "1", ""), False),
        ({"is_correct": lambda completion, problem: True}, Problem("?", "1", ""), False),
    ],
)
def test_the_rewards_are_linted_where_the_golden_set_is_of_their_kind(
    change, problem, warns, capsys
):
    def flat(completion, problem):
        return 1.0

    task = replace(TASK, reward_functions=[flat], **change)
    reward_lint.warn(task, [Problem("?", "1", ""), problem], {})
    assert ("right and wrong answers earn the same" in capsys.readouterr().err) is warns


# --- other people's verifiers --------------------------------------------------------------------

TOY_JUDGE = """
    import os
    import time

    EXAMPLE = ("fine", 0)

    def judge(kind, value):
        print("noise")
        if kind == "hangs":
            9 ** 9 ** 9  # in C code, where no signal's handler runs
        if kind == "hoards":
            return len(bytes(2**33))
        if kind == "raises":
            raise RecursionError
        if kind == "dies":
            os.abort()
        if kind == "sleeps":
            time.sleep(value)
        return value
"""


@pytest.fixture
def toy_judge(tmp_path, monkeypatch):
    write(tmp_path / "toy_judge.py", TOY_JUDGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    toy = Judge("toy_judge", seconds=0.2)
    yield toy
    toy.stop()


@pytest.mark.parametrize("kind", ["hangs", "hoards", "raises", "dies"])
def test_a_verifier_that_misbehaves_gives_no_verdict_and_the_next_is_right(toy_judge, kind):
    assert toy_judge("fine", [1, "²\n"]) == [1, "²\n"]
    started = time.monotonic()
    assert toy_judge(kind, 0) is None
    assert time.monotonic() - started < 20
    assert toy_judge("fine", 2) == 2


def test_a_time_limit_around_a_verdict_holds_and_no_late_verdict_is_taken(toy_judge):
    assert toy_judge("fine", 1) == 1
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimedOut), time_limit(0.1):
        toy_judge("sleeps", 0.3)
    assert toy_judge("fine", 2) == 2
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_judge_that_cannot_start_is_an_error(capfd):
    with pytest.raises(RuntimeError, match="judge of no_such_module does not start"):
        Judge("no_such_module")("request")
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_what_is_judged_is_never_carried_out(monkeypatch):
    module = type(sys)("careless.verifier")
    monkeypatch.setitem(sys.modules, "careless.verifier", module)
    with without_eval("careless"):
        read = vars(module)["eval"]
        assert read("[1, 'a']") == [1, "a"]
        with pytest.raises(ValueError, match="malformed"):
            read("print(1)")
    assert not hasattr(module, "eval")


# --- reasoning-gym -------------------------------------------------------------------------------

GYM = """
    from dataclasses import dataclass

    class Sums:
        def __init__(self, seed, size):
            self.seed = seed

        def __getitem__(self, index):
            n = (self.seed + index) % 97
            return {"question": f"{n} + 1", "answer": str(n + 1), "metadata": {"n": n}}

        def score_answer(self, answer, entry):
            if answer == entry["answer"]:
                return 1.0
            if answer == "nan":
                return float("nan")
            try:
                return 0.5 if eval(answer) == entry["metadata"]["n"] + 1 else 0.01
            except Exception:
                return 0.0

    class Careless(Sums):
        def score_answer(self, answer, entry):
            return float(eval(answer + " == 0"))

    class Empty(Sums):
        def __getitem__(self, index):
            raise AssertionError("must specify")

    DATASETS = {"chain_sum": Sums, "careless": Careless, "empty": Empty, "composite": Sums}

    def create_dataset(name, seed, size):
        return DATASETS[name](seed, size)
"""


@pytest.fixture
def gym(tmp_path, monkeypatch):
    """tasks.reasoning_gym on a stand-in for the library."""

    def forget():
        for name in list(sys.modules):
            if name.partition(".")[0] == "reasoning_gym" or name == "tasks.reasoning_gym":
                monkeypatch.delitem(sys.modules, name)

    (tmp_path / "reasoning_gym").mkdir()
    write(tmp_path / "reasoning_gym" / "__init__.py", "")
    write(tmp_path / "reasoning_gym" / "factory.py", GYM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    forget()
    load_task(args_of("reasoning_gym/chain_sum"))
    task_module = sys.modules["tasks.reasoning_gym"]
    yield task_module
    task_module.JUDGE.stop()
    for name in list(sys.modules):
        if name.partition(".")[0] == "reasoning_gym" or name == "tasks.reasoning_gym":
            del sys.modules[name]


def test_the_library_s_own_score_is_the_reward_and_1_is_solved(gym):
    problem = gym.problems("test", 0, "chain_sum")[0]
    for answer, score in (
        (problem.answer, 1.0), ("nan", 0.0), ("5", 0.01), (f"{problem.answer}.0", 0.5),
        ("__import__('os').abort()", 0.0), ("9**9**9", 0.0),
    ):  # fmt: skip
        assert gym.score(written(answer), problem) == score, answer
        assert gym.is_correct(written(answer), problem) is (score == 1)
    assert gym.score(problem.answer, problem) == 0.0  # without its tags
    assert gym.score(rldatasets.worked_answer(problem), problem) == 1.0


def test_train_shares_no_question_with_test_which_no_seed_changes(gym, monkeypatch):
    monkeypatch.setattr(gym, "SIZES", {"train": 200, "test": 30})
    test, other = (gym.problems("test", seed, "chain_sum") for seed in (1, 2))
    assert test == other and len({p.question for p in test}) == len(test) == 30
    train = gym.problems("train", 1, "chain_sum")
    assert len(train) == 97 - 30 and not {p.question for p in train} & {p.question for p in test}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("careless", "its verifier refuses its own answer, or needs eval; choose another"),
        ("empty", r"makes no problems with its defaults \(must specify\); choose another"),
    ],
)
def test_a_generator_that_cannot_be_judged_or_made_is_refused(gym, name, message):
    with pytest.raises(UserError, match=f"--dataset_name reasoning_gym/{name}: {message}"):
        gym.problems("test", 0, name)


def test_without_the_packages_a_line_says_what_to_install(refused, monkeypatch, tmp_path):
    found = util.find_spec
    optional = ("reasoning_gym", "math_verify")
    monkeypatch.setattr(
        util, "find_spec", lambda name, *rest: None if name in optional else found(name, *rest)
    )
    for name, package in (("reasoning_gym/x", "reasoning-gym==0.1.25"), ("math", "math-verify==0")):
        monkeypatch.delitem(sys.modules, f"tasks.{name.partition('/')[0]}", raising=False)
        message = refused("--dataset_name", name, "--dataset_path", "x")
        assert f"--dataset_name {name.partition('/')[0]}: run pip install {package}" in message


@needs_gym
def test_chain_sum_trains_end_to_end(saved_models, tmp_path, refused):
    message = refused("--dataset_name", "reasoning_gym/chain_summ")
    assert "no such variant; did you mean chain_sum?" in message
    run = tmp_path / "run"
    main.train(parse_args([
        *TINY, "--dataset_name", "reasoning_gym/chain_sum", "--output_dir", str(run),
        "--model_name", str(saved_models["qwen2"]),
    ]))  # fmt: skip
    row = lines(run / "eval.jsonl")[-1]
    assert row["accuracy"] == 0 and set(row) >= {"rewards/score", "rewards/tag_count"}
    task = load_task(args_of("reasoning_gym/chain_sum"))
    problem = task.problems("train")[0]
    assert "arithmetic problem" in problem.question
    assert task.is_correct(written(f"{int(problem.answer):,}.0"), problem)
    assert not task.is_correct(written(str(int(problem.answer) + 1)), problem)


# --- LaTeX ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latex():
    if not util.find_spec("math_verify"):
        pytest.skip("pip install math-verify==0.9.0 for these tests")
    from tasks import math as task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "JUDGE", Judge("tasks.math", seconds=1))
        yield task
        task.JUDGE.stop()


def test_math_is_read_from_a_file(latex, tmp_path):
    row = {"answer": r"\frac{1}{2}", "solution": "It is.", "level": 1}
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({**row, "problem": f"{i}?"}) + "\n" for i in range(20)))
    task = load_task(args_of("math", dataset_path=str(path)))
    problem = task.problems("test")[0]
    assert (problem.answer, problem.extra) == (r"\frac{1}{2}", {"level": 1})
    assert task.is_correct(written("0.5"), problem)
    assert next(f(written("0.5"), problem) for f in task.reward_functions) == 2.0


def test_numbers_on_the_way_are_read_and_nothing_is_carried_out(latex):
    assert latex.number_or_name("Integer (12 )") == 12
    assert latex.number_or_name("Float ('0.5' )", {}, {}) == 0.5
    assert str(latex.number_or_name("Symbol ('x' )")) == "x"
    for code in ("print (1 )", "Integer (1 )+Integer (2 )", "Symbol ('x' ).y ()", "Integer (a ()"):
        with pytest.raises(AttributeError):
            latex.number_or_name(code)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{3}{4}", "0.75", True), (r"\frac{3}{4}", r"\boxed{\frac{6}{8}}", True),
        (r"\frac{3}{4}", "3/4", True), (r"\frac{3}{4}", r"$\dfrac34$", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True), (r"(3, \frac{\pi}{2})", r"\left(3, \pi/2\right)", True),
        ("1,080", "1080", True), ("12", r"12^\circ", True), (r"\text{Evelyn}", "Evelyn", True),
        (r"\frac{3}{4}", "0.74", False), ("12", "13", False), (r"2\sqrt{3}", "3.46", False),
        ("12", "12 or 13", False), ("12", r"\boxed{12}\boxed{13}", False), ("5", "", False),
        ("5", "9" * 10_000, False), ("5", r"\frac{", False), ("5", "(" * 12 + "5", False),
        ("5", "__import__('os').abort()", False), ("5", r"\boxed{print(5)}", False),
        (r"\frac{5}{2}", "2.5", True), ("5", r"9^{9^{9^{9^9}}}", False),
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_in_latex_is_right_where_it_equals_the_gold_one(latex, gold, answer, right):
    problem = Problem("?", gold, "")
    assert latex.is_correct(written(answer), problem) is right
    assert latex.correctness(written(answer), problem) == 2.0 * right
