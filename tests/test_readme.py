"""Every block of the README and of the results' README runs unchanged, and every link has a target."""

import os
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fgtrain
from tests.commands import PACKAGE
from tests.idx_files import write_mnist
from tests.kills import Started

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "scripts" / "results" / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_in_their_order():
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("command", [block for block in blocks("bash") if "pip install" not in block])
def test_commands(command, tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("results.json"))


SHORTENED = {
    "train": "trainer.max_steps=3 trainer.val_check_interval=3 "
    "trainer.limit_val_batches=1 trainer.limit_test_batches=1",
    "bench": "--rounds 1 --batch-sizes 8",
    "compare": "seeds=1 budget=3steps",
    "profiles": "--evaluations 10",
    "calibrate": "--eager --trajectories 8 --steps 2 --starts 1 --seconds 0.1 --memory-steps 20",
    "online": "--lags 5 --lengths 20 --updates 2",
}
"""Additional arguments of each script, because the original commands take minutes to hours."""

SWEPT = {
    r"(method|seed|model\.groups|method\.iterations)=(\w+),[\w,]+": r"\1=\2",
    r"methods=\[(\w+,\w+),[\w,:=]+\]": r"methods=[\1]",
    r"--num-tangents 1( \d+)+": "--num-tangents 1",
    r"--models (mlp cnn|resnet18 vit_b_16)": "--models digits_mlp",
    r" --(rounds|batch-sizes)( \d+)+": "",
    r"deep8 deep24 deep64": "deep8",
    r"experiment=(\w+_digits)": r"experiment=\1 data.batch_size=8",
    r"data=mnist_subset": "data=mnist data.root=mnist_5k",
}
"""Sweeps, and replacements with fewer values or with data that need no further package."""


def longer_commands(text):
    """Except the one that tests/test_thin_wire.py runs, since it needs network namespaces."""
    found = re.findall(r"^```\n(python scripts/.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block.splitlines() for block in found if "--thin-wire" not in block]


def shortened(command):
    """(name of the script, its arguments)."""
    _, script, arguments = command.split(maxsplit=2)
    for swept, fewer in SWEPT.items():
        arguments = re.sub(swept, fewer, arguments)
    name = Path(script).stem
    return name, f"{arguments} {SHORTENED[name]}"


def blocks_that_differ():
    """The shortened commands of each block, without those that are the same as one before."""
    seen = set()
    for block in [*longer_commands(README), *longer_commands(RESULTS)]:
        commands = [command for command in dict.fromkeys(map(shortened, block)) if command not in seen]
        seen.update(commands)
        if commands:
            yield pytest.param(commands, id=block[0])


@pytest.mark.slow
@pytest.mark.parametrize("commands", list(blocks_that_differ()))
def test_longer_commands(commands, tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "my_package.py").write_text(PACKAGE)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    method = "# @package _global_\nmethod:\n  _target_: my_package.Doubled\nlr: 0.01\n"
    (tmp_path / "my_conf" / "method" / "my_method.yaml").write_text(method)
    write_mnist(tmp_path / "mnist_5k")
    for script, arguments in commands:
        run = Started(tmp_path, *shlex.split(arguments), script=script)
        assert run.wait() == 0, f"{script} {arguments}\n{run.err}"


@pytest.mark.parametrize("path", ["README.md", "scripts/results/README.md"])
def test_links_lead_to_something(path):
    text = (ROOT / path).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link


def test_set_up_is_two_commands():
    first, second, *_ = blocks("bash")
    assert first == "pip install -e . && python scripts/train.py method=fwdgrad\n"
    assert second == 'pip install -e ".[test]" && pytest\n'


@pytest.mark.parametrize("group", ["method", "tangents"])
def test_tables_list_every_choice(group):
    choices = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    header = f"| {group} |"
    table = README[README.index(header) :].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == choices


def test_public_names_exist():
    """Functions that the README calls are public after its own imports, and every name in it exists."""
    called, named = (set(re.findall(rf"(?<![\w/.])fgtrain(?:\.\w+)+{end}", README)) for end in (r"(?=\()", r"(?!\w)"))
    assert {"fgtrain.ForwardGradient", "fgtrain.directional_derivatives"} <= called
    assert "fgtrain.quality" in named
    imported = re.findall(r"^import fgtrain\.(\w+)", README, flags=re.MULTILINE)
    assert {name.split(".")[1] for name in called} <= {*fgtrain.__all__, *imported}
    for name in named:
        assert pydoc.locate(name), name
