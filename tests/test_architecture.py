"""The house: which modules stand on top, which rooms there are, and who may import whom."""

import ast
import subprocess
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

# Top down. A module imports from its own floor's folder or from a lower floor, lazily too.
FLOORS = (
    ("main", "plotter"),
    ("launch",),
    ("records",),
    ("evaluation",),
    ("sampling",),
    ("llms", "tasks"),
    ("vision",),
    ("training",),
    ("evaluator", "rldatasets"),
    ("grpo", "reading"),
    ("utils",),
)
FLOOR = {room: height for height, rooms in enumerate(reversed(FLOORS)) for room in rooms}
SCRIPTS = {"main", "grpo", "llms", "rldatasets", "evaluator", "utils", "plotter"}
FOLDERS = {
    "sampling", "training", "evaluation", "records", "launch", "tasks", "vision", "reading",
}  # fmt: skip
LONGEST = 400  # lines
ALONE = {  # what these may import of the project, and of others
    "grpo": {"torch"},
    "evaluator": set(),
}
STANDARD = {"__future__", "dataclasses", "decimal", "fractions", "functools", "math", "re"}


def project(root=ROOT):
    """{module: path} of the project's own modules, tests and benchmarks aside."""
    files = [
        *root.glob("*.py"),
        *(path for folder in FOLDERS for path in root.glob(f"{folder}/*.py")),
    ]
    names = {path: path.relative_to(root).with_suffix("").as_posix() for path in files}
    return {name.replace("/", ".").removesuffix(".__init__"): path for path, name in names.items()}


@cache
def imports(source):
    """The import statements of a module's text, wherever they stand."""
    return [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]


def imported(path, modules):
    """(line, module) for every import of the project in a file."""
    for node in imports(path.read_text(encoding="utf-8")):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in submodules]
        yield from ((node.lineno, name) for name in names if name in modules)


def faults(root=ROOT):
    """What is wrong with the house at `root`, as lines."""
    modules = project(root)
    stray = {name for name in modules if "." not in name and name not in SCRIPTS | FOLDERS}
    yield from (f"{name}: stands at the top level and is not on the list" for name in sorted(stray))
    arrows = {}
    for name, path in modules.items():
        if name in stray:
            continue
        room = name.partition(".")[0]
        for line, target in imported(path, modules):
            other = target.partition(".")[0]
            arrows.setdefault(name, set()).add(target)
            if other in stray or (other != room and FLOOR[other] >= FLOOR[room]):
                yield f"{path.relative_to(root)}:{line}: imports {target}, which is not below it"
    yield from circles(arrows)


def circles(arrows):
    """Modules that import each other, directly or around corners. arrows: {module: modules}."""
    done = set()

    def walk(name, way):
        if name in way:
            yield "a circle: " + " -> ".join([*way[way.index(name) :], name])
        elif name not in done:
            for target in sorted(arrows.get(name, ())):
                yield from walk(target, [*way, name])
            done.add(name)

    for name in sorted(arrows):
        yield from walk(name, [])


def test_nobody_imports_upward_or_in_a_circle_and_nothing_stands_about():
    assert list(faults()) == []


def test_the_top_level_holds_what_the_list_says():
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.split("\n")  # fmt: skip
    top = {Path(name).parts[0] for name in tracked if name and (ROOT / name).exists()}
    files = {f"{name}.py" for name in SCRIPTS} | {
        "README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml", "requirements.txt",
        "requirements-dev.txt", ".gitignore",
    }  # fmt: skip
    folders = FOLDERS | {"plots", "docs", "configs", "benchmarks", "findings", "tests", ".ci"}
    assert top <= files | folders
    assert {f"{name}.py" for name in SCRIPTS} | FOLDERS <= top


@pytest.mark.parametrize("room", sorted(FOLDERS))
def test_every_room_says_what_is_looked_for_in_it(room):
    assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))


@pytest.mark.parametrize(
    ("path", "line", "fault"),
    [
        ("grpo.py", "import utils\n", None),
        ("utils.py", "import grpo\n", "utils.py:1: imports grpo, which is not below it"),
        ("training/lora.py", "import llms\n", "training/lora.py:1: imports llms"),
        ("training/lora.py", "def f():\n    from sampling import groups\n",
         "imports sampling.groups"),
        ("sampling/decoder.py", "from records.run import Run\n", "imports records.run"),
        ("llms.py", "from tasks import load_task\n", "llms.py:1: imports tasks"),
        ("sampling/rollouts.py", "import sampling.groups\n",
         "sampling.rollouts -> sampling.groups"),
        ("training/extra.py", "import training.extra\n",
         "a circle: training.extra -> training.extra"),
        ("helpers.py", "x = 1\n", "helpers: stands at the top level"),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(path, line, fault, tmp_path):
    for name in [*SCRIPTS, *FOLDERS]:
        source = ROOT / (name if name in FOLDERS else f"{name}.py")
        files = source.glob("*.py") if name in FOLDERS else [source]
        for file in files:
            target = tmp_path / file.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            target.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    planted = tmp_path / path
    planted.write_text(line + (planted.read_text() if planted.exists() else ""))
    found = list(faults(tmp_path))
    assert found == [] if fault is None else any(fault in line for line in found), found


def test_no_module_is_longer_than_one_can_read():
    lengths = {name: len(path.read_text().splitlines()) for name, path in project().items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("module", sorted(ALONE))
def test_the_mathematics_and_the_rewards_stand_alone(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}  # fmt: skip
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= ALONE[module] | STANDARD


def test_imports_stand_at_the_top_with_no_code_between_them():
    """Lazy ones inside functions aside: they are what keeps the command line fast."""
    for name, path in project().items():
        body = ast.parse(path.read_text()).body[1:]  # after the docstring
        places = [i for i, node in enumerate(body) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert places == list(range(len(places))), name
