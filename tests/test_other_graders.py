"""benchmarks/other_graders.py, on answers whose verdicts were worked out by hand."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import other_graders

TAGGED = "<reasoning>\n6 * 12 = {0}\n</reasoning>\n<answer>\n{0}\n</answer>\n"


@pytest.mark.parametrize(
    ("completion", "gold", "strict", "flexible"),
    [
        (TAGGED.format("72"), "72", False, True),  # the tags are no "####"
        (TAGGED.format("1,072"), "1072", False, True),
        (TAGGED.format("$72."), "72", False, True),
        (TAGGED.format("72.0"), "72", False, False),  # compared as text
        (TAGGED.format("72") + "That is 6 dozen.", "72", False, False),  # the last number
        (TAGGED.format("72") + "...", "72", False, False),  # dots are enough
        (TAGGED.format("-7"), "-7", False, True),
        ("6 * 12 is\n#### 72", "72", True, True),
        ("#### 72\n\nQuestion: 5\n#### 5", "72", True, False),
        ("#### 72.", "72", True, True),
        ("seventy-two", "72", False, False),
    ],
)
def test_lm_eval_s_rules_see_these(completion, gold, strict, flexible):
    rules, answer = other_graders.rules(), {"completion": completion, "answer": gold}
    assert rules["lm-eval strict-match"](answer) == strict
    assert rules["lm-eval flexible-extract"](answer) == flexible


def test_a_run_s_answers_are_counted_rule_by_rule(tmp_path, capsys):
    folder = tmp_path / "completions"
    folder.mkdir()
    rows = [(TAGGED.format("72"), True, True), (TAGGED.format("72.0"), True, True),
            ("It is 72", False, True), ("It is 71", False, False)]  # fmt: skip
    answers = [
        {"question": "6 * 12?", "answer": "72", "completion": text, "correct": strict,
         "lenient_correct": lenient} for text, strict, lenient in rows
    ]  # fmt: skip
    (folder / "eval_00000.jsonl").write_text("")
    (folder / "eval_00010.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    other_graders.main([str(tmp_path)])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["answers"] == 4
    expected = {"right": 2, "theirs alone": 1, "ours alone": 1}
    assert result["lm-eval flexible-extract"] == expected
    assert result["lm-eval strict-match"] == {"right": 0, "theirs alone": 0, "ours alone": 2}
    assert "ours alone: gold 72" in out and "72.0" in out
    with pytest.raises(SystemExit):
        other_graders.main([str(tmp_path), "--step", "3"])
