"""What a mistyped key or file of the command line may have meant."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from fgtrain.runs.config import CONF, TrainConfig
from fgtrain.runs.options import groups


def for_key(key: str) -> str:
    """The remedy for a key that the composed configuration lacks: another key, other files, or a + before it."""
    known = _known_keys()
    if files := known.get(key):
        return f"it belongs to {', '.join(sorted(files))}"
    ends = [name for name in known if name.rpartition(".")[2] == key]
    close = ends or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if close:
        return f"did you mean {close[0]}?"
    return "fgtrain train --info prints the keys" + f"; +{key}=... adds it, if the class there takes it" * ("." in key)


def for_file(group: str, name: str) -> str:
    """The end of the message for a missing file of a group; empty if no other one resembles it."""
    close = difflib.get_close_matches(name, groups().get(group, []), n=1)
    return f"; did you mean {group}={close[0]}?" if close else ""


def _known_keys() -> dict[str, set[str]]:
    """{key: the files that set it, as group=file} for all keys of the configuration files."""
    found: dict[str, set[str]] = {name: set() for name in TrainConfig.__annotations__}
    for path in CONF.rglob("*.yaml"):
        group = path.parent.relative_to(CONF).as_posix()
        if group.startswith("hydra"):
            continue
        text = path.read_text()
        prefix = "" if group == "." or "@package _global_" in text else f"{group}."
        for key in _keys(yaml.safe_load(text) or {}):
            if not key.startswith(("defaults", "hydra")):
                found.setdefault(prefix + key, set()).add(f"{group}={path.stem}")
    return found


def _keys(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{path}{key}.")
