"""What a user is told: one line for a mistake, and nothing that is libraries talking to each other."""

import re
import sys
import threading
import warnings
from typing import NoReturn

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from fgtrain.errors import StorageError, UserError
from fgtrain.lightning.checkpoints import disk_error
from fgtrain.runs.config import CONF

USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, MisconfigurationException)
_CHATTER = (
    ".*LeafSpec.*",
    ".*torch.jit.script.*",
    "The number of training batches",
    "Using ModelCheckpoint",
    "Total length of .* is zero",  # which FirstBatch tells
    "You defined a `validation_step` but have no `val_dataloader`",  # and that
    "The dirpath has changed",  # a run resumed in another folder
    "Checkpoint directory .* exists",  # or in its own
)


def silence_libraries() -> None:
    """Ignore the warnings that are libraries talking to each other, and what is told in the main thread as well."""
    for message in _CHATTER:
        warnings.filterwarnings("ignore", message)
    threading.excepthook = _print_unless_of_the_disk


def _print_unless_of_the_disk(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer is a thread; what it meets on the disk is raised again where something is logged next."""
    if args.exc_value is None or disk_error(args.exc_value) is None:
        threading.__excepthook__(args)


def cannot_write(error: OSError) -> StorageError:
    """What an error of the disk is to the user."""
    return StorageError(f"cannot write {error.filename or 'to the disk'}: {error.strerror}")


def fail(error: BaseException | str) -> NoReturn:
    """Print one line on stderr and exit with the error's status, or 2."""
    print(f"fgtrain: {one_line(error)}", file=sys.stderr)
    sys.exit(getattr(error, "exit_status", 2))


def on_the_command_line(text: str) -> str:
    """The remedy at the end of a message of the library, in words of the command line; nothing where it names none."""
    remedy = text.rpartition(";")[2]
    known = {"Replicas": "trainer=ddp"}
    for group in ("tangents", "method"):
        for path in sorted((CONF / group).glob("*.yaml"), key=lambda path: -len(path.stem)):  # the shortest name last
            if target := re.search(r"_target_: fgtrain\.(\w+)$", path.read_text(), re.MULTILINE):
                known[target[1]] = f"{group}={path.stem}"
    found = [f"{name} is {option}" for name, option in known.items() if re.search(rf"\b{name}\b", remedy)]
    hint = f" ({', '.join(found)})"
    return hint if found and hint not in text else ""  # a rank's message is told again by the process that started it


def one_line(error: BaseException | str) -> str:
    """The message of an error, folded to one line and freed of what concerns Hydra alone."""
    text = str(error)
    cause = getattr(error, "__cause__", None)
    if isinstance(error, InstantiationException):
        key = re.search(r"full_key: (\S+)", text)
        text = f"{key.group(1)}: {cause}" if key and cause else text
    elif isinstance(error, OverrideParseException):
        reason = "; ".join(line for line in text.splitlines() if not line.startswith(("See ", "Error parsing")))
        text = (
            f"{error.override!r} cannot be read ({reason}); a value with = or , in it stands in quotes: 'key=\"a=b\"'"
        )
    elif unknown := re.match(r"Could not override '(\S+)'", text):
        text = f"{unknown.group(1)} is no key of the configuration; --cfg job prints the keys there are"
    elif plugin := re.match(r"In '.*': Could not find 'hydra/(sweeper|launcher)/(\w+)'", text):
        missing = f"hydra/{plugin.group(1)}={plugin.group(2)} is not installed"
        text = f'{missing}; pip install -e ".[sweeps]" brings optuna and joblib'
    elif isinstance(error, HydraException) and cause and not text.startswith("In "):
        text = f"{text}: {cause}"
    text = re.sub(r"\nConfig search path:.*", "", text, flags=re.DOTALL)
    text = re.sub(r"\n\s*(full_key|object_type|reference_type)[:=].*", "", text)
    hint = on_the_command_line(text) if isinstance(error, UserError) else ""
    return " ".join(text.split()) + hint
