"""Imports point downwards: storeys are in the order of the data flow, and lower ones do not depend on higher ones."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fgtrain"
STOREYS = [
    {"commands"},
    {"studies"},
    {"runs"},
    {"lightning"},
    {"distributed", "self_check"},
    {"estimators"},
    {"layer_noise", "tasks"},
    {"forward_ad"},
    {"tangents"},
    {"models", "data"},  # what a configuration names
    {"network"},
    {"agreement", "errors", "figures", "memory", "quality", "random", "schedulers", "_torch"},
]
"""From the top. A module imports its own storey's part and what stands below."""

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file):
    """(module, whether outside functions) of every import."""
    tree = ast.parse(file.read_text())
    in_functions = {
        node for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in ast.walk(f)
    }
    for node in ast.walk(tree):
        at_top = node not in in_functions
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, at_top
        elif isinstance(node, ast.Import):
            yield from ((name.name, at_top) for name in node.names)


def part(module):
    """The first name below fgtrain."""
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_a_storey():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} == set().union(*STOREYS)


def test_the_wheel_holds_every_folder():
    packages = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(file.parent.relative_to(PACKAGE.parent).parts) for file in PACKAGE.rglob("__init__.py")}
    assert packages == sorted(folders | {"fgtrain.conf"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in {"__init__", "__main__"}:
        return  # they stand above all parts
    level = next(i for i, storey in enumerate(STOREYS) if own in storey)
    allowed = {own}.union(*STOREYS[level + 1 :])
    for module, _ in imported(file):
        if module.split(".")[0] == "fgtrain":
            assert part(module) in allowed, f"{module} is not below {own}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_below_lightning_nothing_knows_it(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in {"commands", "studies", "runs", "lightning", "data"}:  # data modules are Lightning's
        return
    names = {module.split(".")[0] for module, _ in imported(file)}
    assert not names & {"hydra", "omegaconf", "lightning"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_import_is_hidden_in_a_function(file):
    """One of fgtrain's own would hide a circle; three take seconds and are late on purpose."""
    hidden = {module for module, at_top in imported(file) if not at_top and module.split(".")[0] == "fgtrain"}
    assert hidden <= {"fgtrain.forward_ad.compiled", "fgtrain.forward_ad.compiled_steps", "fgtrain.runs.launch"}


def test_the_library_loads_no_runner():
    code = "import sys, fgtrain; print(sorted({'hydra', 'lightning', 'matplotlib', 'sklearn'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_test_files_share_helpers_by_modules_of_their_own():
    """A test file that imports from another one would run with its fixtures and break with its changes."""
    for file in Path(__file__).parent.glob("*.py"):
        assert not [module for module, _ in imported(file) if module.split(".")[-1].startswith("test_")], file.name
