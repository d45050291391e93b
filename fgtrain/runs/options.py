"""Every option of a run with its value and a comment: fgtrain train --info method=gauss_newton

The comments are in the files of conf/ and of --config-dir, after the keys. A comment on an argument of a `_target_`
holds wherever that class or function is configured, so it is written only once. A comment on another key holds for
that key.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

from fgtrain.runs.config import CONF

_ALWAYS = {"_target_": "called with the other keys", "_partial_": "the run adds arguments of its own"}
_WIDTH = 44

Name = tuple[str, ...]


def commented(text: str) -> str:
    """A configuration in YAML, as Hydra prints it, with a comment after every key that has one in its files."""
    known = _comments(folders())
    lines = text.splitlines()
    for number, names, _ in _keys(text):
        comment = next((known[name] for name in names if name in known), None)
        if comment:
            lines[number] = f"{lines[number]:<{_WIDTH}} # {comment}"
    return "\n".join(lines)


def folders() -> tuple[Path, ...]:
    """The folders of configurations: conf/, and the one that --config-dir names on the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    own = parser.parse_known_args(sys.argv[1:])[0].config_dir
    return (CONF,) if own is None else (CONF, own)


def groups() -> dict[str, list[str]]:
    """{group: its files} in all folders, without Hydra's own and those that only other files use."""
    found: dict[str, list[str]] = {}
    for path in (path for folder in folders() for path in sorted(folder.glob("*/*.yaml"))):
        names = found.setdefault(path.parent.name, [])
        if not path.stem.startswith("_") and path.stem not in names:
            names.append(path.stem)
    return {group: names for group, names in found.items() if names}


@cache
def _comments(places: tuple[Path, ...]) -> dict[Name, str]:
    """{name of a key: its comment}."""
    found: dict[Name, str] = {(key,): comment for key, comment in _ALWAYS.items()}
    for path in (
        path for folder in places for path in (*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml")))
    ):
        if path.parent.name == "experiment":  # comments there are about the values
            continue
        with suppress(YAMLError):  # Hydra names the mistake if the file is chosen
            for _, names, comment in _keys(path.read_text(), path.parent.name if path.parent not in places else ""):
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
        tree = tree.get(key) if isinstance(tree, dict) else None  # a list, or text of several lines
    target = [(tree["_target_"], path[-1])] if isinstance(tree, dict) and "_target_" in tree else []
    return [*target, base + path]
