"""The benchmarks run and measure what they say; what they measured is in docs/log.md."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_args, make_model, make_setup, make_tokenizer
from safetensors.torch import load_file, save_file
from sighted import make_seeing

sys.path.insert(0, str(ROOT / "benchmarks"))
import align_projector
import common
import decode_step
import gpu_check
import limit
import lora_vs_full
import memory
import objective_curves
import picture_step
import replay
import self_play_exact
import vs_commit
import vs_trl
import vs_vllm

from evaluation.games import move_probabilities
from launch.known_models import KNOWN_MODELS
from records.files import Series
from sampling import groups
from tasks import load_task
from tasks.shapes import Scene
from utils import write_jsonl
from vision.sight import save_reader

TOY = ["--group_size", "2", "--max_completion_length", "5", "--rounds", "1"]


def ran(script, model, capfd, *flags):
    """Run a benchmark in this process; what its last line says."""
    script.main(["--model_name", str(model), *TOY, *flags])
    return json.loads(capfd.readouterr().out.splitlines()[-1])


@pytest.mark.benchmark
def test_the_sampling_benchmark_compares_both_and_ends_in_json(saved_models):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sampling_vs_generate.py", "--model_name",
         saved_models["qwen2"], *TOY, "--questions", "2", "--rounds", "2"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"] == 4
    assert result["ratio_min"] <= result["ratio"] <= result["ratio_max"]


@pytest.mark.benchmark
def test_a_step_is_timed_with_pictures_and_without(tmp_path, capfd, monkeypatch):
    model, tokenizer = make_seeing("llava")
    model.save_pretrained(tmp_path)
    save_reader(tokenizer, tmp_path)
    monkeypatch.setattr(groups, "padding_and_stops", groups.padding_and_stops)  # put back
    result = ran(picture_step, tmp_path, capfd, "--questions", "2")
    assert result["with_seconds"] > 0 and result["ratio"] > 0


def test_a_place_shows_the_cell_that_its_middle_lies_in():
    cells = (("red", "circle"), None, ("blue", "star"), None, ("green", "square"), None)
    a, b, c, none = cells[0], cells[2], cells[4], align_projector.NOTHING
    above, below = [a, none, none, b], [none, c, c, none]
    assert align_projector.drawn_there(Scene(cells, 0)) == 2 * above + 2 * below


@pytest.mark.benchmark
def test_trl_has_the_same_loss_and_a_step_of_both_is_compared(saved_models, capfd):
    model = saved_models["qwen2"]
    flags = ["--questions", "2", "--trl_batch_size", "2", "--warm_up", "0"]
    with pytest.raises(SystemExit, match="not the same loss"):
        ran(vs_trl, model, capfd, *flags, "--trl", "use_bias_correction_kl=true")
    result = ran(vs_trl, model, capfd, *flags)
    for ratio in ("sampling", "step"):
        low, middle, high = (result[f"{ratio}_ratio{end}"] for end in ("_min", "", "_max"))
        assert low <= middle <= high
    for side in ("ours", "trl"):
        assert 0 < result[f"{side}_completion_length"] <= 5
        assert result[f"{side}_completions_per_second"] > 0
        assert result[f"{side}_sampling_tokens_per_second"] > 0
    assert result["memory_ratio"] == pytest.approx(
        result["ours_peak_gib"] / result["trl_peak_gib"], abs=0.05
    )


def test_a_step_that_is_compared_trains_on_all_groups(saved_models):
    """TRL does, and so did this code, whatever the preset leaves out today."""
    parser = common.training_flags(common.workload_parser(__doc__, rounds=1, warm_up=0))
    args = parser.parse_args(["--kl_beta", "0.1"])
    setup, *_ = common.set_up(args, str(saved_models["qwen2"]), 2)
    assert setup.args.dataset_name == "arithmetic" and setup.args.kl_beta == 0.1
    assert setup.args.skip_flat_groups is False


@pytest.mark.benchmark
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the commits come from git")
def test_a_commit_against_itself_writes_the_same_in_every_stage(saved_models, capfd):
    flags = ["--questions", "2", "--warm_up", "0", "--eval_problems", "3"]
    result = ran(vs_commit, saved_models["qwen2"], capfd, "HEAD", *flags)
    assert result["equal_completions"] == "7 of 7"
    for stage in ("sampling", "reference", "policy", "evaluation", "step"):
        low, middle, high = (result[f"{stage}_ratio{end}"] for end in ("_min", "", "_max"))
        assert low <= middle <= high
        assert result[f"this_{stage}_seconds"] > 0 and result[f"commit_{stage}_seconds"] > 0


@pytest.mark.benchmark
def test_a_step_is_timed_as_recorded_and_as_fused(monkeypatch, capfd):
    pytest.importorskip("triton", reason="torch for CPUs comes without triton")
    shape = {
        "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 1000,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    }  # fmt: skip
    monkeypatch.setitem(KNOWN_MODELS, "toy", shape)
    monkeypatch.setattr("sampling.cuda_graph.RECORDERS", {"cpu": Direct})
    monkeypatch.setattr(decode_step, "WINDOW", 2)
    flags = ["--questions", "1", "--warm_up", "0", "--lengths", "1", "2"]
    result = ran(decode_step, "toy", capfd, *flags)
    assert result["rows"] == 2 and result["largest_gap_of_logits"] < 1e-4
    for length in (1, 2):
        assert result[f"recorded_ms_at_{length}"] > 0 and result[f"fused_ms_at_{length}"] > 0


class Direct:
    """In the place of a CUDA graph: calls the function again."""

    def __init__(self, function):
        self.replay = function


def test_without_a_gpu_no_step_is_timed(capfd):
    with pytest.raises(SystemExit) as stopped:
        decode_step.main([])
    assert stopped.value.code == 2
    assert capfd.readouterr().err == "decode_step.py: no CUDA device here\n"


def test_a_commit_that_git_does_not_know_is_answered_in_one_line(capfd):
    with pytest.raises(SystemExit) as stopped:
        vs_commit.main(["no-such-commit"])
    assert stopped.value.code == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("vs_commit.py: error: no-such-commit: ") and len(line) <= 200


def test_vllm_and_ours_are_compared_precision_by_precision(capfd):
    class Args:
        questions, group_size, rounds, precision = 4, 8, 2, ["fp32", "bf16"]

    replies = {
        "ours-fp32": [(100, 1), (100, 2)],
        "vllm-fp32": [(50, 1), (50, 1)],
        "ours-bf16": [(90, 1), (90, 1)],
        "vllm-bf16": [(30, 1), (45, 1)],
    }
    result = vs_vllm.summary(Args, replies)
    assert (result["fp32_ratio_min"], result["fp32_ratio"], result["fp32_ratio_max"]) == (1, 1.5, 2)
    assert (result["bf16_ratio"], result["vllm-bf16_tokens_per_second"]) == (2.5, 37.5)
    assert capfd.readouterr().out.splitlines()[2].startswith("| fp32 | 75.0 | 50.0 | 1.5 (1.0")


@pytest.mark.benchmark
def test_lora_and_all_weights_take_turns(saved_models, capfd):
    flags = ["--questions", "2", "--warm_up", "0", "--lora_rank", "2"]
    result = ran(lora_vs_full, saved_models["qwen2"], capfd, *flags)
    for name in ("sampling", "update", "step"):
        low, middle, high = (result[f"{name}_ratio{end}"] for end in ("_min", "", "_max"))
        assert low <= middle <= high
    for side in ("lora", "full"):
        assert result[f"{side}_step_seconds"] > result[f"{side}_update_seconds"] > 0
        assert result[f"{side}_peak_gib"] > 0


@pytest.mark.benchmark
def test_self_play_reads_the_moves_of_all_positions_as_an_evaluation_does(saved_models, capfd):
    tokenizer = make_tokenizer()
    flags = {"dataset_name": "kuhn", "dataset_path": None, "evaluator": None, "seed": 0}
    args = make_args(**flags, temperature=1.0, max_completion_length=20, micro_batch_tokens=4096)
    model = make_model(vocab_size=len(tokenizer))
    setup = make_setup(model, args, None, tokenizer, load_task(args))
    moves = self_play_exact.Moves(setup)
    ours = moves.shares(moves.logprobs(model)[0])
    for prompt, shares in move_probabilities(setup)[0].items():
        assert ours[prompt] == pytest.approx(shares, abs=1e-5)
    settings = ["preset", "card_unnamed", "constant_cold_start"]
    self_play_exact.main(
        ["--model_name", str(saved_models["qwen2"]), "--steps", "5", "--only", *settings]
    )
    lines = capfd.readouterr().out.splitlines()
    found = [line.split()[:3] for line in lines if "exploitability" in line]
    assert found == [[name, "step", step] for name in settings for step in ("0", "5")]


@pytest.mark.benchmark
def test_an_objective_is_compared_with_what_it_changes_on_the_same_questions(
    saved_models, tmp_path, capfd
):
    runs = tmp_path / "runs"
    asked = ["--output_dir", str(runs), "--model_name", str(saved_models["qwen2"]), "--seeds", "1",
             "--only", "default", "two_epochs", "sapo", "--steps", "2", "--eval_problems", "4",
             "--flags", "--cold_start_steps 1 --questions_per_step 2 --group_size 2 "
             "--max_completion_length 4"]  # fmt: skip
    objective_curves.main(asked)
    first = capfd.readouterr().out
    [default, twice, sapo] = first.splitlines()[-3:]
    assert default.endswith("|  |  |")
    assert "| default | +0.0 [" in twice and "| two_epochs | +0.0 [" in sapo
    assert (runs / "objectives.png").stat().st_size > 10_000
    assert not (runs / "sapo_1" / "model").exists() and (runs / "start_1" / "model").exists()
    flags = {name: Series(runs / f"{name}_1").flags for name in ("default", "two_epochs", "sapo")}
    assert [each["num_inner_epochs"] for each in flags.values()] == [1, 2, 2]
    assert [each["clip"] for each in flags.values()] == ["ppo", "ppo", "sapo"]
    assert {each["cold_start_steps"] for each in flags.values()} == {0}
    written = (runs / "sapo_1" / "metrics.jsonl").stat().st_mtime_ns
    objective_curves.main(asked)  # reads what is there
    assert capfd.readouterr().out == first
    assert (runs / "sapo_1" / "metrics.jsonl").stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="ended with other flags"):
        objective_curves.main([flag.replace("2", "3") if flag == "2" else flag for flag in asked])


def test_objectives_are_compared_question_by_question_on_the_seeds_that_both_have(tmp_path):
    runs = {}
    for name, right in {"a_1": [1, 0, 0, 1], "a_2": [1, 1, 0, 0], "b_1": [1, 1, 1, 1]}.items():
        runs[name] = tmp_path / name
        (runs[name] / "completions").mkdir(parents=True)
        rows = [
            {"question": f"{n}?", "answer": "", "correct": bool(x)} for n, x in enumerate(right)
        ]
        write_jsonl(
            runs[name] / "completions/eval_00002.jsonl", rows[:: 1 if name[0] == "a" else -1]
        )
        metrics = {"entropy": 0.1, "flat_groups": 0.0, "rewards/correctness": 2 * sum(right) / 4}
        write_jsonl(runs[name] / "metrics.jsonl", [{"step": 0, **metrics}])
        accuracy = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"), sum(right) / 4)
        write_jsonl(runs[name] / "eval.jsonl", [{"step": 2, **accuracy}])
        (runs[name] / "config.json").write_text(json.dumps({"flags": {"seed": int(name[-1])}}))
    row = objective_curves.row_of("b", [runs["b_1"]], [runs["a_1"]])
    assert row[1] == "100%" and row[4].startswith("100.0% (") and row[5].startswith("+50.0 [")


def test_the_limit_benchmark_gives_every_stage_its_share(saved_models, capfd, monkeypatch):
    monkeypatch.setattr("utils.keep_freed_memory", lambda: None)  # it is for good
    result = ran(limit, saved_models["qwen2"], capfd, "--rows", "4", "--largest", "64",
                 "--megabytes", "1", "--seconds", "0.01")  # fmt: skip
    assert [stage["stage"] for stage in result["stages"]] == ["sampling", "reference", "policy"]
    sampling, reference, policy = result["stages"]
    assert sampling["operations"] == reference["operations"] == policy["operations"] / 3
    for stage in result["stages"]:
        rate = stage["operations"] / stage["seconds"] / 1e9
        assert rate == pytest.approx(stage["gflops_per_second"], abs=0.01)
        shares = [rate / limit for limit in result["gflops_per_second"]]
        assert min(shares) - 1e-3 <= stage["share_of_products"] <= max(shares) + 1e-3
        assert stage["share_of_limit"] >= stage["share_of_products"]


@pytest.mark.benchmark
def test_the_memory_benchmark_has_a_process_for_each_size(saved_models, capfd):
    flags = ["--completions", "4", "--warm_up", "0"]
    result = ran(memory, saved_models["qwen2"], capfd, *flags)
    assert [size["completions"] for size in result["sizes"]] == [4]
    assert result["sizes"][0]["peak_gib"] > 0
    assert result["growth"] == 1


@pytest.fixture(scope="module")
def replayable(saved_models, tmp_path_factory):
    """A run of four steps from a saved model, its rollouts, and checkpoints after 2 and 4."""
    import evaluator
    import main
    from launch.parser import parse_args

    def spread(completion, problem):
        return float(sum(map(ord, completion)) % 7)

    run = tmp_path_factory.mktemp("replay") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "REWARD_FUNCTIONS", [spread])
        main.train(parse_args([
            "--preset", "cpu", "--questions_per_step", "2", "--group_size", "4", "--eval_problems",
            "2", "--max_completion_length", "8", "--cold_start_steps", "0", "--num_train_iters",
            "4", "--save_steps", "2", "--learning_rate", "0.0003", "--lr_schedule", "constant",
            "--warmup_percent", "0", "--max_prompt_length", "400", "--save_rollouts",
            "--model_name", str(saved_models["qwen2"]), "--output_dir", str(run),
        ]))  # fmt: skip
    return run


def replayed(run, capfd, *flags):
    replay.main([str(run), *flags])
    return json.loads(capfd.readouterr().out.splitlines()[-1])["points"]


@pytest.mark.benchmark
def test_replay_tells_objectives_apart_only_where_the_model_has_moved(replayable, capfd):
    points = replayed(replayable, capfd)
    seen = [(point["step"], point["model"].rsplit("/")[-1]) for point in points]
    assert seen[1:] == [(2, "step_00002"), (0, "model"), (2, "model"), (3, "model")]
    here, old, recent = points[0], points[2], points[4]
    assert here["mismatch"] < 1e-5 < recent["mismatch"] < old["mismatch"]
    for point in points[:2]:  # the models that sampled
        for name in ("gspo", "tis"):
            assert point["objectives"]["grpo"]["cosine"][name] == pytest.approx(1, abs=1e-5)
            assert point["objectives"][name]["clip_fraction"] == 0
        assert point["objectives"]["dapo"]["cosine"]["cispo"] == pytest.approx(1, abs=1e-5)
        norms = [point["objectives"][name]["norm"] for name in ("grpo", "gspo", "tis")]
        assert max(norms) == pytest.approx(min(norms), rel=1e-4)
    grpo = old["objectives"]["grpo"]
    assert grpo["cosine"]["grpo"] == pytest.approx(1)
    assert old["objectives"]["dapo"]["cosine"]["cispo"] < 0.999
    assert old["objectives"]["gspo"]["clip_fraction"] > grpo["clip_fraction"]


@pytest.mark.benchmark
def test_replay_at_the_sampler_has_the_run_s_own_gradient(replayable, capfd):
    [point, _] = replayed(replayable, capfd, "--step", "0", "--objective", "grpo")
    logged = json.loads((replayable / "metrics.jsonl").read_text().splitlines()[0])
    assert point["objectives"]["grpo"]["norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--objective", "ppo"], "--objective ppo: not one of"),
        (["--step", "9"], "--step 9: not saved; there are 0 to 3"),
        (["--model", "no/such"], "--model no/such: no such directory"),
    ],
)
def test_replay_answers_a_mistake_in_one_line(replayable, flags, reason, capfd):
    with pytest.raises(SystemExit) as ended:
        replay.main([str(replayable), *flags])
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert reason in err and err.count("\n") == 1


@pytest.mark.benchmark
def test_replay_says_what_an_older_file_lacks(replayable, tmp_path, capfd):
    run = shutil.copytree(replayable, tmp_path / "run")
    for file in (run / "rollouts").iterdir():
        tensors = load_file(file)
        del tensors["weights"]
        save_file(tensors, file, metadata={"rewards": '["spread"]'})
    with pytest.raises(SystemExit) as ended:
        replay.main([str(run), "--objective", "grpo,gdpo"])
    assert ended.value.code == 2
    assert "without the weights of the rewards, which gdpo needs" in capfd.readouterr().err
    assert replayed(run, capfd, "--objective", "grpo", "--step", "0")


def test_replay_needs_saved_rollouts(tmp_path, capfd):
    for written in ({}, {"flags": {"preset": "cpu", "dataset_name": "arithmetic"}}):
        (tmp_path / "config.json").write_text(json.dumps(written))
        with pytest.raises(SystemExit) as ended:
            replay.main([str(tmp_path)])
        assert ended.value.code == 2
    assert "train with --save_rollouts" in capfd.readouterr().err


@pytest.fixture
def toy():
    """A layer: q 32 x 32, k and v 32 x 16, o 32 x 32, three of 32 x 48. Two layers; head 300."""
    return make_model("qwen2")


def test_operations_are_those_counted_by_hand(toy):
    # One question of 3 tokens, completions of 2 and 4: 1 and 3 of their tokens are read.
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    products = 2 * matrices * (3 + 1 + 3)
    head = 2 * 32 * 300 * (1 + 1 + 3)
    seen = (1 + 2 + 3) + 4 + (4 + 5 + 6)
    attention = 2 * (2 * 2 * 32 * seen)  # layers, products, operations, query width
    assert limit.forward_flops(toy, [3], [[2, 4]]) == products + head + attention


def test_operations_are_those_of_a_pass_that_wastes_none(toy):
    """One completion per prompt: what torch counts, but for the half of attention that is masked
    and the head at the prompt."""
    from torch.utils.flop_counter import FlopCounterMode

    toy.set_attn_implementation("eager")  # the counter leaves the fused kernel out
    ids = torch.zeros((1, 9), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        toy.get_output_embeddings()(toy.get_decoder()(ids).last_hidden_state[:, 3:])
    masked = 4 * 2 * 32 * (9 * 9 - limit.seen(0, 9))
    assert limit.forward_flops(toy, [4], [[6]]) == counter.get_total_flops() - masked


def test_sampling_reads_weights_once_per_token_and_the_cache(toy):
    weights = sum(
        p.numel() for name, p in toy.named_parameters() if p.ndim == 2 and "layers" in name
    )
    # Passes: the prompt, then three. In these the prompt is read once, the completions row by row.
    cached = 3 * 3 + (1) + (1 + 2 + 3)
    expected = 4 * (4 * (weights + 32 * 300) + 2 * (2 * 16) * cached)
    assert limit.sampling_bytes(toy, [3], [[2, 4]], itemsize=4) == expected


def test_a_ratio_is_a_median_with_its_range():
    assert common.ratios([2, 3, 8], [1, 1, 2], "x_") == {
        "x_ratio": 3, "x_ratio_min": 2, "x_ratio_max": 4
    }  # fmt: skip


def test_a_gpu_check_without_a_gpu_says_so(capfd):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1
    assert not out


def test_a_gpu_check_shows_the_figures_of_a_last_line():
    stage = {"rows": 64, "stage": "policy", "gflops_per_second": 5.0, "share_of_limit": 0.25}
    rows = gpu_check.figures("limit", json.dumps({"gigabytes_per_second": 7, "stages": [stage]}))
    assert rows == [
        ("limit: gigabytes per second", 7),
        ("limit: policy of 64 rows, GFLOP/s", 5.0),
        ("limit: policy of 64 rows, share of the limit", "25.0%"),
    ]
    assert gpu_check.figures("limit", "failed with status 1") == [("limit", "failed with status 1")]
