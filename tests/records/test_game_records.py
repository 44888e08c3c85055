"""A game's figure and its part of the report, from the run's files alone."""

import json

from matplotlib.figure import Figure

from records.games import bars, draw_moves, first_and_last, games_section


def position(name, moves, perfect):
    return {"position": name, "moves": moves, "perfect": perfect}


POKER = [
    position("You act first.", {"I check.": 0.3, "I bet.": 0.7}, {"I check.": 1, "I bet.": 0}),
    position("He bets.", {"I fold.": 0.9, "I call.": 0.1}, {"I fold.": 0.5, "I call.": 0.5}),
]
STONES = [
    position("10 left", {"1": 0.2, "2": 0.5, "3": 0.3}, {"1": 0.0, "2": 1.0, "3": 0.0}),
    position("9 left", {"1": 0.6, "2": 0.3, "3": 0.1}, {"1": 1.0, "2": 0.0, "3": 0.0}),
    position("8 left", {"1": 0.6, "2": 0.3, "3": 0.1}, {"1": 1 / 3, "2": 1 / 3, "3": 1 / 3}),
]


def game(against, said, won, legal=True):
    turns = [{"player": "policy", "told": "You act first.", "said": said}]
    return {"against": against, "turns": turns, "won": won, "legal": legal}


def write(folder, step, rows):
    (folder / "completions").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "completions" / f"games_{step:05d}.jsonl").write_text(text)


def test_of_two_moves_the_second_is_drawn_beside_perfect_play():
    assert bars(POKER) == [("He bets.", 0.1, 0.5), ("You act first.", 0.7, 0)]


def test_of_more_moves_the_best_ones_are_drawn_by_number_where_some_are_worse():
    assert bars(STONES) == [("9 left", 0.6, 1.0), ("10 left", 0.5, 1.0)]


def test_the_first_and_the_last_evaluation_are_drawn(tmp_path):
    for step, share in ((0, 0.7), (5, 0.5), (10, 0.2)):
        moves = {"I check.": 1 - share, "I bet.": share}
        write(tmp_path, step, [position("You act first.", moves, None)])
    ends = first_and_last(tmp_path)
    assert [step for step, _ in ends] == [0, 10]
    axes = Figure().subplots()
    draw_moves(axes, ends)
    assert [round(bar.get_height(), 2) for bar in axes.patches] == [0.7, 0.2]
    assert first_and_last(tmp_path / "elsewhere") == []


def test_two_dollars_in_what_a_mover_is_told_are_no_formula(tmp_path):
    figure = Figure()
    row = position("You have $5_{ left, the pot $3.", {"I bet $1_{.": 0.5, "I bet $2.": 0.5}, None)
    draw_moves(figure.subplots(), [(0, [row])])
    figure.savefig(tmp_path / "moves.png")
    assert figure.axes[0].get_xticklabels()[0].get_text() == row["position"]


def test_of_many_moves_without_a_best_one_nothing_is_drawn():
    assert bars([position("10 left", {"1": 0.2, "2": 0.5, "3": 0.3}, None)]) == []


def test_games_stand_side_by_side_and_what_was_said_is_text(tmp_path):
    assert games_section(tmp_path) == ""
    write(tmp_path, 0, [*POKER, game("random", "<script>x</script>", -2, legal=False)])
    write(tmp_path, 30, [*POKER, game("random", "I bet.", 1)])
    page = games_section(tmp_path)
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.index("step 0") < page.index("step 30")
    assert "the policy has -2, by an illegal move" in page and "the policy has +1" in page
