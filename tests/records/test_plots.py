"""Plots are drawn from the files alone."""

import json

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from launch.commands import main
from records import plots
from records.files import Series, over_seeds, smooth
from records.plots import plot_run
from utils import write_jsonl


@pytest.fixture
def runs(tmp_path):
    """Two runs; the second died before its first evaluation and knows a metric of its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    rows = [
        {"step": step, "reward": step / 10, "rewards/correctness": step / 20, "kl": None,
         "grad_norm": 1.0, "entropy": 0.5, "completion_length": 30, "seconds/sampling": 2.0,
         "seconds/policy": 3.0}
        for step in range(12)
    ]  # fmt: skip
    write_jsonl(first / "metrics.jsonl", rows)
    write_jsonl(second / "metrics.jsonl", [{**row, "novelty": 1.0} for row in rows[:5]])
    evaluation = {"problems": 10, "accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.8}
    write_jsonl(first / "eval.jsonl", [{"step": 0, **evaluation}, {"step": 12, **evaluation}])
    return first, second


def test_a_run_gets_an_overview_and_a_figure_per_metric(runs):
    folder = plot_run(runs[0])
    names = {path.stem for path in folder.iterdir()}
    assert names == {
        "overview", "reward", "rewards_correctness", "grad_norm", "entropy", "completion_length",
        "eval_accuracy", "budget",
    }  # fmt: skip
    height, width, _ = imread(folder / "overview.png").shape
    assert width > 1500 and height > 800


def test_several_runs_are_laid_over_each_other(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["plot", *map(str, runs)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "comparison")
    assert (tmp_path / "comparison" / "overview.png").exists()
    assert (tmp_path / "comparison" / "novelty.png").exists()
    assert (tmp_path / "comparison" / "seconds_policy.png").exists()


def test_the_original_s_log_dir_flag_works(runs):
    main(["plot", "--log_dir", str(runs[0])])
    assert (runs[0] / "plots" / "overview.png").exists()


def test_a_directory_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path}: no run here" in message
    assert message.count("\n") == 1


def test_a_run_that_died_while_writing_is_still_drawn(runs):
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "rew')
    assert Series(runs[0]).metrics["reward"][0] == list(range(12))


def test_what_cannot_be_drawn_is_said_in_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["plot", str(runs[0]), "--output_dir", str(tmp_path / "file")]) == 2
    (runs[0] / "config.json").write_text("{")
    assert main(["plot", str(runs[0])]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["plot"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_missing_values_leave_gaps_and_do_not_become_points(runs):
    series = Series(runs[0])
    assert "kl" not in series.metrics
    assert series.metrics["reward"][0] == list(range(12))


def test_alarms_are_marked_in_every_figure_at_their_step(runs):
    write_jsonl(runs[0] / "metrics.jsonl", [
        {"step": 12, "reward": 1.0, "alarms": []},
        {"step": 13, "reward": 1.0, "alarms": ["kl: far", "entropy: low"]},
    ], mode="a")  # fmt: skip
    series = Series(runs[0])
    assert series.alarms == [(13, "kl: far"), (13, "entropy: low")]
    assert "alarms" not in series.metrics
    axes = Figure().subplots()
    plots._metric(axes, [series], "reward")
    assert [text.get_text() for text in axes.texts] == ["kl, entropy"]
    assert list(axes.lines[-1].get_xdata()) == [13, 13]


def test_a_stage_of_few_steps_stands_on_the_others_there_alone():
    axes = Figure().subplots()
    plots._stack(axes, {"policy": ([0, 1, 2], [1.0, 2.0, 3.0]), "token_log": ([0, 2], [0.5, 4.0])})
    tops, edges, bases = zip(*(patch.get_data() for patch in axes.patches))
    assert [list(values) for values in (*tops, *bases)] == [
        [1, 2, 3], [1.5, 2, 7], [0, 0, 0], [1, 2, 3]
    ]  # fmt: skip
    assert list(edges[0]) == [-0.5, 0.5, 1.5, 2.5]
    plots._stack(axes, {})  # a run without steps


def test_the_budget_s_bars_add_up_to_what_was_sampled(runs):
    rows = [{"step": step, "seconds/policy": 1.0, "tokens/sampled": 90, "tokens/trained": 60,
             "tokens/flat": 20, "tokens/truncated": 5} for step in range(3)]  # fmt: skip
    write_jsonl(runs[0] / "metrics.jsonl", rows)
    axes = Figure().subplots()
    plots._tokens(axes, [Series(runs[0])])
    trained, whole = (list(patch.get_data().values) for patch in axes.patches)
    assert trained == [60] * 3 and whole == [90] * 3
    plot_run(runs[0])
    assert imread(runs[0] / "plots" / "budget.png").shape[1] > 1500


@pytest.fixture
def seeds(tmp_path):
    """Two seeds of each of two recipes; one run has a step and a metric more than the others."""
    folders = []
    for place, (kl_beta, seed) in enumerate([(0.0, 1), (0.0, 2), (0.04, 1), (0.04, 2)]):
        folder = tmp_path / f"run{place}"
        folder.mkdir()
        flags = {"kl_beta": kl_beta, "seed": seed, "output_dir": str(folder)}
        (folder / "config.json").write_text(json.dumps({"flags": flags}))
        steps = range(3 if place else 4)
        extra = {} if place else {"novelty": 1.0}
        rows = [{"step": n, "entropy": n + 2 * seed, "reward": 1.0, **extra} for n in steps]
        write_jsonl(folder / "metrics.jsonl", rows)
        score = {"accuracy": seed / 10, "accuracy_low": 0.0, "accuracy_high": 1.0, "entropy": 5.0}
        write_jsonl(folder / "eval.jsonl", [{"step": 0, **score}])
        folders.append(folder)
    return folders


def test_runs_that_differ_in_their_seed_alone_become_their_mean_and_range(seeds):
    without, with_kl = over_seeds([Series(folder) for folder in seeds])
    assert [mean.name for mean in (without, with_kl)] == [
        "kl_beta 0.0, mean of 2 seeds", "kl_beta 0.04, mean of 2 seeds",
    ]  # fmt: skip
    assert without.metrics["entropy"] == ([0, 1, 2], [3, 4, 5])  # the steps that both have
    assert without.metric_ranges["entropy"] == ([2, 3, 4], [4, 5, 6])
    assert "novelty" not in without.metrics
    assert without.evaluations["accuracy"] == ([0], [pytest.approx(0.15)])
    assert without.intervals["accuracy"] == ([0.1], [0.2])  # not the runs' own
    [alone] = over_seeds([Series(folder) for folder in seeds[:2]])
    assert alone.name == "mean of 2 seeds"


def test_a_mean_of_equal_values_lies_on_them_and_is_drawn(tmp_path):
    """(0.1 + 0.1 + 0.1) / 3 is above 0.1."""
    folders = [tmp_path / str(seed) for seed in range(3)]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"flags": {"seed": folder.name}}))
        write_jsonl(folder / "eval.jsonl", [{"step": 0, "accuracy": 0.1}])
    [mean] = over_seeds([Series(folder) for folder in folders])
    assert mean.evaluations["accuracy"] == ([0], [0.1])
    plots.plot_runs([mean], tmp_path / "plots")


def flags_written(folder, data=None, **flags):
    facts = {} if data is None else {"problems_sha256": data}
    (folder / "config.json").write_text(json.dumps({"flags": flags, **facts}))


def test_a_flag_that_only_some_runs_have_sets_them_apart(seeds):
    flags_written(seeds[2], seed=1, kl_beta=0.0, clip="cispo")
    flags_written(seeds[3], seed=2, kl_beta=0.0, clip="cispo")
    names = [mean.name for mean in over_seeds([Series(folder) for folder in seeds])]
    assert names == ["clip None, mean of 2 seeds", "clip cispo, mean of 2 seeds"]


def test_what_does_not_change_what_is_learnt_sets_no_runs_apart(seeds):
    flags_written(seeds[0], seed=1, kl_beta=0.0, short_eval_iterations=4, prompt_date="2026-11-28")
    flags_written(seeds[1], seed=2, kl_beta=0.0, short_eval_iterations=0, save_steps=5)
    [mean] = over_seeds([Series(folder) for folder in seeds[:2]])
    assert mean.name == "mean of 2 seeds"
    for folder, prompts in zip(seeds, "ab"):  # but the day does, where prompts show it
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "prompts_sha256": prompts * 64}))
    names = [mean.name for mean in over_seeds([Series(folder) for folder in seeds[:2]])]
    assert names == ["prompts aaaaaaaa, seed 1", "prompts bbbbbbbb, seed 2"]


def test_runs_on_other_data_are_another_recipe_wherever_the_file_lies(seeds):
    for place, name in enumerate(("a/easy", "b/easy", "a/hard", "b/hard")):
        flags_written(seeds[place], name[2] * 64, seed=place, dataset_path=f"/{name}.jsonl")
    means = over_seeds([Series(folder) for folder in seeds])
    assert [mean.name for mean in means] == [
        "dataset_path easy.jsonl, problems eeeeeeee, mean of 2 seeds",
        "dataset_path hard.jsonl, problems hhhhhhhh, mean of 2 seeds",
    ]
    for place, data in enumerate("aabb"):  # files of one name in two places
        flags_written(seeds[place], data * 64, seed=place, dataset_path=f"/{data}/data.jsonl")
    means = over_seeds([Series(folder) for folder in seeds])
    assert [mean.name for mean in means] == [
        "problems aaaaaaaa, mean of 2 seeds", "problems bbbbbbbb, mean of 2 seeds",
    ]  # fmt: skip


def test_seeds_are_counted_and_not_runs(seeds):
    flags_written(seeds[1], seed=1, kl_beta=0.0)
    assert [mean.name for mean in over_seeds([Series(folder) for folder in seeds])] == [
        "kl_beta 0.0, mean of 2 runs of seed 1", "kl_beta 0.04, mean of 2 seeds",
    ]  # fmt: skip
    assert [mean.name for mean in over_seeds([Series(seeds[0])])] == ["seed 1"]


def test_a_seed_that_was_run_more_often_counts_once(seeds):
    for folder, seed in zip(seeds, (1, 1, 1, 2)):
        flags_written(folder, seed=seed)
    for folder, accuracy in zip(seeds, (0.8, 0.9, 1.0, 0.1)):
        write_jsonl(folder / "eval.jsonl", [{"step": 0, "accuracy": accuracy}])
    [mean] = over_seeds([Series(folder) for folder in seeds])
    assert mean.name == "mean of 2 seeds"
    assert mean.evaluations["accuracy"] == ([0], [pytest.approx(0.5)])
    assert mean.intervals["accuracy"] == ([0.1], [pytest.approx(0.9)])


def test_a_run_whose_flags_are_unknown_has_no_recipe(seeds, capsys):
    (seeds[1] / "config.json").unlink()
    assert main(["plot", "--mean", *map(str, seeds)]) == 2
    assert f"{seeds[1]}: no config.json" in capsys.readouterr().err


def test_means_are_drawn_with_their_bands(seeds, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.fill_between", lambda *args, **_: drawn.append(args))
    assert not main(["plot", "--mean", *map(str, seeds), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "entropy.png").exists()
    assert [list(low) for _, _, low, _ in drawn].count([2, 3, 4]) == 4  # overview and own, twice
    assert not main(["plot", "--mean", *map(str, seeds[:2]), "--output_dir", str(tmp_path / "o")])


def test_the_smooth_line_is_a_moving_average():
    assert smooth([3.0, 6.0, 9.0, 0.0]) == [3.0, 6.0, 5.0, 0.0]
    assert smooth([1.0, 2.0, 3.0], window=1) == [1.0, 2.0, 3.0]
    assert smooth([5.0]) == [5.0] and smooth([]) == []


def test_the_smooth_line_does_not_lag():
    straight = [float(n) for n in range(50)]
    assert smooth(straight) == straight
    step = smooth([0.0] * 30 + [1.0] * 30)
    assert sum(step) == pytest.approx(30) and step[:27] == [0.0] * 27 and step[33:] == [1.0] * 27
