"""Messages to the user: one line for a mistake, and no warnings that libraries address to each other."""

import argparse
import logging
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import yaml
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from fgtrain.errors import StorageError, UserError, disk_error
from fgtrain.runs.config import CONF
from fgtrain.runs.options import groups
from fgtrain.runs.suggestions import for_file, for_key

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException)
_OPTIONS = {
    "ckpt_path": "resume",
    **{
        name: f"method.{name}"
        for name in ("chunk_size", "clip_derivative", "exact_head", "memory", "num_tangents", "shrinkage")
    },
}
"""{argument in Python that a message may name in its remedy: the option on the command line}."""

_TYPES = {"Float": "a number", "Integer": "an integer", "Boolean": "true or false"}

_CHATTER = (
    ".*LeafSpec.*",
    ".*torch.jit.script.*",
    "The number of training batches",
    "Using ModelCheckpoint",
    "Total length of .* is zero",  # FirstBatch reports it
    "You defined a `validation_step` but have no `val_dataloader`",  # FirstBatch reports it
    "You're using the WeightAveraging callback with a model that overrides",  # the layers of EstimatorModule exist
    "The dirpath has changed",  # a run was resumed in another folder
    "Checkpoint directory .* exists",  # or in its own folder
)


def silence_libraries() -> None:
    """Ignore what does not concern the user, and errors that the main thread reports as well."""
    for message in _CHATTER:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it reports what it raises as well
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it names every file of events that it reads
    threading.excepthook = _print_unless_of_the_disk


def _print_unless_of_the_disk(args: threading.ExceptHookArgs) -> None:
    """Skip disk errors of TensorBoard's writer thread: the next call that logs raises them again."""
    if args.exc_value is None or disk_error(args.exc_value) is None:
        threading.__excepthook__(args)


def cannot_write(error: OSError) -> StorageError:
    """The error that reports a disk error to the user."""
    return StorageError(f"cannot write {error.filename or 'to the disk'}: {error.strerror}")


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints one line for a mistake, instead of its usage."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help describes the arguments")


def plain_console(width: int = 0, *, stderr: bool = False) -> Console:
    """A console that prints brackets and colons of names as they are, not as markup or emoji.

    Args:
        width: the least number of columns, so that tables are not folded in a file or a narrow window.
        stderr: whether it prints on stderr.
    """
    console = Console(stderr=stderr, markup=False, emoji=False)
    console.width = max(console.width, width)
    return console


def tensorboard_command(folder: Path) -> str:
    """The line that says how to look at the curves in a folder."""
    return f"look at it: tensorboard --host 127.0.0.1 --logdir {shlex.quote(str(folder))}"


def fail(error: BaseException | str) -> NoReturn:
    """Print one line on stderr and exit with the error's status, or 2."""
    print(f"fgtrain: {one_line(error)}", file=sys.stderr)
    sys.exit(getattr(error, "exit_status", 2))


@contextmanager
def errors_as_lines(*others: type[Exception]) -> Generator[None]:
    """A context whose errors by users, of the disk and of the types `others` end the process with one line."""
    try:
        yield
    except (*USER_ERRORS, *others) as error:
        fail(error)
    except BrokenPipeError:
        raise  # `fgtrain.__main__` ends the process
    except OSError as error:
        if disk_error(error) is None:
            raise
        fail(cannot_write(error))


def on_the_command_line(text: str) -> str:
    """The command-line options for the classes named in a message's remedy; empty if it names none."""
    remedy = text.rpartition(";")[2]
    known = {"Replicas": "trainer=ddp"}
    for group in ("tangents", "method", "model"):
        for path in sorted((CONF / group).glob("*.yaml"), key=lambda path: -len(path.stem)):  # shortest name wins
            if target := re.search(r"_target_: fgtrain\.(?:models\.)?(\w+)$", path.read_text(), re.MULTILINE):
                known[target[1]] = f"{group}={path.stem}"
    found = [f"{name} is {option}" for name, option in known.items() if re.search(rf"\b{name}\b", remedy)]
    hint = f" ({', '.join(found)})"
    return hint if found and hint not in text else ""  # the launcher repeats a rank's message


def _group_without_file() -> str | None:
    """The group of conf/ that the command line sets to something other than names of its files."""
    for key, _, value in (argument.partition("=") for argument in sys.argv):
        if key in groups() and not isinstance(yaml.safe_load(value), (str, list)):
            return key
    return None


def one_line(error: BaseException | str) -> str:
    """The message of an error on one line, without Hydra's internal details."""
    text = str(error)
    cause = getattr(error, "__cause__", None)
    if isinstance(error, InstantiationException):
        key = re.search(r"full_key: (\S+)", text)
        text = f"{key.group(1)}: {cause}" if key and cause else text
        if "No supported gpu backend found" in text:
            text += " PyTorch sees no GPU: use trainer=cpu, or install the build of torch for your GPU"
    elif isinstance(error, OverrideParseException):
        reason = "; ".join(line for line in text.splitlines() if not line.startswith(("See ", "Error parsing")))
        remedy = "put a value with = or , or letters like ü in quotes: 'key=\"a=b\"'"
        if error.override is not None and "=" not in error.override.strip("="):
            remedy = "an argument is key=value, without spaces around ="
        text = f"{error.override!r} cannot be read ({reason}); {remedy}"
    elif several := re.match(r"Ambiguous value for argument '([^=]+)=(.*?)'\n", text):
        key, values = several.groups()
        text = f"{key} gets several values; -m runs one after the other, and {key}=[{values}] is one list"
    elif wrong := re.search(
        r"Value (.*) of type '\w+' could not be converted to (Float|Integer|Boolean)", f"{text} {cause}"
    ):
        key = re.search(r"(?:override \+*|full_key: )([\w.]+)", text)
        text = f"{key[1] if key else 'a value'} must be {_TYPES[wrong[2]]}, got {wrong[1]}"
    elif unknown := re.match(r"Could not override '(\S+)'", text):
        text = f"{unknown.group(1)} is not a key of the configuration; {for_key(unknown.group(1))}"
    elif plugin := re.match(r"In '.*': Could not find 'hydra/(sweeper|launcher)/(\w+)'", text):
        missing = f"hydra/{plugin.group(1)}={plugin.group(2)} is not installed"
        text = f'{missing}; pip install -e ".[sweeps]" installs optuna and joblib'
    elif missing_file := re.match(r"In '.*': Could not find '([\w/]+)/([^'/]+)'", text):
        text = re.sub(r"\nConfig search path:.*", "", text, flags=re.DOTALL).rstrip() + for_file(*missing_file.groups())
    elif text.startswith("Config group override must be a string or a list") and (group := _group_without_file()):
        names = groups()[group]
        out = f"{group}=none" if "none" in names else f"~{group}"
        text = f"{group} takes the name of a file: {', '.join(names)}; {out} leaves the group out"
    elif text.startswith("Config group override must be a string or a list"):
        text = "hydra is not one value: set its keys, such as hydra.run.dir=..."
    elif isinstance(error, HydraException) and cause and not text.startswith("In "):
        text = f"{text}: {cause}"
    text = re.sub(r"\nConfig search path:.*", "", text, flags=re.DOTALL)
    text = re.sub(r"\n\s*(full_key|object_type|reference_type)[:=].*", "", text)
    text = " ".join(text.split())
    if not isinstance(error, UserError):
        return text
    as_options = re.sub(rf"(?<![\w.-])({'|'.join(_OPTIONS)})=", lambda name: f"{_OPTIONS[name[1]]}=", text)
    return as_options + on_the_command_line(text)
