"""The list of bugs in mutants.py fits the code as it is; running it takes a quarter of an hour."""

from mutants import MUTANTS, Mutant, apply, check, modules


def test_every_bug_still_has_its_place_and_its_tests():
    assert list(check()) == []
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30


def test_a_bug_changes_one_file_and_a_text_without_a_place_is_an_error():
    [mutant] = [mutant for mutant in MUTANTS if mutant.name == "ascent"]
    path, text = apply(mutant)
    assert path in modules() and text != path.read_text()
    for old in ("no such text", "import"):
        [line] = check([Mutant("misplaced", old, "x", "test_grpo.py")])
        assert line.startswith("misplaced: not exactly once")
    [line] = check([Mutant("unseen", mutant.old, mutant.new, "test_nothing.py")])
    assert line == "unseen: no tests/test_nothing.py"
