"""Runs that are killed, suspended or lose their disk, as processes forked from a server with all imports."""

import contextlib
import errno
import gc
import multiprocessing
import multiprocessing.util
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor import codecache
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.utils import tensorboard

from fgtrain import data
from fgtrain.runs import cli, launch, run
from fgtrain.studies import hosts

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (cli, codecache, data, launch, run, tensorboard)  # codecache keeps PyTorch's headers where TMPDIR is now
PATIENCE = 600
"""Seconds after which a process counts as one that hangs: on a busy machine, its start alone takes a minute."""
_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir"}


class Started:
    """A script that runs in `folder`, in a separate session and with a separate temporary folder.

    Its output is in out.txt and err.txt.

    Args:
        folder: the folder, which is created.
        arguments: arguments of the command line.
        script: name of the script in scripts/.
        torchrun: options of torchrun, which then starts the script.
        disturb: called in the process with its folder before the script runs.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        script: str = "train",
        torchrun: Sequence[str] = (),
        disturb: Callable[[Path], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp())  # not in `folder`: the name of a socket has at most 107 characters
        weakref.finalize(self, shutil.rmtree, self.temporary, ignore_errors=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.kills", "tests.rank_jobs"])
        self.process: Any = context.Process(
            target=_run, args=(folder, self.temporary, dict(os.environ), script, arguments, torchrun, disturb)
        )
        self.process.start()
        self.session = self.process.pid

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit status; None if it still runs after the timeout."""
        self.process.join(seconds)
        return self.process.exitcode

    def wait_for(self, path: Path) -> None:
        """Return as soon as there is such a file."""
        began = time.monotonic()
        while not path.exists():
            assert time.monotonic() < began + PATIENCE, f"{path} is not written"
            assert self.process.exitcode is None, f"ended with {self.process.exitcode} without {path}: {self.err}"
            time.sleep(0.01)

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
            assert time.monotonic() < began + PATIENCE, self.processes()
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


def _run(
    folder: Path,
    temporary: Path,
    environment: dict[str, str],
    script: str,
    arguments: Sequence[str],
    torchrun: Sequence[str],
    disturb: Callable[[Path], None] | None,
) -> None:
    os.setsid()
    os.environ.clear()  # of the fork server, which a test may have started that sets a variable for itself
    os.environ |= environment | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)  # the fork server has read the environment before, and Lightning takes it for done
    tempfile.tempdir = None
    os.chdir(folder)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    gc.freeze()
    setattr(multiprocessing.util, "spawnv_passfds", _spawn_by_fork)
    if disturb is not None:
        disturb(folder)
    command = (str(ROOT / "scripts" / f"{script}.py"), *arguments)
    if torchrun:
        config, _, _ = config_from_args(parse_args([*torchrun, "--start-method=fork", *command]))
        elastic_launch(config, _script)(*command)
    else:
        _script(*command)


def _script(*command: str) -> None:
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


_spawn = multiprocessing.util.spawnv_passfds


def _spawn_by_fork(path: bytes, arguments: Sequence[Any], kept: Sequence[int]) -> int:
    """Start a Python of multiprocessing (a fork server, a rank) as a fork of this one, which has imported all.

    As a program of its own it would do so again, for seconds.
    """
    code = arguments[arguments.index("-c") + 1]
    if "resource_tracker" in code:  # which imports nothing
        return _spawn(path, arguments, kept)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2 and number not in kept:
                with contextlib.suppress(OSError):
                    os.close(number)
        sys.argv = ["-c", *arguments[arguments.index(code) + 1 :]]
        exec(code, {})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    finally:
        os._exit(status)


def enter_network(folder: Path, host: str) -> None:
    """Move the process into the network namespace of a host."""
    hosts.enter(host)


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
            if folder in path.parents:
                call(path, flags)

    sys.addaudithook(hook)


def wait_for_ranks(folder: Path, seconds: float) -> None:
    """Give ranks another time to end after a signal: twice as long as this from a SIGTERM on."""
    setattr(launch, "GRACE_SECONDS", seconds)


def lengthen_temporary(folder: Path) -> None:
    """Put temporary files into a folder whose name leaves no room for that of a socket."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / ("long" * 25))
    Path(tempfile.tempdir).mkdir()


def close_reader(folder: Path, number: int) -> None:
    """Make stdout (1) or stderr (2) a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)
