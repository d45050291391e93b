"""The console: fgtrain COMMAND ..., or python -m fgtrain COMMAND ...

`torchrun -m fgtrain train ...` starts the processes of a run, as `torchrun scripts/train.py ...` does.
"""

import difflib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module

from fgtrain import __version__
from fgtrain.runs.ctrl_c import ctrl_c_named

COMMANDS = {
    "train": "train with any method; -m sweeps",
    "compare": "compare methods under equal conditions",
    "bench": "measure the time and memory of training steps",
    "online": "compare ways to learn on a stream",
    "profiles": "draw performance profiles on test functions",
    "calibrate": "compare methods in finding a simulator's parameters",
    "evaluate": "evaluate a checkpoint on a split of its data",
    "replay": "rebuild the weights of a run without its data",
}
"""What each module of fgtrain.commands does."""

HELP = f"""usage: fgtrain COMMAND ...

{"".join(f"  {name:<10}{what}{chr(10)}" for name, what in COMMANDS.items())}
fgtrain COMMAND --help describes a command. In a checkout, python scripts/COMMAND.py is the same.
eval "$(fgtrain train -sc install=bash)" lets the shell complete commands and the arguments of train."""
COMPLETION = {"-sc", "--shell-completion"}


@contextmanager
def _output_adapted() -> Generator[None]:
    """A context that prints characters which the terminal lacks as escapes.

    If nobody reads stdout any more, or its disk is full, the process ends with a status that says so.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # None: it was closed before the start
                sys.stdout.flush()
    except OSError as error:
        is_full = error.errno == errno.ENOSPC and error.filename is None
        if not is_full and not (isinstance(error, BrokenPipeError) and _nobody_reads()):  # not of stdout
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest is flushed there at exit
        if is_full:
            print(f"fgtrain: cannot write to stdout: {error.strerror}", file=sys.stderr)
        sys.exit(2 if is_full else 128 + signal.SIGPIPE)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has closed it, as `| head` does."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # poll always reports a closed reader
    return bool(poll.poll(0))


@_output_adapted()
def main() -> int:
    """Run the command that the command line names, and return the exit status."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(HELP)
    elif name == "--version":
        print(f"fgtrain {__version__}")
    elif COMPLETION & {name, *arguments}:
        return _complete(sys.argv[sys.argv[1] in COMMANDS :][1:])
    elif name in COMMANDS:
        sys.argv = [f"fgtrain {name}", *arguments]
        return run(name)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        print(f"fgtrain: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    return 0


@_output_adapted()
def run(name: str) -> int:
    """Run a command with the arguments in `sys.argv`, and return the exit status."""
    try:
        sys.path.append(os.getcwd())  # _target_ may name a module there
    except OSError as error:
        print(f"fgtrain: the current folder cannot be used ({error.strerror}); change to another one", file=sys.stderr)
        return 2
    try:
        with ctrl_c_named():
            import_module(f"fgtrain.commands.{name}").main()  # late: --help and mistakes need not wait for PyTorch
    except KeyboardInterrupt:
        print("fgtrain: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _complete(arguments: list[str]) -> int:
    """Complete the command, or by Hydra the arguments of train; the shell puts the whole line into COMP_LINE."""
    if not any(argument.startswith("query=") for argument in arguments):
        sys.argv = ["fgtrain", *arguments]
        return run("train")
    program, _, line = os.environ.get("COMP_LINE", "").partition(" ")
    command, space, line = line.lstrip().partition(" ")
    if not space:
        print(" ".join(name for name in COMMANDS if name.startswith(command)))
    elif command == "train":
        os.environ["COMP_LINE"] = f"{program} {line}"
        sys.argv = ["fgtrain", *arguments]
        return run("train")
    return 0


if __name__ == "__main__":
    sys.exit(main())
