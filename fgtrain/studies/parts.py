"""The finished parts of a study, kept in a file so that the same command goes on after an interruption."""

import argparse
import json
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from fgtrain.errors import ConfigError, Interrupted
from fgtrain.lightning.atomic_files import make_folder, write_atomically

Part = TypeVar("Part", bound=NamedTuple)


class Parts:
    """A context that keeps parts in a file. The file is named after the arguments other than `out`.

    The file is removed if the context ends without an error.

    Args:
        args: the arguments of the command; `out` is the folder of the file.

    Raises:
        Interrupted: Ctrl-C; the message says what is kept and where.
        StorageError: the folder cannot be written.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        make_folder(args.out)
        asked = json.dumps(vars(args) | {"out": None}, sort_keys=True)
        self.path: Path = args.out / f"unfinished-{sha256(asked.encode()).hexdigest()[:8]}.json"
        try:
            self.found = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError as error:
            raise ConfigError(f"{self.path} is damaged; delete it, and the same command starts anew") from error

    def __call__(self, kind: type[Part], name: str, make: Callable[[], Part]) -> Part:
        """The part of this name: made now and kept, or read if an earlier call has made it."""
        if name not in self.found:
            self.found[name] = make()
            write_atomically(json.dumps(self.found), self.path)
        return kind(*self.found[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.path.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt) and self.found:
            kept = f"stopped; the {len(self.found)} finished parts are kept in {self.path}"
            raise Interrupted(f"{kept}, and the same command goes on", signal.SIGINT) from error
