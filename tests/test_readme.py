"""Every block of the README runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fgtrain

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
    for name in set(re.findall(r"fgtrain\.([A-Za-z_]+)", README)) - {"tasks", "lightning", "quality"}:
        assert hasattr(fgtrain, name), name
