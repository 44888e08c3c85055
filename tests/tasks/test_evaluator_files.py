"""--evaluator FILE.py may be a script with others beside it; these do not get in our way."""

import subprocess
import sys

import pytest
from conftest import ROOT

import utils
from tasks import check_weights, own_evaluator
from utils import UserError


def written(folder, name, *lines):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def rewards_with(folder, *imports, value="points(completion)"):
    return written(
        folder, "rewards.py", *imports, "def right(completion, problem):", f"    return {value}",
        "REWARD_FUNCTIONS = [right]",
    )  # fmt: skip


def paid(path, completion="72"):
    [right] = own_evaluator(path)["REWARD_FUNCTIONS"]
    return right(completion, None)


@pytest.mark.parametrize(
    ("name", "statement", "value"),
    [
        ("my_points.py", "from my_points import points", "points(completion)"),
        ("my_points.py", "import my_points as mine", "mine.points(completion)"),
        ("package/__init__.py", "from package import points", "points(completion)"),
        ("package/inner.py", "from package.inner import points", "points(completion)"),
        ("grading.py", "import grading, evaluator", "grading.points(completion)"),
    ],
)
def test_a_file_imports_what_lies_beside_it(tmp_path, name, statement, value):
    written(tmp_path, name, "def points(text): return float('72' in text)")
    before = [*sys.path], {*sys.modules}
    assert paid(rewards_with(tmp_path, statement, value=value)) == 1.0
    assert before[0] == sys.path
    assert {*sys.modules} - before[1] == {f"evaluator {tmp_path / 'rewards.py'}"}


def test_another_file_s_neighbours_of_the_same_name_are_its_own(tmp_path):
    for amount in (1, 2):
        folder = tmp_path / str(amount)
        folder.mkdir()
        written(folder, "my_points.py", f"def points(text): return {amount}.0")
        assert paid(rewards_with(folder, "from my_points import points")) == amount


@pytest.mark.parametrize("name", ["utils", "evaluator", "sampling", "tasks", "grpo", "json"])
def test_neighbours_do_not_take_the_place_of_our_modules_or_python_s(tmp_path, name):
    written(tmp_path, f"{name}.py", "raise SystemExit('the wrong one')")
    assert paid(rewards_with(tmp_path, f"import {name}", value="1.0")) == 1.0
    assert utils.__file__ == str(ROOT / "utils.py")


def test_a_neighbour_that_fails_is_one_line_and_leaves_nothing_behind(tmp_path):
    written(tmp_path, "my_points.py", "import no_such_module")
    before = [*sys.path], {*sys.modules}
    with pytest.raises(UserError, match=r"rewards.py:1: ModuleNotFoundError: No module named 'no_"):
        own_evaluator(rewards_with(tmp_path, "from my_points import points"))
    assert before == (sys.path, {*sys.modules})


def test_the_lint_reads_it_from_any_directory(tmp_path):
    written(tmp_path, "my_points.py", "def points(text): return float('72' in text)")
    path = rewards_with(tmp_path, "from my_points import points")
    run = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "lint", "--evaluator", path], cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "ModuleNotFoundError" not in run.stdout + run.stderr and "right" in run.stdout


# --- a name that is taken ----------------------------------------------------------------------


def overlong(completion, problem):
    return 0.0


def test_a_reward_of_one_s_own_may_not_be_called_overlong_beside_the_flag_s():
    check_weights({}, [overlong], 0)
    check_weights({}, [test_a_file_imports_what_lies_beside_it], 10)
    with pytest.raises(UserError, match="--overlong_buffer 10: its reward is called overlong, and"):
        check_weights({}, [overlong], 10)


def test_a_run_says_so_before_a_model_loads(tmp_path, command):
    path = written(
        tmp_path, "rewards.py", "def overlong(completion, problem):", "    return 0.0",
        "REWARD_FUNCTIONS = [overlong]",
    )  # fmt: skip
    status, _, err = command(
        "--preset", "cpu", "--evaluator", path, "--overlong_buffer", 8, "--output_dir",
        tmp_path / "run",
    )  # fmt: skip
    assert status == 2 and "--overlong_buffer 8: its reward is called overlong" in err
    assert not (tmp_path / "run").exists()
