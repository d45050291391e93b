"""The undocumented part of Hydra that fgtrain uses.

tests/test_private_api.py shows whether a new release breaks it.
"""

import sys
from typing import Any

from hydra._internal.hydra import Hydra

_composed_mode = Hydra.get_mode


def compose_once() -> None:
    """Spare a run one of its two compositions of the configuration, 0.3 seconds.

    Hydra makes the first one only to look for `hydra.mode`. No file of conf/ sets it, so the options decide (-m or
    not), unless an argument or the user's own configuration files may set it.
    """
    setattr(Hydra, "get_mode", _mode)


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    options = {argument for argument in sys.argv[1:] if argument.startswith("-")} - {"-m", "--multirun"}
    if options or any("hydra.mode" in each or "hydra.searchpath" in each for each in overrides):
        return _composed_mode(hydra, config_name, overrides)
    return None
