"""Every option of a run with its value and a comment: fgtrain train --info method=gauss_newton

The comments are in the files of conf/, after the keys. A comment on an argument of a `_target_` holds wherever that
class or function is configured, so it is written only once. A comment on another key holds for that key.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from fgtrain.runs.config import CONF

_ALWAYS = {"_target_": "called with the other keys", "_partial_": "the run adds arguments of its own"}
_WIDTH = 44

Name = tuple[str, ...]


def commented(text: str) -> str:
    """A configuration in YAML, as Hydra prints it, with a comment after every key that has one in conf/."""
    known = _comments()
    lines = text.splitlines()
    for number, names, _ in _keys(text):
        comment = next((known[name] for name in names if name in known), None)
        if comment:
            lines[number] = f"{lines[number]:<{_WIDTH}} # {comment}"
    return "\n".join(lines)


def groups() -> dict[str, list[str]]:
    """{group: its files} in conf/, without Hydra's own and those that only other files use."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        if not path.stem.startswith("_"):
            found.setdefault(path.parent.name, []).append(path.stem)
    return found


@cache
def _comments() -> dict[Name, str]:
    """{name of a key: its comment}."""
    found: dict[Name, str] = {(key,): comment for key, comment in _ALWAYS.items()}
    for path in [CONF / "train.yaml", *sorted(CONF.glob("*/*.yaml"))]:
        if path.parent.name == "experiment":  # comments there are about the values
            continue
        for _, names, comment in _keys(path.read_text(), path.parent.name if path.parent != CONF else ""):
            if comment:
                found.setdefault(names[0], comment)
    return found


def _keys(text: str, group: str = "") -> Iterator[tuple[int, list[Name], str]]:
    """The keys of a file: (number of the line, its names, its comment).

    The names of an argument of a class are (class, key) and its path; those of another key are its path.
    """
    package = re.search(r"^# @package (\S+)", text, re.MULTILINE)
    parent = package[1] if package else group
    base = tuple(parent.split(".")) if parent not in ("", "_global_") else ()
    tree = yaml.safe_load(text) or {}
    open_keys: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines()):
        match = re.match(r"( *(?:- )?)(?:override )?([\w/]+):(?:.*? # (.*)|.*)$", line)
        if match is None:
            continue
        indent = len(match[1])
        open_keys = [*(entry for entry in open_keys if entry[0] < indent), (indent, match[2])]
        path = tuple(key for _, key in open_keys)
        yield number, _names(tree, base, path), match[3] or ""


def _names(tree: Any, base: Name, path: Name) -> list[Name]:
    if path[-1] in _ALWAYS:
        return [path[-1:]]
    if path[0] == "defaults":  # names a group
        return [path[1:]]
    for key in path[:-1]:
        tree = tree[key]
    target = [(tree["_target_"], path[-1])] if "_target_" in tree else []
    return [*target, base + path]
