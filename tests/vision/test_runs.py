"""Whole runs of a tiny model that sees: on files with images, resumed, and chatted with."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sighted import image
from test_sight import save
from transformers import Qwen2_5_VLForConditionalGeneration

QUESTIONS, HELD_OUT = 3, 4
REWARDS = """
def letters(completion, problem):
    return sum(map(ord, completion)) % 7 / 7

REWARD_FUNCTIONS = [letters]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(a model's directory, a directory with train.jsonl and test.jsonl)."""
    folder, data = tmp_path_factory.mktemp("qwen"), tmp_path_factory.mktemp("data")
    save("qwen2_5_vl", folder)
    (data / "pictures").mkdir()
    for split, count in (("train", 12), ("test", HELD_OUT)):
        rows = []
        for n in range(count):
            file = f"pictures/{split}{n}.png"
            image(24 + 8 * (n % 3), 32, n)().save(data / file)
            rows.append({"question": "How many?", "answer": str(n), "image": file,
                         "solution": "1"})  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text)
    (data / "rewards.py").write_text(REWARDS)
    return folder, data


def flags(place, run, *more):
    return (
        "--preset", "cpu", "--dataset_name", "gsm8k", "--model_name", place[0], "--dataset_path",
        place[1], "--output_dir", run, "--questions_per_step", QUESTIONS, "--group_size", 3,
        "--num_train_iters", 2, "--max_completion_length", 5, "--cold_start_steps", 1,
        "--eval_problems", 0, "--learning_rate", 1e-3, "--kl_beta", 0.1, "--save_steps", 1,
        "--short_eval_iterations", 0,
        "--evaluator", place[1] / "rewards.py", *more,
    )  # fmt: skip


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.slow
def test_a_run_looks_once_at_every_picture_of_a_step(place, tmp_path, command, monkeypatch):
    looks, look = [], Qwen2_5_VLForConditionalGeneration.get_image_features

    def counted(self, *args, **kwargs):
        looks.append(torch.is_grad_enabled())
        return look(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "get_image_features", counted)
    status, out, error = command(*flags(place, tmp_path / "run", "--micro_batch_tokens", 200))
    assert status == 0, error
    # A cold start and two steps, whatever inner passes and the reference; each of two evaluations
    # asks every question twice, with its own picture and another's.
    assert len(looks) == 3 * QUESTIONS + 2 * 2 * HELD_OUT
    assert not any(looks)
    rows = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").open()]
    assert {"blind_accuracy", "above_blind", "above_blind_low"} <= rows[-1].keys()
    assert "above_blind" in out
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert max(row["mismatch"] for row in steps) < 1e-4

    # How the step is cut changes nothing; the tower stays as it was; half a run resumes.
    status, _, error = command(
        *flags(place, tmp_path / "cut", "--micro_batch_tokens", 60, "--sampling_batch_size", 3)
    )
    assert status == 0, error
    cut = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    for one, other in zip(steps, cut, strict=True):
        assert one["grad_norm"] > 0.01
        for name in ("reward", "loss", "grad_norm", "kl"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6)
    whole, start = weights(tmp_path / "run"), load_file(place[0] / "model.safetensors")
    for name, value in whole.items():
        assert torch.equal(value, start[name]) == ("visual" in name), name
    text = ["--resume", tmp_path / "run" / "checkpoints" / "step_00001"]
    status, _, error = command(*flags(place, tmp_path / "run", "--micro_batch_tokens", 200, *text))
    assert status == 0, error
    again = weights(tmp_path / "run")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())

    file = place[1] / "pictures" / "test0.png"
    status, out, error = command(
        "chat", tmp_path / "run" / "model", "How many?", "--image", file, "--preset",
        "cpu", "--answer", "0",
    )  # fmt: skip
    assert status == 0, error
    assert "gold answer" in out


def broken(folder):
    (folder / "half.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    Image.new("1", (9000, 9000)).save(folder / "vast.png")
    return {
        "gone.png": "no such file",
        "half.png": "no image that can be read",
        "vast.png": "larger than 50 million pixels",
        "": "expected a path",
    }


def test_images_that_cannot_be_used_are_named_before_a_model_is_loaded(
    place, tmp_path, command, monkeypatch
):
    monkeypatch.setattr("llms.load_model", None)
    for name, complaint in broken(tmp_path).items():
        rows = [{"question": f"{n}?", "answer": "1"} for n in range(20)]
        rows[3]["image"] = [name]
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        status, _, error = command(
            "--preset", "cpu", "--dataset_name", "gsm8k", "--model_name", place[0],
            "--dataset_path", file, "--output_dir", tmp_path / "run", "--cold_start_steps", 0,
        )  # fmt: skip
        [line] = error.splitlines()
        assert status == 2
        assert f"data.jsonl:4: `image` {name}".strip() in line
        assert complaint in line


@pytest.mark.parametrize(
    ("more", "complaint"),
    [(["--sampler", "paged"], "does not know pictures"), (["--save_rollouts"], "no pictures")],
)
def test_what_knows_no_pictures_is_refused(more, complaint, place, tmp_path, command):
    status, _, error = command(*flags(place, tmp_path / "run", *more))
    assert status == 2
    assert complaint in error
    assert len(error.splitlines()) == 1
