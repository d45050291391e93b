"""Checkpoints on disk: written whole or not at all, read without running code, refused when damaged."""

import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from fgtrain.errors import CheckpointError
from fgtrain.estimators import GradientEstimator
from fgtrain.lightning.atomic_files import atomically, make_folder, save_atomically
from fgtrain.schedulers import some_length

NAMES = ("last.ckpt", "previous.ckpt")
PARTS = ("state_dict", "optimizer_states", "loops", "pytorch-lightning_version")  # required to continue a run


def read_checked(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU. It cannot run code: only tensors and plain values are read.

    Raises:
        CheckpointError: the file is truncated, altered, or not a checkpoint.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path} is not a checkpoint but a pipe or a device")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise CheckpointError(f"{path} is not a checkpoint: it unpacks to more bytes than it has")
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: {damaged} has another checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not named parts")
        return content
    except CheckpointError:
        raise
    except Exception as error:  # a zip archive can be broken in many ways
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged or not a checkpoint ({reason})") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints from which a run can continue, latest first, in its folder or in its folder of checkpoints."""
    return [path for place in (folder / "checkpoints", folder) for name in NAMES if (path := place / name).exists()]


def first_good(paths: list[Path]) -> Path:
    """The first undamaged checkpoint; damaged ones before it are named on stderr.

    Raises:
        CheckpointError: all are damaged.
    """
    refused = []
    for path in paths:
        if path.is_dir():  # sharded: checked by its own reader
            return path
        try:
            read_checked(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            for message in refused:
                print(f"fgtrain: {message}; continuing from {path}", file=sys.stderr)
            return path
    raise CheckpointError("; ".join(refused) + "; no other checkpoint is left")


def refuse_incomplete(checkpoint: Mapping[str, Any], path: Any) -> None:
    """Raise unless a checkpoint holds the whole state of a run, not only its weights.

    Raises:
        CheckpointError: the message names the missing parts.
    """
    missing = [part for part in PARTS if part not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{path} is not a checkpoint from which a run can continue: it has no {', '.join(missing)}"
        )


def refuse_foreign(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Raise unless the weights of a checkpoint have the names and shapes of those of `module`.

    Raises:
        CheckpointError: the message names the first difference.
    """
    saved = checkpoint["state_dict"]
    for path, part in list(module.named_modules()):
        if isinstance(part, GradientEstimator):
            part.make_room({n.removeprefix(f"{path}."): t for n, t in saved.items() if n.startswith(f"{path}.")})
    own = module.state_dict()
    for name in sorted(saved.keys() | own.keys()):
        if name not in saved or name not in own:
            where = "the checkpoint" if name in saved else "this run's model or method"
            raise CheckpointError(f"the checkpoint is of another run: {name} is only in {where}")
        if getattr(saved[name], "shape", None) != getattr(own[name], "shape", None):
            shapes = f"{tuple(saved[name].shape)} in the checkpoint and {tuple(own[name].shape)} in this run"
            raise CheckpointError(f"the checkpoint is of another run: {name} is {shapes}")


def refuse_unclaimed(checkpoint: Mapping[str, Any], callbacks: Iterable[Callback]) -> None:
    """Raise if a checkpoint holds the state of a callback that the run lacks: best scores, patience, a log.

    Raises:
        CheckpointError: the message names the callback.
    """
    own = {callback.state_key for callback in callbacks} | {"Timer"}  # of trainer.max_time, which may change
    left = sorted(checkpoint.get("callbacks", {}).keys() - own)
    if left:
        raise CheckpointError(
            f"the checkpoint holds the state of {', '.join(left)}, which this run lacks; give it the callbacks it "
            "began with (callbacks=...)"
        )


def machine(device: torch.device) -> dict[str, str]:
    """The software and hardware on which the last bits of a run depend."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": str(torch.__version__), "device": name, "threads": str(torch.get_num_threads())}


def name_other_machine(checkpoint: Mapping[str, Any], device: torch.device) -> None:
    """Warn on stderr if a checkpoint was written on other hardware or by another version, which may change bits."""
    own, saved = machine(device), checkpoint.get("machine", {})
    other = [f"{name} {saved[name]}, not {own[name]}" for name in own if saved.get(name, own[name]) != own[name]]
    if other:
        print(f"fgtrain: the checkpoint was written with {'; '.join(other)}: the last bits may differ", file=sys.stderr)


def carry_over(checkpoint: Mapping[str, Any], callbacks: Iterable[Callback], origin: Path, writes: bool) -> None:
    """Copy the best checkpoints so far into the folder of a resumed run, keep their scores and use its own patience.

    Args:
        checkpoint: the resumed checkpoint; its ModelCheckpoint states are changed to the paths of this run.
        callbacks: the callbacks of the run.
        origin: the file of the checkpoint; the best ones are expected in its folder, wherever they were written.
        writes: whether this process copies them.
    """
    for callback in callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state is not None and isinstance(callback, EarlyStopping):
            state["patience"] = callback.patience
        if state is None or not isinstance(callback, ModelCheckpoint) or state["dirpath"] == callback.dirpath:
            continue

        def moved(path: str, folder: Path = Path(callback.dirpath or ".")) -> str:
            source, target = origin.parent / Path(path).name, folder / Path(path).name
            if path and writes and source.is_file() and source.resolve() != target.resolve():
                make_folder(folder)
                atomically(target, lambda file: file.write(source.read_bytes()))
            return str(target) if path else path

        state |= {name: moved(state[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
        state["dirpath"] = callback.dirpath


def refuse_other_optimizer(
    saved: Mapping[str, Any], own: Optimizer, make_scheduler: Callable[..., Any] | None = None
) -> None:
    """Raise unless the settings in an optimizer's saved state, which would replace those of `own`, are the same.

    Settings that the scheduler changes during a run are not compared, such as the momentum under OneCycleLR.

    Raises:
        CheckpointError: the message names the first difference.
    """
    at_start = [dict(group) for group in own.param_groups]
    if make_scheduler is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch misses the step of the optimizer
            make_scheduler(own, **some_length(make_scheduler)).step()
    for before, start, group in zip(saved["param_groups"], at_start, own.param_groups, strict=False):
        asked = {name: value for name, value in start.items() if name not in ("params", "lr") and group[name] == value}
        if "initial_lr" in before:  # the scheduler's start; without a scheduler lr may have changed
            asked["initial_lr"] = group.get("initial_lr", start["lr"])
        if before.keys() - group.keys() - {"initial_lr"} and asked.keys() - before.keys():
            raise CheckpointError(f"the checkpoint is of another run: its optimizer was not {type(own).__name__}")
        for name in sorted(asked.keys() & before.keys()):
            if before[name] != asked[name]:
                raise CheckpointError(
                    f"the checkpoint is of another run: {name.removeprefix('initial_')} of its optimizer is "
                    f"{before[name]}, but {asked[name]} in this run; a run must keep the settings it began with"
                )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints, made safe against a crash at any moment.

    A checkpoint is written to a temporary file, flushed to the disk and renamed, so its name always means a complete
    file. Its folder is made only once: if it is moved away during a run, it is not made again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        folder = Path(path).parent
        if folder not in self._folders:
            make_folder(folder)
            self._folders.add(folder)
        save_atomically(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = read_checked(Path(path))
        refuse_incomplete(checkpoint, path)
        return checkpoint


def make_atomic(strategy: Strategy) -> None:
    """Make a strategy that writes checkpoints as one file write them atomically."""
    if not isinstance(strategy, ModelParallelStrategy):  # it accepts no other reader and writer
        strategy.checkpoint_io = AtomicCheckpointIO()
