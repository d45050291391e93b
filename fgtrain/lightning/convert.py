"""Any LightningModule, trained with any estimator."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fgtrain._torch import is_wrapped
from fgtrain.distributed import Ranks, TangentsOver
from fgtrain.errors import CheckpointError, ConfigError, LossError
from fgtrain.estimators import Estimate, GradientEstimator, write_grads
from fgtrain.forward_ad.passes import LossFn
from fgtrain.lightning._lightning import compiler_of, current_hook
from fgtrain.lightning.divergence import Divergence
from fgtrain.lightning.observed import BACKWARD_CALLED, ObservedStep
from fgtrain.lightning.optimizers import step_together
from fgtrain.lightning.step import StepEstimates, estimate_for_step, scaler_of
from fgtrain.lightning.strategy import expect_no_backward

Module = TypeVar("Module", bound=L.LightningModule)


def convert(
    module: Module,
    estimator: GradientEstimator,
    *,
    seed: int = 0,
    distributed_tangents: TangentsOver = "shared",
    divergence: Divergence | None = None,
) -> Module:
    """Make a LightningModule train with gradients from `estimator`; nothing else changes.

    The module keeps its class (as a base), parameters, state_dict and hooks, and Lightning keeps optimizing it
    automatically. Only the call in which Lightning computes gradients is replaced. So schedulers,
    `Trainer(accumulate_grad_batches=..., gradient_clip_val=...)`, `configure_gradient_clipping` and callbacks work as
    usual, and with `Backprop()` the weights are those of plain Lightning, bit for bit; to rounding if several processes
    accumulate batches, as gradients are averaged after each batch.

    `training_step` is called as the loss function: once per batch by most estimators, several times by those that
    compare losses. Its logs, torchmetrics, the attributes it sets and the items it appends to lists of the module count
    once, and are stored as values without derivatives. The attributes of objects of your own classes that the module
    holds count once, too. A metric may be the loss. `training_step` must return a loss (or a dict with "loss", or None
    to skip the batch) and never call `.backward()`.

    A batch whose loss, derivative or gradient is not finite is skipped, as if training_step had returned None. Too many
    in a row end the run, and so does a loss that stays above 1000 times its lowest value, see `Divergence`. Several
    optimizers, which Lightning refuses under automatic optimization, all step on the same gradient.

    Args:
        module: changed in place. Converting it again replaces the estimator, even during training.
        estimator: the source of the gradients; its state is saved in the module's checkpoints.
        seed: the directions of a step are a function of (seed, optimizer step, micro-batch).
        distributed_tangents: whether the ranks share their directions, see `fgtrain.distributed`.
        divergence: checks the estimates; converting again without one keeps the current one.

    Returns:
        `module` itself.

    Raises:
        ConfigError: the arguments are not a LightningModule and an estimator, or the module uses manual optimization,
            defines `backward` or takes the data iterator.
    """
    if is_wrapped(module):
        raise ConfigError("convert takes an uncompiled module; compile the module that it returns")
    if any(base.__module__.startswith("pytorch_lightning.") for base in type(module).__mro__):
        raise ConfigError(
            f"{type(module).__name__} is a LightningModule of pytorch_lightning, and convert takes those of "
            "lightning.pytorch; replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl`, for the "
            "Trainer and callbacks too"
        )
    if not isinstance(module, L.LightningModule):
        raise ConfigError(
            f"convert takes a LightningModule, got a {type(module).__name__}; in a training loop of your own, call the "
            "estimator with the model and its loss"
        )
    if not isinstance(estimator, GradientEstimator):
        raise ConfigError(f"convert takes an estimator such as ForwardGradient(), got {estimator!r}")
    if not isinstance(module, _Converted):
        _require_hooks(module)
        setattr(module, "__class__", _converted_class(type(module)))
    before = module.__dict__.get("_fgtrain")
    step = ObservedStep(estimator, seed, distributed_tangents, _user_class(module).training_step, divergence)
    if before is not None:
        step.ranks, step.user_step = before.ranks, before.user_step
        step.divergence = divergence or before.divergence
    module.__dict__["_fgtrain"] = step
    return module


def _require_hooks(module: L.LightningModule) -> None:
    for hook in ("training_step", "configure_optimizers"):
        if not is_overridden(hook, module):
            raise ConfigError(f"{type(module).__name__} defines no {hook}")
    if is_overridden("backward", module):
        raise ConfigError(
            f"{type(module).__name__} defines backward, which is not called, as gradients come from the "
            "estimator; remove it, and scale the loss in training_step or the gradients in on_after_backward"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ConfigError("training_step takes dataloader_iter; let it take batch, so that it can run more than once")
    _require_automatic_optimization(module)
    _require_hooks_of_class(module)


def _require_hooks_of_class(module: L.LightningModule) -> None:
    """Refuse a hook that is set on the instance, where it hides the class's."""
    for name in {"training_step", *vars(_Converted)} - {"configure_optimizers"}:  # which works without convert's
        hook = vars(module).get(name)
        if hook is not None and getattr(hook, "__func__", None) is not getattr(type(module), name):
            raise ConfigError(
                f"the {name} of this {type(module).__name__} is set on the instance, which hides the one that convert "
                "adds; define it in the class"
            )


def _require_automatic_optimization(module: L.LightningModule) -> None:
    if not module.automatic_optimization:
        raise ConfigError(
            f"{type(module).__name__} sets automatic_optimization=False and steps its optimizers itself; return the "
            "loss from training_step and leave the rest to Lightning, or call the estimator in training_step yourself"
        )


class _Converted(L.LightningModule):
    """The changed methods of a converted module; a base that comes before the user's class.

    What it adds has names that no class of a user has: `_step`, for example, is a common name of a user's method.
    """

    _fgtrain: ObservedStep

    def __init_subclass__(cls) -> None:  # without the user's, which may keep a register of classes
        if cls.__bases__[0] is not _Converted:
            raise ConfigError(
                f"{cls.__name__} derives from the class of a converted module; derive it from the class that you wrote"
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # as by type(module).load_from_checkpoint
        return cls.__bases__[1](*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle cannot find the class by its name
        reduced: Any = super().__reduce_ex__(max(2, protocol))  # the user's own, if there is one
        return (_made_anew, (_user_class(self),), *reduced[2:]) if type(self) in reduced[1] else reduced

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.trainer.precision_plugin.convert_module(self)  # before Lightning loads a checkpoint
        compiled = compiler_of(self)
        if compiled is not None:  # torch.compile(module): compile the loss only
            self._fgtrain.user_step = compiled(self._fgtrain.user_step)
            to_uncompiled(self)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        _require_automatic_optimization(self)
        _require_hooks_of_class(self)
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            expect_no_backward(self.trainer.strategy.model)
        if self._fgtrain.ranks.size != self.trainer.world_size:
            self._fgtrain.ranks = Ranks()
        self._fgtrain.estimator.to(self.device)

    def configure_callbacks(self) -> Any:
        own = super().configure_callbacks()
        return [*([own] if isinstance(own, L.Callback) else own), self._fgtrain.divergence]

    def configure_optimizers(self) -> Any:
        return step_together(super().configure_optimizers())

    def fgtrain_estimates(self) -> StepEstimates:
        """The current step, for callbacks that need estimates."""

        def estimate(estimator: GradientEstimator, batch: Any, batch_idx: int) -> Estimate | None:
            takes_index = is_param_in_hook_signature(self.training_step, "batch_idx", min_args=2)  # as in Lightning
            args = (batch, batch_idx) if takes_index else (batch,)
            return self._fgtrain.peek(self, args, _estimate_by(self, estimator, batch_idx))

        step, micro_batches = self._fgtrain, self.trainer.accumulate_grad_batches
        return StepEstimates(step.estimator, self, step.ranks, step.tangents, micro_batches, estimate)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        write_grads(self, self._fgtrain.take_grads(), accumulate=True, check_finite=False)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        raise LossError(BACKWARD_CALLED)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not self._fgtrain.keep_log(name, value, args, kwargs):
            super().log(name, value, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if state := self._fgtrain.estimator.state_dict():
            checkpoint["fgtrain_estimator"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        estimator, state = self._fgtrain.estimator, checkpoint.get("fgtrain_estimator")
        if not state or not estimator.state_of_model:
            return
        try:
            estimator.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint's state of an estimator does not fit {type(estimator).__name__}; convert with the "
                'estimator that it was saved with, or delete "fgtrain_estimator" from the checkpoint to begin without'
            ) from error


def _run_step(module: _Converted, args: tuple[Any, ...]) -> Any:
    """What Lightning gets from training_step, with the loss of an estimate."""
    trainer, step = module.trainer, module._fgtrain
    estimate = _estimate_by(module, step.estimator, trainer.fit_loop.batch_idx)

    def is_usable(found: Estimate) -> bool:
        return scaler_of(trainer.precision_plugin) is not None or step.divergence.inspect(found, trainer)

    return step.run(module, args, estimate, is_usable)


def _estimate_by(module: _Converted, estimator: GradientEstimator, batch_idx: int) -> Callable[[LossFn], Estimate]:
    trainer, step = module.trainer, module._fgtrain
    micro_batches = trainer.accumulate_grad_batches
    return functools.partial(
        estimate_for_step,
        trainer.precision_plugin,
        step.ranks,
        estimator,
        module,
        key=(step.seed, trainer.global_step, batch_idx % micro_batches),
        tangents=step.tangents,
        micro_batches=micro_batches,
    )


@functools.cache
def _converted_class(user_class: type[L.LightningModule]) -> type:
    """A subclass of the user's class whose gradients come from an estimator."""

    @functools.wraps(user_class.training_step)  # Lightning reads its signature
    def training_step(self: _Converted, *args: Any, **kwargs: Any) -> Any:
        step = self._fgtrain
        if self.fabric is not None:
            raise ConfigError(
                "convert serves Lightning's Trainer, and this module is trained by Fabric, which would backpropagate; "
                "call the estimator with the model and its loss instead"
            )
        if step.is_running or current_hook(self) != "training_step":  # a call of the user, as in validation_step
            return step.user_step(self, *args, **kwargs)
        return _run_step(self, args)

    names = {"training_step": training_step, "__module__": user_class.__module__, "__doc__": user_class.__doc__}
    ignored = "__jit_ignored_attributes__"  # by torch.jit.script
    names[ignored] = [*getattr(user_class, ignored, ()), "_fgtrain"]
    return type(user_class.__name__, (_Converted, user_class), names)


def _user_class(module: L.LightningModule) -> Any:
    _, user_class = type(module).__bases__
    return user_class


def _made_anew(user_class: type[L.LightningModule]) -> Any:
    converted: Any = _converted_class(user_class)
    return object.__new__(converted)
