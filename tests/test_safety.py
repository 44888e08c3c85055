"""Text is data, files are not code, and an access token stays where it is."""

import ast

import pytest
from conftest import CANARY, ROOT

import evaluator

NEVER_CALLED = {"eval", "exec", "compile", "__import__", "breakpoint"}
NEVER_CALLED_ON_A_MODULE = {"system", "popen", "getoutput", "getstatusoutput", "unsafe_load"}
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"}
ONLY_VALUE = {"shell": False, "weights_only": True, "allow_pickle": False}


def dangers(source):
    """(line, what) of whatever would run text or a file as code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                modules = {(node.module or "").split(".")[0]}
            for module in modules & NEVER_IMPORTED:
                yield node.lineno, f"import {module}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        if called in NEVER_CALLED or name in NEVER_CALLED_ON_A_MODULE:
            yield node.lineno, called
        if name in ("eval", "exec") and node.args:  # model.eval() takes none
            yield node.lineno, called
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if called == "torch.load" and "weights_only" not in keywords:
            yield node.lineno, "torch.load without weights_only=True"
        for keyword, value in keywords.items():
            safe = getattr(value, "value", None) is ONLY_VALUE.get(keyword)
            if keyword == "trust_remote_code" or (keyword in ONLY_VALUE and not safe):
                yield node.lineno, f"{called}({keyword}={ast.unparse(value)})"


def test_nothing_in_the_repository_runs_text_or_files_as_code():
    files = [
        path
        for path in ROOT.rglob("*.py")
        if not {".venv", "runs", "build"} & set(path.relative_to(ROOT).parts)
    ]
    assert {"main.py", "evaluator.py", "conftest.py", "vs_trl.py"} <= {file.name for file in files}
    found = [(file.name, *danger) for file in files for danger in dangers(file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(completion)", "exec(text)", "builtins.eval(text)", "compile(text, '', 'exec')",
        "__import__(name)", "os.system(text)", "os.popen(text)", "subprocess.getoutput(text)",
        "subprocess.run(text, shell=True)", "subprocess.run(text, shell=on)", "import pickle",
        "from pickle import loads", "import pickle as p", "import os, dill", "torch.load(path)",
        "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "numpy.load(path, allow_pickle=True)", "yaml.unsafe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=args.trust)",
        "frame.eval(text)",
    ],
)  # fmt: skip
def test_what_the_search_above_finds(source):
    assert list(dangers(f"def f():\n    {source}"))


def test_what_the_search_above_leaves_alone():
    harmless = "model.eval()\nre.compile('a')\ntorch.load(path, weights_only=True)\nimport codecs"
    assert list(dangers(harmless)) == []


@pytest.mark.parametrize("reward", ["correctness", "unlucky"])
def test_a_run_and_its_errors_show_the_access_token_nowhere(
    reward, command, saved_models, tmp_path, monkeypatch
):
    def unlucky(completion, problem):
        raise RuntimeError("surprise")

    if reward == "unlucky":
        monkeypatch.setattr(evaluator, "REWARD_FUNCTIONS", [unlucky])
    monkeypatch.setattr("records.run.plot_run", lambda path: None)  # takes longer than the run
    run = tmp_path / "run"
    status, *outputs = command(
        "--preset", "cpu", "--questions_per_step", "2", "--group_size", "2", "--num_train_iters",
        "1", "--eval_problems", "2", "--max_completion_length", "4", "--max_prompt_length", "400",
        "--cold_start_steps", "0", "--save_steps", "1", "--verbose", "--output_dir", run,
        "--model_name", saved_models["qwen2"],
    )  # fmt: skip
    assert status == (2 if reward == "unlucky" else 0)
    assert ("unlucky raised RuntimeError" in outputs[1]) == (reward == "unlucky")
    files = [path for path in run.rglob("*") if path.is_file()]
    assert (run / "config.json") in files
    assert not any(CANARY in output for output in outputs)
    assert not any(CANARY.encode() in file.read_bytes() for file in files)
