"""Problems of reasoning-gym are a function of (variant, seed), and a weak verifier is refused.

A stand-in for the library shows what was met in it, one variant each.
"""

import ast
import subprocess
import sys
import textwrap
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from rldatasets import fingerprint, normal
from tasks import load_task
from utils import UserError, time_limit

GYM = """
    import random
    import sys
    import time
    from fractions import Fraction

    def judging():
        return sys.argv[0].endswith("verifier_process.py")

    class Sums:
        def __init__(self, seed, size):
            self.seed = seed

        def __getitem__(self, index):
            n = (self.seed + index) % 997
            return {"question": f"{n} + 1", "answer": str(n + 1), "metadata": {"n": n}}

        def score_answer(self, answer, entry):
            return float(answer == entry["answer"])

    class Order(Sums):  # as isomorphic_strings, ransom_note, word_ladder
        def __getitem__(self, index):
            word = "".join({f"{letter} {self.seed} {index} " for letter in "abcdefgh"})
            return {"question": word, "answer": word[:1], "metadata": {}}

    class Global(Sums):  # as list_functions
        def __getitem__(self, index):
            n = random.randrange(10**9)
            return {"question": f"{n}?", "answer": str(n), "metadata": {}}

    class Nothing(Sums):  # as boxnet, graph_color
        def __getitem__(self, index):
            return {**super().__getitem__(index), "answer": None}

    class Anything(Sums):  # as game_of_life_halting
        def score_answer(self, answer, entry):
            return float(answer != "")

    class Empty(Sums):
        def score_answer(self, answer, entry):
            return float(answer in ("", entry["answer"]))

    class Zero(Sums):  # as circuit_logic, coin_flip
        def score_answer(self, answer, entry):
            zero = answer == "0" and entry["metadata"]["n"] % 4 > 0
            return float(zero or answer == entry["answer"])

    class Others(Sums):  # as puzzle24
        def score_answer(self, answer, entry):
            return float(answer.isdigit() and answer != "0")

    class Choice(Sums):  # two answers, which is no fault
        def __getitem__(self, index):
            entry = super().__getitem__(index)
            return {**entry, "answer": ("yes", "no")[entry["metadata"]["n"] // 7 % 2]}

    class Above(Sums):  # as spell_backward
        def score_answer(self, answer, entry):
            return 1.0 if answer == entry["answer"] else 1.0000000000000002

    class Slow(Sums):  # as knight_swap, futoshiki, sokoban
        def __getitem__(self, index):
            if judging():
                raise RuntimeError("made again")
            time.sleep(0.05)
            return super().__getitem__(index)

    class Raises(Sums):  # as maze
        def __getitem__(self, index):
            if index % 3 == 1:
                raise RuntimeError("no way out")
            print("noise")
            return super().__getitem__(index)

    class Typed(Sums):  # as arc_agi, gsm_symbolic
        def __getitem__(self, index):
            entry = super().__getitem__(index)
            entry["metadata"] = {"grid": ((0, 1), (2, 3)), 5: {"a", "b"}, "part": Fraction(1, 3)}
            return entry

        def score_answer(self, answer, entry):
            grid = entry["metadata"]["grid"] == ((0, 1), (2, 3))
            return float(answer == entry["answer"] and grid and entry["metadata"][5] == {"a", "b"})

    class Never(Sums):
        def score_answer(self, answer, entry):
            return 0.5

    DATASETS = {"composite": Sums, "chain_sum": Sums} | {
        kind.__name__.lower(): kind for kind in Sums.__subclasses__()
    }

    def create_dataset(name, seed, size):
        return DATASETS[name](seed, size)
"""


def forget():
    for name in [*sys.modules]:
        if name.partition(".")[0] == "reasoning_gym" or name == "tasks.reasoning_gym":
            del sys.modules[name]


def flags(variant, seed=3, **more):
    return SimpleNamespace(
        dataset_name=f"reasoning_gym/{variant}", dataset_path=None, difficulty=1, evaluator=None,
        seed=seed, **{"allow_weak_verifier": False, **more},
    )  # fmt: skip


@pytest.fixture(scope="module")
def gym(tmp_path_factory):
    """tasks.reasoning_gym on the stand-in, with fewer problems."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "reasoning_gym").mkdir()
    (folder / "reasoning_gym" / "__init__.py").write_text("")
    (folder / "reasoning_gym" / "factory.py").write_text(textwrap.dedent(GYM))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        forget()
        load_task(flags("chain_sum"))
        module = sys.modules["tasks.reasoning_gym"]
        patch.setattr(module, "SIZES", {"train": 24, "test": 24})
        yield module
        module.JUDGE.stop()
        forget()


def written(answer):
    return f"<reasoning>\nSo.\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


PRINT = """
import sys
from types import SimpleNamespace
from rldatasets import fingerprint
from tasks import load_task
for variant in sys.argv[1:]:
    task = load_task(SimpleNamespace(dataset_name="reasoning_gym/" + variant, dataset_path=None,
                                     difficulty=1, evaluator=None, seed=3))
    sys.modules["tasks.reasoning_gym"].SIZES.update(train=24, test=24)
    print(variant, fingerprint([*task.problems("train"), *task.problems("test")]))
"""


@pytest.mark.slow
def test_two_processes_with_other_hash_seeds_make_the_same_problems(gym, monkeypatch):
    variants, expected = ["order", "global", "typed", "chain_sum"], []
    for variant in variants:
        task = load_task(flags(variant))
        made = fingerprint([*task.problems("train"), *task.problems("test")])
        expected.append(f"{variant} {made}")
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        run = subprocess.run(
            [sys.executable, "-c", PRINT, *variants], cwd=ROOT, capture_output=True, text=True
        )
        assert run.stdout.splitlines() == expected, run.stderr


@pytest.mark.parametrize("seed", range(5))
def test_train_and_test_never_share_a_question(gym, monkeypatch, seed):
    monkeypatch.setattr(gym, "SIZES", {"train": 400, "test": 300})
    task = load_task(flags("chain_sum", seed))
    train, test = (
        {normal(p.question) for p in task.problems(split)} for split in ("train", "test")
    )
    assert len(test) == 300 and len(train) >= 100 and not train & test


def test_problems_without_an_answer_are_refused_by_name(gym):
    with pytest.raises(UserError, match="reasoning_gym/nothing: its problems come without an ans"):
        load_task(flags("nothing")).problems("test")


def test_a_verifier_that_refuses_the_answers_that_it_comes_with_is_refused(gym):
    with pytest.raises(UserError, match="reasoning_gym/never: its verifier refuses its own answer"):
        load_task(flags("never")).problems("train")


def test_what_cannot_be_made_is_left_out_and_what_is_printed_does_no_harm(gym):
    assert len(load_task(flags("raises")).problems("test")) == 16


def test_the_judge_is_handed_the_entry_and_makes_nothing_again(gym):
    task = load_task(flags("slow"))
    problem = task.problems("test")[0]
    with time_limit(1.0):
        assert task.reward_functions[0](written(problem.answer), problem) == 1.0
    assert ast.literal_eval(problem.extra["entry"])["question"] == problem.question
    assert gym.judge_request(written("5"), problem)[-1] == "5"
    assert gym.judge_request("no tags", problem) is None


def test_an_entry_reaches_the_judge_as_it_was_made(gym):
    task = load_task(flags("typed"))
    assert all(task.is_correct(written(p.answer), p) for p in task.problems("test"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2, [3])), (1, (2, [3]))), ({1: {2: (3,)}}, {1: {2: (3,)}}), ({1, 2}, {1, 2}),
        (frozenset("a"), {"a"}), (Fraction(1, 3), "1/3"), (np.int64(3), 3), (np.float32(0.5), 0.5),
        (np.bool_(True), True), (np.str_("a"), "a"), ([None, True, "é\n'"], [None, True, "é\n'"]),
    ],
    ids=repr,
)  # fmt: skip
def test_an_entry_is_a_literal(gym, value, expected):
    again = ast.literal_eval(repr(gym.plain(value)))
    assert again == expected and type(again) is type(expected)


def test_a_sum_that_rounding_takes_above_1_is_cut_and_not_solved(gym):
    task = load_task(flags("above"))
    problem = task.problems("train")[0]
    assert gym.score(written("wrong"), problem) == gym.score(written(problem.answer), problem) == 1
    assert task.is_correct(written(problem.answer), problem)
    assert not task.is_correct(written("wrong"), problem)


# --- weak verifiers ------------------------------------------------------------------------------

WEAK = {
    "anything": "the answer ? for right in 24 of 24", "empty": "an empty answer for right in 24 of",
    "zero": "the answer 0 for right in 18 of 24", "others": "another problem's answer for right in",
}  # fmt: skip


@pytest.mark.parametrize("variant", WEAK)
def test_a_verifier_that_pays_for_nothing_is_refused_unless_it_is_wanted(gym, variant):
    with pytest.raises(UserError) as error:
        load_task(flags(variant)).problems("test")
    message = str(error.value)
    assert message.startswith(f"--dataset_name reasoning_gym/{variant}: its verifier takes ")
    assert WEAK[variant] in message and message.endswith("or add --allow_weak_verifier")
    assert len(message) <= 200
    assert len(load_task(flags(variant, allow_weak_verifier=True)).problems("test")) == 24


@pytest.mark.parametrize("variant", ["chain_sum", "choice", "typed", "order", "global"])
def test_other_verifiers_are_not(gym, variant):
    assert len(load_task(flags(variant)).problems("test")) > 0


def test_rewards_of_one_s_own_that_pay_for_the_answer_alone_mend_a_weak_one(gym, tmp_path):
    path = tmp_path / "strict.py"
    path.write_text(
        textwrap.dedent("""
        from evaluator import extract_answer

        def is_correct(completion, problem):
            return extract_answer(completion) == problem.answer

        REWARD_FUNCTIONS = [is_correct]
    """)
    )
    args = flags("anything")
    args.evaluator = str(path)
    assert len(load_task(args).problems("test")) == 24
