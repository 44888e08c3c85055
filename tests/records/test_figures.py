"""What figures are called, on PNGs and on the page alike, and what their axes count."""

import html
import re

import pytest
from matplotlib.figure import Figure

from records import plots
from records.files import LABELS, coinciding, title, unit
from records.plots import plot_run
from records.report import write_report
from utils import write_jsonl

STEPS = range(12)
FORMATS = ("strict_format", "soft_format", "tag_count")


@pytest.fixture
def run(tmp_path):
    """A run whose format rewards are all but the same, with metrics that no list knows."""
    write_jsonl(tmp_path / "metrics.jsonl", [
        {"step": step, "reward": step / 8, "rewards/correctness": step / 10, "alarms": [],
         **{f"rewards/{name}": 0.4 + i / 500 for i, name in enumerate(FORMATS)},
         "kl": 0.01, "completion_length": 30.0, "novelty": step / 3, "rewards/brevity": 0.1,
         "seconds/sampling": 2.0, "seconds/policy": 3.0}
        for step in STEPS
    ])  # fmt: skip
    write_jsonl(tmp_path / "eval.jsonl", [
        {"step": step, "problems": 10, "accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.8,
         "completion_length": 30.0, "rewards/brevity": 0.1, "surprise": 1.0}
        for step in (0, 12)
    ])  # fmt: skip
    return tmp_path


def drawn(run, monkeypatch):
    """{file: its axes} of every PNG."""
    seen = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: seen.update({path.stem: figure.axes})
    )
    plot_run(run)
    return seen


def outside(axes):
    """The texts of a panel that leave its figure."""
    figure = axes.figure
    figure.draw_without_rendering()
    texts = [axes.title, axes._left_title]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels())
        texts += [axis.label, axis.offsetText, *(label for at, label in ticks if low <= at <= high)]
    boxes = {text.get_text(): text.get_window_extent() for text in texts if text.get_text()}
    width, height = figure.bbox.size
    return [
        text
        for text, box in boxes.items()
        if min(box.x0, box.y0, width - box.x1, height - box.y1) < 0
    ]


def test_no_text_leaves_a_figure(tmp_path, monkeypatch):
    """Small numbers have their power of ten above the axis, positions of a game long names, and its
    moves may name a card."""
    metrics = {"reward": 1.5, "learning_rate": 1e-6, "weights_changed": 0.0190234, "mismatch": 3e-7}
    evaluation = {"step": 0, "problems": 9, "accuracy": 0.123, "completion_length": 12345.6}
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 0, **metrics}])
    write_jsonl(tmp_path / "eval.jsonl", [evaluation])
    moves = [
        {"position": f"You hold the {card}. {told}", "perfect": None,
         "moves": {f"My {card} {one}.": 0.4, f"My {card} {other}.": 0.6}}
        for card in ("Jack", "Queen", "King")
        for told, one, other in (("You checked, your opponent bets.", "folds", "calls"),
                                 ("You act first.", "checks", "bets"))
    ]  # fmt: skip
    (tmp_path / "completions").mkdir()
    write_jsonl(tmp_path / "completions" / "games_00000.jsonl", moves)
    figures = drawn(tmp_path, monkeypatch)
    assert {"moves", "learning_rate", "mismatch", "eval_completion_length"} <= {*figures}
    assert {name: found for name, panels in figures.items()
            if (found := [text for axes in panels for text in outside(axes)])} == {}  # fmt: skip


def test_every_axis_has_a_label(run, monkeypatch):
    for name, panels in drawn(run, monkeypatch).items():
        for axes in panels:
            assert (
                axes.get_xlabel() == "step" and axes.get_ylabel() and axes.get_title(loc="left")
            ), name
    page = write_report(run).read_text()
    assert page.count(">step</text>") == page.count("<svg ") == page.count("rotate(-90)")


@pytest.mark.parametrize(
    ("key", "named", "counted"),
    [
        ("kl", "KL to the reference (nats per token)", "nats per token"),
        ("accuracy", "held-out accuracy (greedy, 95 % interval)", "share"),
        ("rewards/brevity", "reward: brevity", "reward"),
        ("seconds/policy", "seconds/policy", "seconds"),
        ("pass@4", "pass@4", "share"),
        ("novelty", "novelty", "novelty"),
        ("loss", "loss", "loss"),
        ("completion_length", "completion length (tokens)", "tokens"),
    ],
)
def test_a_metric_has_its_name_and_what_it_counts(key, named, counted):
    assert (title(key), unit(key)) == (named, counted)
    assert title(key, held_out=True).count("held-out") == 1


def test_png_and_page_call_the_same_thing_the_same(run, monkeypatch):
    """A metric that a reward or the loop returns is there by its name alone."""
    named = {name: axes[0].get_title(loc="left") for name, axes in drawn(run, monkeypatch).items()}
    page = html.unescape(write_report(run).read_text())
    captions = set(re.findall("<figcaption>(.*?)</figcaption>", page))
    for name in ("kl", "completion_length", "novelty", "eval_accuracy", "eval_completion_length",
                 "eval_surprise", "eval_rewards_brevity", "reward"):  # fmt: skip
        assert named[name] in captions, name
    assert named["eval_surprise"] == "held-out surprise"
    assert "brevity" in re.findall(r'"name": "(.*?)"', page)


def test_curves_that_coincide_are_one(run, monkeypatch):
    axes = drawn(run, monkeypatch)["overview"][0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["total", "correctness", ", ".join(FORMATS), "brevity"]
    names = re.findall(r'"name": "(.*?)"', write_report(run).read_text())
    assert names[:4] == labels


def test_curves_coincide_within_a_fiftieth_of_the_figure():
    steps = [0, 1]
    curves = {"a": (steps, [0.0, 1.0]), "b": (steps, [0.0, 0.981]), "c": (steps, [0.0, 0.979]),
              "d": ([0], [0.0]), "e": (steps, [0.0, 1.0])}  # fmt: skip
    assert coinciding(curves) == [["a", "b", "e"], ["c"], ["d"]]
    assert coinciding({}) == []
    assert coinciding({"a": (steps, [1, 1]), "b": (steps, [1, 1])}) == [["a", "b"]]


def test_no_label_needs_a_glossary():
    assert not any(word in " ".join(LABELS.values()) for word in ("watching", "or none"))
    assert plots.reward_name("reward") == "total"
