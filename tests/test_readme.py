"""Every block of the README runs as it stands."""

import os
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fgtrain
from tests.test_own_config import PACKAGE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


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


SHORTENED = {"train": "trainer.max_steps=3 trainer.val_check_interval=3", "bench": "--rounds 1 --batch-sizes 8"}
"""What each script is given besides, because the README's own runs take minutes."""


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"^```\n(python scripts/.*?)^```", README, flags=re.DOTALL | re.MULTILINE))
def test_longer_commands(block, tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "my_package.py").write_text(PACKAGE)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    method = "# @package _global_\nmethod:\n  _target_: my_package.Doubled\nlr: 0.01\n"
    (tmp_path / "my_conf" / "method" / "my_method.yaml").write_text(method)
    (tmp_path / "my.txt").write_text("All work and no play makes a dull example. " * 200)
    for command in block.splitlines():
        script = command.split()[1].removeprefix("scripts/").removesuffix(".py")
        arguments = shlex.split(f"{command} {SHORTENED[script]}")[1:]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


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
    """What the README calls is public after its own imports, and every name that it has for something exists."""
    called, named = (set(re.findall(rf"(?<![\w/.])fgtrain(?:\.\w+)+{end}", README)) for end in (r"(?=\()", r"(?!\w)"))
    assert {"fgtrain.ForwardGradient", "fgtrain.directional_derivatives"} <= called
    assert "fgtrain.quality" in named
    imported = re.findall(r"^import fgtrain\.(\w+)", README, flags=re.MULTILINE)
    assert {name.split(".")[1] for name in called} <= {*fgtrain.__all__, *imported}
    for name in named:
        assert pydoc.locate(name), name
