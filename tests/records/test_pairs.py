"""The report shows judged pairs side by side, with every verdict, and nothing of them as markup."""

from pathlib import Path

from toys import record, write_run

from records.pairs import SHOWN, pairs_section, verdicts


def wins(referee, second, question="Q", text="now", correct=True):
    return record(question, correct, text, wins={"referee": referee, "eval_referee": second})


def section(tmp_path, before, after):
    return pairs_section(Path(write_run(tmp_path / "run", {0: before, 20: after})))


def test_each_judge_says_who_is_better():
    before = record("Q", False, "then")
    assert verdicts(before, wins(0.7, 0.2)) == {
        "the referee": "now", "the second referee": "step 0", "the exact check": "now"
    }  # fmt: skip
    assert [*verdicts(record("Q", True), wins(0.5, None)).values()] == ["a tie", "unread", "a tie"]
    assert verdicts(record("Q", True), wins(1, 1, correct=False))["the exact check"] == "step 0"


def test_pairs_that_judges_see_differently_come_first_and_all_kinds_are_there(tmp_path):
    before = [record(f"q{n}", True, f"then {n}") for n in range(60)]
    after = [wins(0.5, 0.5, f"q{n}", f"now {n}") for n in range(58)]
    after += [wins(0.9, 0.1, "q58", "fooled"), wins(0.9, 0.9, "q59", "finer")]
    markup = section(tmp_path, before, after)
    assert f"{SHOWN} of 60 pairs" in markup and markup.count("<tr>") == SHOWN + 1
    assert markup.index("fooled") < markup.index("finer") < markup.index("now 20")
    assert "then 58" in markup and "the second referee: step 0" in markup


def test_what_a_model_wrote_is_text(tmp_path):
    after = [wins(0.9, 0.9, "<b>q</b>", "<script>x</script>" + "a" * 900)]
    markup = section(tmp_path, [record("<b>q</b>", True, "</table>")], after)
    assert "<script>" not in markup and "<b>" not in markup and markup.count("</table>") == 1
    assert "&lt;script&gt;" in markup and "a" * 601 not in markup


def test_a_run_without_a_referee_has_no_such_section(tmp_path):
    assert section(tmp_path, [record("q", True)], [record("q", True)]) == ""
    assert pairs_section(Path(write_run(tmp_path / "other", {0: [wins(1, 1)]}))) == ""
