"""Checks of the first batch before training, and of a later one after an error."""

import sys
from collections.abc import Generator, Iterator, Set
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from fgtrain._torch import eager_functions, tree_flatten, tree_map
from fgtrain.data.in_memory import refuse_other_examples
from fgtrain.errors import ConfigError, DataError, ModelError, UserError
from fgtrain.estimators import GradientEstimator
from fgtrain.lightning.callbacks.monitor import LOGGED
from fgtrain.lightning.length import first_batch
from fgtrain.lightning.module import EstimatorModule
from fgtrain.memory import free_memory, is_out_of_memory
from fgtrain.network.parameters import trainable_params
from fgtrain.network.snapshot import Snapshot
from fgtrain.random import preserved_random_state
from fgtrain.tasks import Classification


class FirstBatch(L.Callback):
    """Refuses data that the model cannot be trained on, and reports values that are not finite.

    Before training, it takes the first batch from a separate loader. It checks the types, shapes and labels of the
    batch. Two examples of it go through the model, which shows whether the model accepts them, which metrics there are,
    and how large the outputs of layers are. So it can refuse a callback that waits for another metric, and directions
    that do not fit into memory. Nothing is changed.

    During training, it remembers the batch in progress. If a step fails, `bad_batches_named` compares this batch with
    the first one.

    Raises:
        DataError: there is no batch, or it has the wrong types, shapes or labels.
        ModelError: the model cannot take it.
        ConfigError: the directions alone do not fit into memory, or a callback waits for a metric that does not exist.
    """

    def __init__(self) -> None:
        self._form: list[Any] = []  # of the first batch
        self._current: tuple[Any, str] | None = None  # the batch in progress, and its name

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.datamodule is None:
            return
        assert isinstance(pl_module, EstimatorModule)
        free = free_memory(trainer.strategy.root_device)
        with preserved_random_state():
            batch = first_batch(trainer)
            if batch is None:
                raise DataError(
                    f"the training set of {type(trainer.datamodule).__name__} is empty: its loader yields no batch"
                )
            self._form = _form_of(batch)
            _check_validation(trainer)
            self._refuse_unclassifiable(batch, "the first batch", trainer)
            if type(trainer.precision_plugin) is Precision:
                _refuse_other_precision(batch, pl_module.model)
            _report_non_finite(trainer, batch)
            with eager_functions():  # two examples are not worth a compilation
                metrics, largest = _try_two_examples(trainer, pl_module, batch)
            refuse_unknown_monitors(trainer, {f"val/{name}" for name in metrics})
            refuse_too_many_directions(pl_module.estimator, pl_module.model, free, largest)

    def on_train_batch_start(self, trainer: Any, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._current = batch, f"batch {batch_idx} of epoch {trainer.current_epoch}"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._current = None

    def on_validation_batch_start(
        self, trainer: Any, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._current = batch, f"batch {batch_idx} of the validation"

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._current = None

    @contextmanager
    def bad_batches_named(self, trainer: Any) -> Generator[None]:
        """A context in which an error of a step is a DataError, if its batch is unlike the first one."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self._current is not None and not is_out_of_memory(error):
                batch, name = self._current
                try:
                    self._refuse_unclassifiable(batch, name, trainer)
                    self._refuse_other_form(batch, name)
                except DataError as reason:
                    raise reason from error
            raise

    def _refuse_unclassifiable(self, batch: Any, name: str, trainer: Any) -> None:
        data = trainer.datamodule
        if isinstance(trainer.lightning_module.task, Classification):
            known = getattr(data, "num_classes", None), getattr(data, "input_shape", None)
            refuse_unclassifiable(name, batch, *known)

    def _refuse_other_form(self, batch: Any, name: str) -> None:
        form = _form_of(batch)
        if form != self._form:
            raise DataError(
                f"{name} is unlike the first batch and cannot be used: it has {_in_words(form)}, the first one "
                f"{_in_words(self._form)}; correct or remove it"
            )


def _check_validation(trainer: Any) -> None:
    data = trainer.datamodule
    if trainer.limit_val_batches != 0 and trainer.is_global_zero:
        is_missing = not is_overridden("val_dataloader", data)
        loaders = None if is_missing else data.val_dataloader()
        if isinstance(loaders, (list, tuple, dict)) and len(loaders) > 1:
            raise DataError(
                f"val_dataloader of {type(data).__name__} returns {len(loaders)} loaders, but a run validates on one: "
                "join their data sets (torch.utils.data.ConcatDataset)"
            )
        if is_missing or (not isinstance(loaders, CombinedLoader) and sized_len(loaders) == 0):
            what = "missing (no val_dataloader)" if is_missing else "empty"
            print(f"fgtrain: the validation split of {type(data).__name__} is {what}", file=sys.stderr)


def _report_non_finite(trainer: Any, batch: Any) -> None:
    tensors = enumerate(_tensors(batch))
    bad = [i for i, leaf in tensors if leaf.is_floating_point() and not leaf.isfinite().all()]
    if bad and trainer.is_global_zero:
        print(f"fgtrain: part {bad[0]} of the first batch holds nan or infinity", file=sys.stderr)


def _try_two_examples(trainer: Any, module: EstimatorModule, batch: Any) -> tuple[list[str], int]:
    """Run two examples through the model, its loss and its metrics.

    Returns:
        The metrics' names, and the bytes of the largest output of a module for the whole batch, of those that depend on
        trained parameters; 0 if the method carries one direction at a time.
    """
    few = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)
    dtype = next((p.dtype for p in module.model.parameters() if p.is_floating_point()), torch.float32)
    if type(trainer.precision_plugin) is not Precision:  # it will convert batch and model later
        few = tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, few)
    before = Snapshot(module.model)
    try:
        carries_several = module.estimator.directions_at_a_time > 1
        with torch.set_grad_enabled(carries_several), _sizes_of_outputs(module.model) as sizes:
            module.task.losses(module.model, few)
        with torch.no_grad():
            metrics = list(module.task.metrics(module.model, few))
        return metrics, max(sizes, default=0) * _num_examples(batch) // _num_examples(few)
    except Exception as error:
        shapes = ", ".join(f"{tuple(leaf.shape)} {_dtype_name(leaf)}" for leaf in _tensors(few))
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(
            f"the model and its loss cannot take two examples of the data, {shapes}: {reason}; HYDRA_FULL_ERROR=1 "
            "shows the place"
        ) from error
    finally:
        before.restore()


def refuse_unclassifiable(name: str, batch: Any, num_classes: int | None, input_shape: Any) -> None:
    """Refuse a batch of classification that is not (inputs, labels) of the right types, shapes and classes.

    Raises:
        DataError: the message names the batch, what was found and what is expected.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
        raise DataError(
            f"{name} has {_describe(batch)}; a batch for classification must be (inputs, labels), two tensors"
        )
    inputs, labels = batch
    if labels.dtype not in (torch.int64, torch.uint8) or labels.dim() != 1:
        raise DataError(
            f"labels of {name} are {_dtype_name(labels)} of shape {tuple(labels.shape)}; classification needs class "
            "indices, int64 of shape (B,): labels.long()"
        )
    refuse_other_examples(name, inputs, labels, num_classes, input_shape)
    if int(labels.min()) < 0:
        raise DataError(f"labels of {name} start at {int(labels.min())}; they must not be negative")


def refuse_unknown_monitors(trainer: Any, validated: Set[str]) -> None:
    """Raise if early stopping or a checkpoint waits for a metric that a run will not have.

    A callback of the user may log anything; if there is one, nothing is refused.

    Raises:
        ConfigError: the message names the available metrics.
    """
    if any(not type(callback).__module__.startswith(("fgtrain.", "lightning.")) for callback in trainer.callbacks):
        return
    known = sorted({*validated, *LOGGED})
    for callback in trainer.callbacks:
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)):
            name = callback.monitor
            if name is not None and name not in known and not name.startswith("quality/"):
                raise ConfigError(
                    f"{type(callback).__name__}: monitor={name} is not a metric; there are {', '.join(known)}"
                )


def refuse_too_many_directions(
    estimator: GradientEstimator, model: nn.Module, available: int | None, largest_output: int = 0
) -> None:
    """Raise if the directions held in memory together, and their effect on one layer, need more than what is available.

    Args:
        estimator: says how many directions it holds together.
        model: the model.
        available: bytes; None if unknown.
        largest_output: bytes of the largest output of a layer, of which every direction has a derivative.

    Raises:
        ConfigError: the message says how many of them would fit.
    """
    at_a_time = estimator.directions_at_a_time
    one = estimator.direction_bytes(trainable_params(model)) + largest_output
    if available is not None and one * at_a_time > available:
        some = max(1, available // (4 * one))
        remedy = (
            f"chunk_size={some} processes them in parts"
            if hasattr(estimator, "chunk_size")
            else f"num_tangents={some} fit"
        )
        raise ConfigError(
            f"{at_a_time} directions of {one / 2**20:.3g} MiB each do not fit into the {available / 2**30:.3g} GiB of "
            f"free memory; {remedy}"
        )


def _refuse_other_precision(batch: Any, model: nn.Module) -> None:
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for leaf in _tensors(batch):
        if leaf.is_floating_point() and own and leaf.dtype not in own:
            raise DataError(
                f"the data gives {_dtype_name(leaf)}, but the model has {_dtype_name(next(iter(own)))} parameters; "
                "convert the data (inputs.float()), or train in its precision (trainer.precision=64-true)"
            )


@contextmanager
def _sizes_of_outputs(model: nn.Module) -> Generator[list[int]]:
    """A context that notes the bytes of all outputs of modules that autograd traces to a trained parameter."""
    sizes: list[int] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        sizes.extend(leaf.nbytes for leaf in _tensors(output) if leaf.requires_grad)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def _num_examples(batch: Any) -> int:
    """The first dimension of the first tensor that has one; 1 if there is none."""
    return next((len(leaf) for leaf in _tensors(batch) if leaf.dim() and len(leaf)), 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{len(batch)} parts ({', '.join(type(part).__name__ for part in batch)})"
    return f"the type {type(batch).__name__}"


def _form_of(batch: Any) -> list[Any]:
    """For every leaf of a batch its dtype and the shape of an example, or its type if it is no tensor."""
    return [
        (_dtype_name(leaf), tuple(leaf.shape[1:])) if isinstance(leaf, Tensor) else (type(leaf).__name__,)
        for leaf in tree_flatten(batch)[0]
    ]


def _in_words(form: list[Any]) -> str:
    return ", ".join(name + "".join(f" {shape}" for shape in shapes) for name, *shapes in form) or "nothing"


def _dtype_name(value: Tensor | torch.dtype) -> str:
    return str(getattr(value, "dtype", value)).removeprefix("torch.")
