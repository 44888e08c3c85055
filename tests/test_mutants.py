"""The list of bugs in mutants.py fits the code as it is; running it takes a quarter of an hour."""

from mutants import MUTANTS, apply, check, modules


def test_every_bug_still_has_its_place_and_its_tests():
    assert list(check()) == []
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30


def test_a_bug_changes_one_file_and_a_text_without_a_place_is_an_error(tmp_path):
    (tmp_path / "one.py").write_text("loss = -objective")
    [mutant] = [mutant for mutant in MUTANTS if mutant.name == "ascent"]
    path, text = apply(mutant)
    assert path in modules() and text != path.read_text()
    assert len(list(check(MUTANTS[:1]))) == 0
    misplaced = [type(mutant)("gone", old, "x", "test_grpo.py") for old in ("no such text", "import")]
    assert [line.split(":")[0] for line in check(misplaced)] == ["gone", "gone"]
