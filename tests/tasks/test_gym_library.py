"""What reasoning-gym itself is like, where it is installed: pip install reasoning-gym==0.1.25"""

import sys
from importlib import util
from types import SimpleNamespace

import pytest

from tasks import load_task
from utils import UserError

needs_gym = pytest.mark.skipif(
    not util.find_spec("reasoning_gym"), reason="pip install reasoning-gym==0.1.25 for this test"
)


@needs_gym
@pytest.mark.parametrize(
    ("variant", "complaint"),
    [
        ("game_of_life_halting", "takes the answer . for right"), ("coin_flip", "the answer 0 for"),
        ("circuit_logic", "takes the answer 0 for right"), ("graph_color", "without an answer"),
        ("boxnet", "without an answer"), ("isomorphic_strings", None), ("arc_agi", None),
    ],
)  # fmt: skip
def test_variants_of_the_library_itself(variant, complaint, monkeypatch):
    flags = SimpleNamespace(
        dataset_name=f"reasoning_gym/{variant}", dataset_path=None, difficulty=1, evaluator=None,
        seed=3, allow_weak_verifier=False,
    )  # fmt: skip
    task = load_task(flags)
    monkeypatch.setattr(sys.modules["tasks.reasoning_gym"], "SIZES", {"train": 30, "test": 30})
    if complaint:
        with pytest.raises(UserError, match=complaint):
            task.problems("test")
    else:
        assert all(task.is_correct(task.worked_answer(p), p) for p in task.problems("test"))
