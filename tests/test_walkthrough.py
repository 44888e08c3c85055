"""docs/walkthrough.md says what the code does: its blocks are run in their order."""

import re
import runpy

import pytest
import torch
from conftest import ROOT

PAGE = ROOT / "docs" / "walkthrough.md"
EMBEDDED = 'MODEL = "smollm2-135m"'


def run(model, folder, monkeypatch):
    """The page's names after all its blocks, with this model in place of the embedded one."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 9 and blocks[0].count(EMBEDDED) == 1
    blocks[0] = blocks[0].replace(EMBEDDED, f"MODEL = {str(model)!r}")
    script = folder / "walkthrough.py"
    script.write_text("\n".join(blocks))
    return runpy.run_path(str(script))


def check(names, said):
    assert said.count("advantage ") == 4 and "the objective rose by" in said
    assert (names["after"] != names["before"]).all()
    best, worst = names["by_hand"].argmax(), names["by_hand"].argmin()
    moved = names["after"] - names["before"]
    assert moved[best] > moved[worst]
    assert torch.isfinite(names["loss"])


def test_the_walkthrough_runs_on_a_toy(saved_models, tmp_path, monkeypatch, capsys):
    names = run(saved_models["qwen2"], tmp_path, monkeypatch)
    check(names, capsys.readouterr().out)


@pytest.mark.slow
def test_the_walkthrough_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    names = run("smollm2-135m", tmp_path, monkeypatch)
    check(names, capsys.readouterr().out)
