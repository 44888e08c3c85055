"""--track: what a run writes, its trackers get; what becomes of them, the run survives."""

import json
import sys
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import parser
from records import trackers
from records.files import read_rows
from records.resuming import check_same_flags
from records.run import Run
from records.trackers import finish_trackers, log_plots, start_trackers
from utils import UserError, write_jsonl

API_KEY = "canary" * 7  # nobody's
RECORD = {"question": "What is 3 + 4?", "answer": "7", "parsed": "7", "correct": True,
          "completion": "<answer>\n7\n</answer>"}  # fmt: skip


def events_of(run):
    """TensorBoard's own reading of a run: {tag: {step: value}} of its numbers, and the reader."""
    reader = EventAccumulator(str(run / "grpo"), {"scalars": 0, "tensors": 0, "images": 0}).Reload()
    scalars = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        scalars[tag] = {event.step: event.value for event in events}
        assert len(scalars[tag]) == len(events), f"{tag}: a step twice"
    return scalars, reader


def numbers_of(run):
    """The same from metrics.jsonl and eval.jsonl."""
    numbers = {}
    for file, prefix in (("metrics.jsonl", ""), ("eval.jsonl", "eval/")):
        for row in read_rows(run / file):
            for name, value in row.items():
                shared = name in ("completion_length", "truncated") or name.startswith("rewards/")
                if name != "step" and isinstance(value, int | float):
                    numbers.setdefault(prefix + name if shared else name, {})[row["step"]] = value
    return numbers


def text_of(reader, tag):
    [event] = reader.Tensors(f"{tag}/text_summary")
    return event.step, event.tensor_proto.string_val[0].decode()


def draw(path):
    """Stands for the plots, which take longer than the run."""
    (path / "plots").mkdir(exist_ok=True)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path / "plots" / "kl.png")
    return path / "plots"


def test_tensorboard_has_the_numbers_of_a_run_s_files_after_resuming_too(
    command, saved_models, tmp_path, monkeypatch
):
    monkeypatch.setattr("records.run.plot_run", draw)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    write_jsonl(data, [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(30)])
    status, *outputs = command(
        "--preset", "cpu", "--questions_per_step", "2", "--group_size", "2", "--num_train_iters",
        "2", "--eval_problems", "2", "--max_completion_length", "4", "--max_prompt_length", "400",
        "--cold_start_steps", "0", "--save_steps", "1", "--output_dir", run, "--model_name",
        saved_models["qwen2"], "--dataset_path", data, "--track", "tensorboard",
    )  # fmt: skip
    assert status == 0, outputs
    assert events_of(run)[0]["reward"].keys() == {0, 1}
    # Step 1 and the evaluation after it are made again, one more step follows.
    status, *more = command(
        "--resume", run / "checkpoints" / "step_00001", "--num_train_iters", "3",
        "--eval_iterations", "1",
    )  # fmt: skip
    assert status == 0, more

    scalars, reader = events_of(run)
    expected = numbers_of(run)
    assert expected["reward"].keys() == {0, 1, 2} and expected["accuracy"].keys() == {0, 1, 2, 3}
    assert scalars.pop("short_accuracy").keys() == expected["accuracy"].keys()
    assert scalars.keys() == expected.keys()
    for name, values in expected.items():
        assert scalars[name] == pytest.approx(values, rel=1e-6), name
    rows, evaluations = (read_rows(run / f"{name}.jsonl") for name in ("metrics", "eval"))
    of_both = {f"eval/{name}" for name in {*rows[0]} & {*evaluations[0]} - {"step", "alarms"}}
    assert of_both == {name for name in scalars if name.startswith("eval/")}
    images = reader.Images("plots/kl")
    assert [image.step for image in images] == [2, 3, 3]  # when it saved, and at its end

    flags_of_run = json.loads((run / "config.json").read_text())["flags"]
    files = [file for file in run.rglob("*") if file.is_file()]
    for file in run.glob("grpo/*/hparams.yml"):
        saved = yaml.safe_load(file.read_text())
        assert saved["group_size"] == flags_of_run["group_size"]
        assert saved["reward_weights"] == "{}" and saved["track"] == "['tensorboard']"
    assert len(list(run.glob("grpo/*/hparams.yml"))) == 2
    assert not any(API_KEY in output for output in (*outputs, *more))
    assert not any(API_KEY.encode() in file.read_bytes() for file in files)


# --- trackers of our own making ----------------------------------------------------------------


class FakeRun:
    """What accelerate calls of a run of wandb or trackio, written down."""

    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False
        self.fails = False

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("no network\nat all")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def fakes(monkeypatch):
    """{name: a stand-in for its module} for wandb and trackio, installed."""
    modules = {}
    for name in ("wandb", "trackio"):
        module = SimpleNamespace(config=SimpleNamespace(update=lambda values, **more: None))
        module.config.update = lambda values, module=module, **more: vars(module).update(
            hyperparameters=values
        )
        module.init = lambda module=module, **settings: (
            vars(module).update(run=FakeRun(**settings)) or module.run
        )
        module.Image = lambda image: ("image", image)
        module.Table = lambda columns, data, dataframe: ("table", columns, data)
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
    available = [LoggerType.TENSORBOARD, LoggerType.WANDB, LoggerType.TRACKIO]
    monkeypatch.setattr("accelerate.tracking._available_trackers", available)
    return modules


@pytest.fixture
def tracked(tmp_path, fakes):
    """Starts a Run with these trackers; (run, args)."""

    def start(*names, first=0, **more):
        args = SimpleNamespace(output_dir=str(tmp_path / "demo"), track=list(names), **more)
        accelerator = Accelerator(cpu=True, log_with=args.track, project_dir=args.output_dir)
        run = Run(args.output_dir, start_trackers(accelerator, args, first))
        run.cut_back(first)
        return run

    return start


ALARMS = ["kl: 2.00 nats per token", "entropy: low"]


def log_everything(run, monkeypatch):
    monkeypatch.setattr("records.run.new_alarms", lambda *_: ALARMS)
    run.log_evaluation(0, {"accuracy": 0.5, "rewards/length": 1.0, "truncated": 0.0}, [RECORD] * 20)
    run.log_step({"step": 0, "reward": 0.25, "kl": float("nan"), "truncated": 0.5})
    log_plots(run.trackers, 1, draw(run.path))
    finish_trackers(run.trackers)


def test_wandb_and_trackio_get_the_names_and_steps_of_the_files(tracked, fakes, monkeypatch):
    run = tracked("wandb", "trackio", reward_weights={"a": 2.0}, clip_epsilon_high=None, seed=3)
    log_everything(run, monkeypatch)
    for name, module in fakes.items():
        logged = module.run.logged
        assert module.run.settings["project"] == "grpo"
        assert module.run.settings["name"] == module.run.settings["group"] == "demo"
        assert module.run.finished
        assert logged[0] == (0, {"accuracy": 0.5, "eval/rewards/length": 1.0, "eval/truncated": 0.0,
                                 "eval/alarms": "\n".join(ALARMS)})  # fmt: skip
        assert logged[2] == (0, {"reward": 0.25, "truncated": 0.5, "alarms": "\n".join(ALARMS)})
        assert module.hyperparameters == {
            "output_dir": str(run.path), "track": "['wandb', 'trackio']", "seed": 3,
            "reward_weights": "{'a': 2.0}", "clip_epsilon_high": "None",
        }, name  # fmt: skip
    step, answers = fakes["wandb"].run.logged[1]
    kind, columns, data = answers["answers"]
    assert (step, kind, len(data)) == (0, "table", trackers.ANSWERS)
    assert dict(zip(columns, data[0])) == RECORD
    step, images = fakes["wandb"].run.logged[3]
    [(kind, image)] = images["plots/kl"]
    assert (step, kind) == (1, "image")
    assert image.dtype == np.uint8 and image.flatten().tolist() == list(range(48))
    step, answers = fakes["trackio"].run.logged[1]
    assert "completion: <answer>\n    7\n    </answer>" in answers["answers"]
    assert len(fakes["trackio"].run.logged) == 3  # it has no images


def test_tensorboard_gets_alarms_answers_and_pngs(tracked, monkeypatch):
    run = tracked("tensorboard")
    log_everything(run, monkeypatch)
    scalars, reader = events_of(run.path)
    assert scalars == {"accuracy": {0: 0.5}, "eval/rewards/length": {0: 1.0}, "reward": {0: 0.25},
                       "eval/truncated": {0: 0.0}, "truncated": {0: 0.5}}  # fmt: skip
    assert text_of(reader, "alarms") == text_of(reader, "eval/alarms") == (0, "\n".join(ALARMS))
    step, text = text_of(reader, "answers")
    assert step == 0 and text.count("question: What is 3 + 4?") == trackers.ANSWERS
    [image] = reader.Images("plots/kl")
    assert (image.step, image.width, image.height) == (1, 4, 4)


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(
    failing, tracked, fakes, monkeypatch, capsys
):
    run = tracked("wandb", "tensorboard", "trackio")
    if failing == "log":
        fakes["wandb"].run.fails = True
    else:
        monkeypatch.setattr(fakes["wandb"].run, "finish", lambda: 1 / 0)
    log_everything(run, monkeypatch)
    reason = r"no network\nat all" if failing == "log" else "division by zero"
    message = f"main.py: warning: --track wandb is left out from here on: {reason}"
    assert capsys.readouterr().err.split("\n") == [message, ""]
    assert len(read_rows(run.path / "metrics.jsonl")) == 1
    assert len(fakes["trackio"].run.logged) == 3 and fakes["trackio"].run.finished
    assert events_of(run.path)[0]["reward"] == {0: 0.25}


def test_a_tracker_that_cannot_be_started_is_refused(tracked, fakes, tmp_path):
    def refuse(**settings):
        raise RuntimeError("api_key not configured\n(no-tty)")

    fakes["wandb"].init = refuse
    with pytest.raises(UserError, match=r"^--track wandb: cannot be started: RuntimeError: api_key "
                                        r"not configured \(no-tty\)$"):  # fmt: skip
        tracked("wandb")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_goes_on_at_its_step_with_the_evaluation_that_it_starts_from(
    tracked, fakes, monkeypatch
):
    monkeypatch.setattr("records.run.new_alarms", lambda *_: [])
    run = tracked("wandb")
    for step in range(3):
        run.log_evaluation(step, {"accuracy": step / 4}, [])
        run.log_step({"step": step, "reward": 0.0})
    before = fakes["wandb"].run
    run = tracked("wandb", first=2)
    run.log_step({"step": 2, "reward": 1.0})
    assert fakes["wandb"].run is not before
    assert fakes["wandb"].run.settings["name"] == before.settings["name"]
    assert fakes["wandb"].run.logged == [
        (2, {"accuracy": 0.5, "mcnemar_p": 1.0}),
        (2, {"reward": 1.0}),
    ]


def test_only_the_main_process_logs(tracked, fakes, monkeypatch):
    monkeypatch.setattr(PartialState, "is_main_process", False)
    monkeypatch.setattr(PartialState, "use_distributed", True)
    run = tracked("wandb", "tensorboard")
    run.log_step({"step": 0, "reward": 1.0})
    assert run.trackers == [] and not hasattr(fakes["wandb"], "run")
    assert not (run.path / "grpo").exists()


# --- the flag ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["wandb"], ["--track wandb: run pip install wandb"]),
        (["tensorboard", "trackio"], ["--track trackio: run pip install trackio"]),
        (["tensorbord"], ["--track", "'tensorbord'", "tensorboard"]),
    ],
)
def test_what_cannot_be_tracked_with(argv, parts, monkeypatch, capsys, tmp_path):
    def version(name):
        if name in ("wandb", "trackio"):
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--preset", "cpu", "--track", *argv])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and len(message) <= 201
    assert all(part in message for part in ("main.py: error: ", *parts)), message
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_tracked_by_default_and_a_resumed_run_may_change_it():
    args = parser.build_parser("cpu").parse_args([])
    assert args.track == [] and parser.build_parser("cpu").parse_args(["--track"]).track == []
    check_same_flags(args, {"track": ["wandb"]})
    with pytest.raises(UserError, match="--group_size"):
        check_same_flags(args, {"group_size": 3, "track": ["wandb"]})
