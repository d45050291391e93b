"""Runs that are killed, suspended or lose their disk, as processes forked from a server with all imports."""

import errno
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils import tensorboard

from fgtrain import data
from fgtrain.runs import cli, launch, run

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (cli, data, launch, run, tensorboard)
_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir"}


class Started:
    """A script that runs in `folder`, in a separate session and with a separate temporary folder.

    Its output is in out.txt and err.txt.

    Args:
        folder: the folder, which is created.
        arguments: arguments of the command line.
        script: name of the script in scripts/.
        disturb: called in the process with its folder before the script runs.
    """

    def __init__(
        self, folder: Path, *arguments: str, script: str = "train", disturb: Callable[[Path], None] | None = None
    ) -> None:
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.folder = folder
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.kills"])
        self.process: Any = context.Process(target=_run, args=(folder, script, arguments, disturb))
        self.process.start()
        self.session = self.process.pid

    def wait(self, seconds: float = 120) -> int | None:
        """The exit status; None if it still runs after the timeout."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all its processes and wait for their end."""
        os.killpg(self.session, number)
        self.process.join()

    def processes(self) -> list[int]:
        """The live processes of its session."""
        return [pid for pid, (_, session, state) in _processes().items() if session == self.session and state != "Z"]

    def ranks(self, depth: int = 1) -> list[int]:
        """Wait for its two ranks, and return them in the order in which they were started.

        Args:
            depth: generations between the script and its ranks.
        """
        began = time.monotonic()
        while True:
            assert self.process.exitcode is None, self.err
            assert time.monotonic() < began + 120, self.processes()
            found, parents = _processes(), {self.session}
            for _ in range(depth):
                parents = {pid for pid, (parent, _, state) in found.items() if parent in parents and state != "Z"}
            if len(parents) == 2:
                return sorted(parents)
            time.sleep(0.005)

    @property
    def err(self) -> str:
        """Its output on stderr."""
        return (self.folder / "err.txt").read_text()


def _processes() -> dict[int, tuple[int, int, str]]:
    """{process: (its parent, its session, its state)}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it has just ended
            continue
        found[int(path.parent.name)] = int(parent), int(session), state
    return found


def _run(folder: Path, script: str, arguments: tuple[str, ...], disturb: Callable[[Path], None] | None) -> None:
    os.setsid()
    os.environ |= {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    tempfile.tempdir = None
    os.chdir(folder)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    gc.freeze()
    sys.argv = [str(ROOT / "scripts" / f"{script}.py"), *arguments]
    if disturb is not None:
        disturb(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")


def kill_at_change(folder: Path, name: str = "", count: int = 1, alone: bool = False) -> None:
    """Kill the process and its children by SIGKILL during a change to the folder of the run.

    A file that was just opened for writing is left empty.

    Args:
        folder: of the script.
        name: how the name of the file begins.
        count: of the changes to such files, in this process.
        alone: kills the process that makes the change, not its group.
    """
    left = count

    def change(path: Path, flags: int) -> None:
        nonlocal left
        if path.name.startswith(name):
            left -= 1
            if left == 0:
                if flags & os.O_TRUNC and path.exists():
                    os.truncate(path, 0)
                os.kill(os.getpid() if alone else 0, signal.SIGKILL)

    _before_changes(folder, change)


def read_only_once_saved(folder: Path) -> None:
    """Make all changes to the folder fail, as on a read-only file system, from the second checkpoint on."""

    def change(path: Path, flags: int) -> None:
        if (folder / "run" / "checkpoints" / "previous.ckpt").exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    _before_changes(folder, change)


def _before_changes(folder: Path, call: Callable[[Path, int], None]) -> None:
    """Call a function with the path and the open flags before anything below a folder is changed."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        changes = event in _CHANGES or flags & (os.O_WRONLY | os.O_RDWR)
        if changes and isinstance(arguments[0], (str, Path)):
            path = Path(arguments[0])  # one that is not absolute may be meant in a folder that is open
            if folder in path.parents and folder / "tmp" not in path.parents:
                call(path, flags)

    sys.addaudithook(hook)


def close_reader(folder: Path, number: int) -> None:
    """Make stdout (1) or stderr (2) a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)
