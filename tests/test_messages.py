"""The library's messages name arguments of Python; the command line names its options."""

import ast
import re

import pytest
import yaml

from fgtrain.errors import ConfigError
from fgtrain.runs.config import CONF
from fgtrain.runs.messages import one_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("too many; chunk_size=4 takes fewer", "too many; method.chunk_size=4 takes fewer"),
        ("lower lr (clip_derivative=...)", "lower lr (method.clip_derivative=...)"),
        ("stopped; ckpt_path=run/last.ckpt continues", "stopped; resume=run/last.ckpt continues"),
        ("no; use method.num_tangents=2", "no; use method.num_tangents=2"),
        ("no; use my_memory=2", "no; use my_memory=2"),
        ("no;\n use LowRank", "no; use LowRank (LowRank is tangents=low_rank)"),
        ("no; use fgtrain.models.MLP", "no; use fgtrain.models.MLP (MLP is model=mlp)"),
    ],
)
def test_remedies_are_options_of_the_command_line(message, line):
    assert one_line(ConfigError(message)) == line


def test_other_errors_are_quoted():
    assert one_line(RuntimeError("chunk_size=4\nLowRank")) == "chunk_size=4 LowRank"


def test_methods_have_these_options():
    keys = {key for path in CONF.glob("method/*.yaml") for key in yaml.safe_load(path.read_text()).get("method", {})}
    names = ("chunk_size", "clip_derivative", "exact_head", "memory", "num_tangents", "shrinkage")
    assert keys.issuperset(names)
    assert all(one_line(ConfigError(f"{name}=1")) == f"method.{name}=1" for name in names)


def test_the_library_names_no_option_of_the_command_line():
    """Its messages are also read by those who convert a module or write a loop of their own."""
    groups = "|".join(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    option = re.compile(rf"(?<![\w.])({groups})(\.\w+)*=[\w.]")
    found = []
    for part in ("estimators", "forward_ad", "layer_noise", "network", "tangents"):
        for path in (CONF.parent / "fgtrain" / part).rglob("*.py"):
            raised = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
            texts = [text.value for node in raised for text in ast.walk(node) if isinstance(text, ast.Constant)]
            found += [(path.name, text) for text in texts if isinstance(text, str) and option.search(text)]
    assert found == []
