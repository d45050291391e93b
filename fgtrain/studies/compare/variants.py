"""The methods of a comparison: a file in conf/method, and arguments that a variant changes."""

import re
from typing import NamedTuple

from fgtrain.errors import ConfigError


class Variant(NamedTuple):
    """One of the compared methods.

    Args:
        label: as typed, such as "fwdgrad" or "fwdgrad_lowrank:num_tangents=8".
        file: its file in conf/method.
        changes: arguments of the method that differ from the file, as key=value.
    """

    label: str
    file: str
    changes: list[str]

    @property
    def folder(self) -> str:
        """The name of the folder of its runs."""
        return re.sub(r"[^\w.=+-]", "-", self.label)

    @property
    def overrides(self) -> list[str]:
        """Its arguments of scripts/train.py."""
        return [f"method={self.file}", *(f"++method.{change}" for change in self.changes)]


def variant_of(label: str) -> Variant:
    """The variant that a label names: a file, then, after a colon, key=value joined by +.

    Raises:
        ConfigError: the label is malformed.

    >>> variant_of("highway:chunk_size=16+blocks=null").overrides
    ['method=highway', '++method.chunk_size=16', '++method.blocks=null']
    """
    file, colon, text = label.partition(":")
    changes = re.split(r"\+(?=[\w.]+=)", text) if colon else []
    if not all(re.fullmatch(r"[\w.]+=.+", change) for change in changes):
        raise ConfigError(
            f"methods: {label} is not a method's file and, after a colon, its arguments joined by +, such as "
            "fwdgrad_lowrank:num_tangents=8+shrinkage=false"
        )
    if any(change.startswith("_target_=") for change in changes):
        raise ConfigError(
            f"methods: {label} changes the class of {file}; write a file with _target_ and lr into the folder method "
            "of your own configurations, and give that folder's parent with --config-dir"
        )
    return Variant(label, file, changes)
