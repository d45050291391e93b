"""The command line: a user's mistake gives one line and a non-zero exit status, without a traceback."""

import argparse
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fgtrain.errors import Interrupted, JobFailed, disk_error
from fgtrain.runs.config import (
    CONF,
    drop_arguments_of_replaced_targets,
    name_targets,
    refuse_ignored_tangents,
    refuse_interpolation,
)
from fgtrain.runs.ctrl_c import ctrl_c_named
from fgtrain.runs.messages import USER_ERRORS, cannot_write, fail, one_line, silence_libraries
from fgtrain.runs.options import commented, groups
from fgtrain.runs.starters import is_follower
from fgtrain.runs.sweeps import ERROR_FILE, SweepTable

_HELP = ("-h", "--help", "--info")


def run_app(task: Callable[[DictConfig], Any], config_name: str, description: str = "") -> None:
    """Run `task` as a Hydra application. A search over configurations minimises its return value.

    `--info` prints the options instead, and `--help` the description before them. `HYDRA_FULL_ERROR=1` in the
    environment shows tracebacks.
    """
    silence_libraries()
    if is_follower():
        _follow()
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        _hydra_main(task, config_name, description)
        return
    composed = False

    def job(cfg: DictConfig) -> Any:
        nonlocal composed
        composed = True
        silence_libraries()  # a launcher may have started this process
        try:
            with ctrl_c_named():
                return task(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN and not isinstance(error, Interrupted):
                raise job_failed(error) from error  # the other jobs continue
            if isinstance(error, USER_ERRORS):
                fail(error)
            raise

    with _errors_raised(), _errors_as_lines(lambda: composed):
        refuse_interpolation(Path.cwd())
        with ctrl_c_named():
            _hydra_main(job, config_name, description)
        sys.stdout.flush()


def _follow() -> None:
    """Let rank 0 name the folder of the run, since the clock of this process may differ."""
    if {"-m", "--multirun"} & set(sys.argv):
        fail("a sweep starts the processes of its jobs itself; start it once, without torchrun or srun")
    sys.argv += ["hydra.output_subdir=null"]
    if not _names_run_dir(sys.argv):
        sys.argv += ["hydra.run.dir=."]


@contextmanager
def _errors_raised() -> Generator[None]:
    """A context in which Hydra raises errors instead of printing them, and a wrong option does not print the usage."""
    error_of_parsers = argparse.ArgumentParser.error
    setattr(argparse.ArgumentParser, "error", lambda _, message: fail(_usage(message)))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        SweepTable.close()
        setattr(argparse.ArgumentParser, "error", error_of_parsers)
        del os.environ["HYDRA_FULL_ERROR"]


@contextmanager
def _errors_as_lines(has_composed: Callable[[], bool]) -> Generator[None]:
    """A context whose errors end the process with one line, unless they are mistakes in code.

    Args:
        has_composed: whether Hydra has composed the configuration and called the task.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # `fgtrain.__main__` ends the process
    except JobFailed as error:
        for failed in sorted(error.sweep_dir.glob(f"*/{ERROR_FILE}")):
            print(f"fgtrain: job {failed.parent.name} failed: {failed.read_text().splitlines()[0]}", file=sys.stderr)
        fail(f"some jobs of {os.path.relpath(error.sweep_dir)} failed; the others are complete")
    except USER_ERRORS as error:
        fail(error)
    except KeyboardInterrupt:
        fail(Interrupted("interrupted", signal.SIGINT))
    except OSError as error:
        if disk_error(error) is None:
            raise
        fail(cannot_write(error))
    except Exception as error:
        if has_composed():
            raise
        # The error is from the YAML parser or Hydra, since no code of fgtrain has run yet.
        fail(one_line(error) or "the command line or a configuration file is malformed, and Hydra does not say where")


def _names_run_dir(arguments: list[str]) -> bool:
    """Whether a command line names the folder of the run, so that all processes know it."""
    named = [argument for argument in arguments if argument.startswith("hydra.run.dir=")]
    return bool(named) and "${" not in named[-1]


def job_failed(error: Exception) -> JobFailed:
    """Write the reason of a failure into the job's folder: the job may have run in another process."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = one_line(error) or type(error).__name__
    if not isinstance(error, USER_ERRORS):
        text = f"{type(error).__name__}: {text}\n{''.join(traceback.format_exception(error))}"
    (run_dir / ERROR_FILE).write_text(f"{text}\n")
    return JobFailed(text, run_dir.parent)


def _usage(message: str) -> str:
    """A message of argparse, with a hint on the order of options."""
    if option := re.search(r"unrecognized arguments: --([\w.]+=\S*)", message):
        return f"--{option[1]} is not an option; write {option[1]}, without dashes"
    hint = "; put options such as -m or --config-dir before or after all key=value, not between them"
    return message + hint * message.startswith("unrecognized")


def _overrides() -> list[str]:
    """The key=value arguments as typed; a ${...} in them stays unresolved."""
    found = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(found, list)
    return [str(override) for override in found]


def _hydra_main(task: Callable[[DictConfig], Any], config_name: str, description: str) -> None:
    def job(cfg: DictConfig) -> Any:
        refuse_ignored_tangents(cfg, _overrides())
        kept = drop_arguments_of_replaced_targets(cfg, _overrides())
        if kept and not is_follower():
            reason = "kept from the chosen file, since the new _target_ has no default"
            print(f"fgtrain: {reason}: {', '.join(kept)}", file=sys.stderr)
        return task(cfg)

    if "--resolve" in sys.argv and not any(argument.startswith("run_dir=") for argument in sys.argv):
        sys.argv.append("run_dir=RUN_DIR")  # a configuration that is only shown has no folder

    main = hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(job)
    asked = {*_HELP} & {*sys.argv}
    if not asked:
        main()
        return
    if {"-m", "--multirun"} & {*sys.argv}:
        fail(f"{asked.pop()} describes one run; leave out -m and give each key one value")
    sys.argv = [*(argument for argument in sys.argv if argument not in asked), "--cfg", "job"]
    with redirect_stdout(io.StringIO()) as composed:
        main()
    if asked != {"--info"}:
        files = "".join(f"  {group}={', '.join(names)}\n" for group, names in groups().items())
        print(f"{description}\nFiles of the groups:\n{files}\nOptions, with the values of this command line:\n")
    print(commented(composed.getvalue()))


def choices() -> dict[str, str]:
    """The chosen file of every group, or the `_target_` that the command line gives instead."""
    return name_targets(HydraConfig.get().runtime.choices, _overrides())
