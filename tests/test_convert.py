"""Any LightningModule trains with any estimator; everything but the gradients is done by Lightning as before."""

import copy
import pickle
import re
import threading
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from fgtrain import FDFA, Backprop, ForwardExact, ForwardGradient, LocalLosses, LowRank, write_grads
from fgtrain.errors import CheckpointError, ConfigError, DivergenceError, LossError
from fgtrain.lightning import EstimatorModule, convert
from fgtrain.lightning.divergence import Divergence
from fgtrain.random import keyed_generator
from fgtrain.tasks import Classification
from tests.converted import Full, NoDropout, Plain, data, fit, made


def assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


class Fp16(MixedPrecision):
    """CUDA's 16-mixed with its gradient scaler, on this machine."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


OPTIONS = [
    {},
    {"accumulate_grad_batches": 3},
    {"gradient_clip_val": 0.1},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
    {"precision": "64-true"},
    {"precision": "bf16-true"},
    {"precision": "bf16-mixed"},
    {"plugins": "fp16"},
]


def prepared(options):
    return {"plugins": [Fp16()]} if "plugins" in options else options


@pytest.mark.parametrize(
    ("user_class", "options"), [*((Plain, o) for o in OPTIONS), *((Full, o) for o in OPTIONS[:2])], ids=str
)
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_backprop_is_plain_lightning(user_class, options, tmp_path):
    plain, converted = made(user_class), made(user_class, Backprop())
    expected, found = (fit(module, tmp_path, **prepared(options)) for module in (plain, converted))
    assert_same(plain, converted)
    assert found.global_step == expected.global_step
    assert found.callback_metrics.keys() == expected.callback_metrics.keys()
    for name, value in expected.callback_metrics.items():
        assert torch.equal(value, found.callback_metrics[name]), name
    if user_class is Full:
        assert converted.events == plain.events


class OneDict(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        plateau = {"scheduler": ReduceLROnPlateau(optimizer, patience=0), "monitor": "val"}
        return {"optimizer": optimizer, "lr_scheduler": plateau}


class Lists(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step", "frequency": 2}]


class Lbfgs(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class SometimesNan(Lbfgs):
    """Its third batch has no loss, and its fourth a loss that is not finite."""

    def training_step(self, batch, batch_idx):
        return (
            None if batch_idx == 2 else super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 3 else 1)
        )


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_lbfgs_skips_batches_without_a_loss(tmp_path):
    module = made(SometimesNan, Backprop())
    weights = []
    record = LambdaCallback(on_train_batch_end=lambda *_: weights.append(module.net[0].weight.clone()))
    fit(module, tmp_path, callbacks=[record])
    assert all(torch.equal(weights[1], weights[i]) for i in (2, 3))
    assert not torch.equal(weights[3], weights[4])
    assert weights[-1].isfinite().all()


class Fragile(Plain):
    """A network whose loss is nan as soon as its last bias is above 1."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) - self.net.get_parameter("4.bias").sum()
        return torch.where(self.net.get_parameter("4.bias").detach().amax() > 1, torch.nan, loss)

    def configure_optimizers(self):
        optimizer = torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=8, **self.options)
        return [optimizer], [ExponentialLR(optimizer, 0.9)]


@pytest.mark.parametrize("options", [{}, {"line_search_fn": "strong_wolfe"}], ids=["plain", "line search"])
def test_a_step_of_lbfgs_through_nan_is_taken_back(options, tmp_path):
    module = convert(Fragile(**options), Backprop())
    fit(module, tmp_path)
    assert module.net.get_parameter("4.bias").amax() <= 1
    assert all(p.isfinite().all() for p in module.parameters())


class OwnStep(Lists):
    """Warm-up by hand, in Lightning's hooks."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("user_class", [OneDict, Lists, Lbfgs, OwnStep])
def test_optimizers_of_every_form(user_class, tmp_path):
    plain, converted = made(user_class), made(user_class, Backprop())
    for module in (plain, converted):
        fit(module, tmp_path)
    assert_same(plain, converted)


class Parts(NoDropout):
    """Two optimizers, each with a schedule of its own, for two parts of one loss."""

    def configure_optimizers(self):
        first, last = (
            torch.optim.Adam(self.net[:2].parameters(), lr=0.01),
            torch.optim.SGD(self.net[3].parameters(), 0.1),
        )
        return (
            {"optimizer": first, "lr_scheduler": {"scheduler": ExponentialLR(first, 0.5), "interval": "step"}},
            {"optimizer": last, "lr_scheduler": ExponentialLR(last, 0.9)},
        )


def test_several_optimizers_step_together(tmp_path):
    module = made(Parts, ForwardGradient())
    trainer = fit(module, tmp_path, gradient_clip_val=0.5)
    assert trainer.global_step == 18
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx(
        [0.01 * 0.5**18, 0.1 * 0.9**3]
    )

    torch.manual_seed(0)
    plain = NoDropout()
    first = torch.optim.Adam(plain.net[:2].parameters(), lr=0.01)
    last = torch.optim.SGD(plain.net[3].parameters(), 0.1)
    schedules, step = [ExponentialLR(first, 0.5), ExponentialLR(last, 0.9)], 0
    torch.manual_seed(1)
    for _ in range(3):
        for x, y in data():
            loss = lambda net, x=x, y=y: F.cross_entropy(net.net(x), y)
            write_grads(plain, ForwardGradient()(plain, loss, generator=keyed_generator(0, step, 0)).grads)
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            first.step()
            last.step()
            schedules[0].step()
            step += 1
        schedules[1].step()
    assert_same(plain, module)

    path = tmp_path / "parts.ckpt"
    trainer.save_checkpoint(path)
    resumed = made(Parts, ForwardGradient())
    loaded = fit(resumed, tmp_path, ckpt_path=path)
    assert_same(resumed, module)
    assert loaded.optimizers[0].state_dict().keys() == {"optimizers"}
    assert [g["lr"] for g in loaded.optimizers[0].param_groups] == [g["lr"] for g in trainer.optimizers[0].param_groups]


class Reversed(NoDropout):
    """Two optimizers, of which the first has no state."""

    def configure_optimizers(self):
        last, first = self.net[3].parameters(), self.net[:2].parameters()
        return [torch.optim.SGD(last, 0.1), torch.optim.Adam(first, lr=0.01)]


@pytest.mark.parametrize(("user_class", "options"), [(Reversed, {}), (NoDropout, {"precision": "64-true"})])
def test_a_run_resumed_twice_is_exact(user_class, options, tmp_path):
    """With two optimizers, and in double precision: Lightning itself loads weights before it converts the module."""
    expected, path = made(user_class, ForwardGradient()), None
    fit(expected, tmp_path, **options)
    for epochs in (1, 2, 3):
        module = made(user_class, ForwardGradient())
        trainer = fit(module, tmp_path, ckpt_path=path, max_epochs=epochs, **options)
        trainer.save_checkpoint(path := tmp_path / f"{epochs}.ckpt")
    assert_same(expected, module)


class PerExample(NoDropout):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("estimator", [ForwardGradient(), ForwardGradient(LowRank(), 4)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_the_module_of_the_script(estimator, accumulate, tmp_path):
    converted = made(PerExample, estimator)
    fit(converted, tmp_path, accumulate_grad_batches=accumulate)

    def optimizer(params):
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    module = EstimatorModule(
        made(NoDropout).net, Classification(), estimator, optimizer, accumulate_grad_batches=accumulate
    )
    fit(module, tmp_path, limit_val_batches=0)
    assert_same(module.model, converted.net)


@pytest.mark.parametrize("estimator", [ForwardGradient(), ForwardGradient(num_tangents=3)], ids=str)
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_what_is_logged_is_the_value_and_counts_once(estimator, tmp_path):
    class Frozen(Full):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    plain, converted = made(Frozen), made(Frozen, estimator)
    expected, found = fit(plain, tmp_path, max_epochs=1), fit(converted, tmp_path, max_epochs=1)
    assert found.callback_metrics.keys() == expected.callback_metrics.keys()
    for name, value in expected.callback_metrics.items():
        torch.testing.assert_close(found.callback_metrics[name], value)


class BadBatch(NoDropout):
    """The loss is nan for one batch of an epoch, or for every batch from the second step on."""

    always = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx == 2 or (self.always and self.global_step > 1) else loss


class LeavesItOut(NoDropout):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=str)
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_that_is_no_number_is_skipped(estimator, accumulate, tmp_path):
    bad, without = made(BadBatch, estimator), made(LeavesItOut, estimator)
    for module in (bad, without):
        fit(module, tmp_path, accumulate_grad_batches=accumulate)
    assert_same(bad, without)
    assert all(value.isfinite().all() for value in bad.state_dict().values())


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_too_many_of_them_end_the_run(tmp_path):
    module = convert(made(BadBatch), ForwardGradient(), divergence=Divergence(max_skipped_steps=3))
    module.always = True
    with pytest.raises(DivergenceError, match=r"the loss is nan, for 3 batches in a row .*lower lr"):
        fit(module, tmp_path)
    assert all(value.isfinite().all() for value in module.state_dict().values())


class Constant(NoDropout):
    """A loss without parameters in one batch of an epoch, as of an image without objects."""

    def training_step(self, batch, batch_idx):
        return torch.zeros((), requires_grad=True) if batch_idx == 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_without_parameters(accumulate, tmp_path):
    plain, converted = made(Constant), made(Constant, Backprop())
    for module in (plain, converted):
        fit(module, tmp_path, accumulate_grad_batches=accumulate)
    assert_same(plain, converted)
    with pytest.raises(LossError, match=r"depends on no trainable parameter, .*, or return None from training_step to"):
        fit(made(Constant, ForwardGradient()), tmp_path)


class LastOutput(nn.LSTM):
    def forward(self, input, hx=None):  # noqa: A002, the base's name
        return super().forward(input.view(-1, 2, 2), hx)[0][:, -1]


class Recurrent(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(LastOutput(2, 5, batch_first=True), nn.Linear(5, 3))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def test_a_recurrent_network_logs_its_loss(tmp_path):
    losses = []
    note = LambdaCallback(on_train_batch_end=lambda *arguments: losses.append(arguments[2]["loss"].item()))
    trainer = fit(made(Recurrent, ForwardGradient(shrinkage=True)), tmp_path, max_epochs=1, callbacks=[note])
    assert trainer.callback_metrics["loss"].item() == losses[-1]


class Usual(Plain):
    """A network with a learning rate for backpropagation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_the_message_of_a_diverged_run_begins_with_shrinkage(tmp_path):
    unshrunk = made(Usual, ForwardGradient())
    with pytest.raises(DivergenceError, match=r"; set shrinkage=True, without which .*, lower lr, cap"):
        fit(unshrunk, tmp_path, max_epochs=20)
    fit(made(Usual, ForwardGradient(shrinkage=True)), tmp_path, max_epochs=20)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    ("estimator", "remedies"),
    [
        (ForwardGradient(combine="projection"), r"lower lr, cap the derivative .*, or take more directions \(.*\)"),
        (Backprop(), r"lower lr, or cap the gradient \(clip_grad_norm=...\)"),
    ],
)
def test_only_options_of_the_method_are_advised(estimator, remedies, tmp_path):
    module = made(BadBatch, estimator)
    module.always = True
    with pytest.raises(DivergenceError, match=f"; {remedies}; lr is"):
        fit(module, tmp_path)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_first_batch_that_is_skipped_decides_nothing(tmp_path, caplog):
    class Skips(NoDropout):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    fit(made(Skips, ForwardGradient()), tmp_path, max_epochs=1)
    assert "reference engine" not in caplog.text


@pytest.mark.parametrize("second", [ForwardGradient(), Backprop()], ids=str)
def test_switch_of_method_under_a_gradient_scaler(second, tmp_path):
    """The optimizer sees the estimate itself: neither 65536 times too small nor too large."""
    seen, first = [], Backprop()

    class Switch(NoDropout):
        def on_train_batch_start(self, batch, batch_idx):
            convert(self, second if batch_idx % 2 else first)

        def on_before_optimizer_step(self, optimizer):
            seen.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = made(Switch, first)
    fit(module, tmp_path, max_epochs=1, limit_val_batches=0, plugins=[Fp16()])
    for step, (x, y) in enumerate(data()):

        def loss(net, x=x, y=y):
            with torch.autocast("cpu", torch.float16):
                return F.cross_entropy(net.net(x), y)

        estimate = (second if step % 2 else first)(module, loss, generator=keyed_generator(0, step, 0))
        expected = torch.cat([g.flatten() for g in estimate.grads.values()])
        assert (seen[step] - expected).norm() < 1e-2 * expected.norm()  # float16 resolves 5e-4


def test_a_converted_module_is_still_the_users(tmp_path):
    module = made(Plain, ForwardGradient())
    assert isinstance(module, Plain)
    assert type(module).__name__ == "Plain"
    assert module.state_dict().keys() == Plain().state_dict().keys()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    fit(twin, tmp_path)
    fit(module, tmp_path)
    assert_same(twin, module)


class Locked(Plain):
    """Leaves what cannot be copied out of its state."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_a_converted_module_is_copied_as_its_class_says(tmp_path):
    module = made(Locked, ForwardGradient())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module, 0))):
        assert type(twin) is type(module)
        assert twin.lock is not module.lock
        fit(twin, tmp_path, max_steps=1)


class Reduced(Plain):
    def __reduce__(self):
        return Plain, ()


def test_a_converted_module_is_pickled_as_its_class_says():
    assert type(pickle.loads(pickle.dumps(made(Reduced, ForwardGradient())))) is Plain


def test_what_convert_adds_is_lightnings_or_has_the_name_of_fgtrain():
    converted, base = type(made(Plain, ForwardGradient())), type(made(Plain, ForwardGradient())).__bases__[0]
    added = {*vars(converted), *vars(base)} - set(dir(L.LightningModule))
    assert {name for name in added if "fgtrain" not in name} <= {"__jit_ignored_attributes__"}


class NamesOfItsOwn(NoDropout):
    """Calls its training step from elsewhere, and has names that an addition to it might have too."""

    def _estimate(self, x):
        return self.net(x)

    def _step(self, batch, stage):
        return F.cross_entropy(self._estimate(batch[0]), batch[1])

    def training_step(self, batch, batch_idx, factor=1.0):
        return factor * self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.log("after", self.training_step(batch, batch_idx=batch_idx, factor=2.0))


class CallsItself(NoDropout):
    def training_step(self, batch, batch_idx, again=True):
        loss = super().training_step(batch, batch_idx)
        return loss + self.training_step([-batch[0], batch[1]], batch_idx, False) if again else loss


@pytest.mark.parametrize("user_class", [NamesOfItsOwn, CallsItself])
def test_a_module_may_call_its_own_methods(user_class, tmp_path):
    plain, exact = made(user_class).double(), made(user_class, ForwardExact()).double()
    expected, found = (fit(module, tmp_path, precision="64-true") for module in (plain, exact))
    torch.testing.assert_close(exact.state_dict(), plain.state_dict())
    torch.testing.assert_close(found.callback_metrics, expected.callback_metrics)
    x, y = next(iter(data()))
    step = exact.training_step([x.double(), y], 0)
    torch.testing.assert_close(step, plain.training_step([x.double(), y], 0))  # outside a run too


def test_the_class_of_a_converted_module_makes_plain_ones(tmp_path):
    module = made(Plain, ForwardGradient())
    fit(module, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(loaded) is Plain
    assert_same(loaded, module)
    with pytest.raises(ConfigError, match="Derived derives from the class of a converted module; derive it from the"):
        type("Derived", (type(module),), {})


NAMES = set()


class Registers(Plain):
    """Its subclasses have distinct names."""

    def __init_subclass__(cls):
        assert cls.__name__ not in NAMES
        NAMES.add(cls.__name__)


def test_conversion_registers_no_class():
    assert isinstance(convert(type("Registered", (Registers,), {})(), ForwardGradient()), Registers)


@pytest.mark.parametrize(
    ("estimator", "fits"), [(FDFA(), True), (Backprop(), True), (LocalLosses(), False)], ids=["same", "none", "other"]
)
def test_a_checkpoint_of_another_estimator(estimator, fits, tmp_path):
    """Its state is left where none is needed, and refused where it does not fit."""
    before = made(NoDropout, FDFA())
    fit(before, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    module = made(NoDropout, estimator)
    context = nullcontext() if fits else pytest.raises(CheckpointError, match="does not fit LocalLosses; convert with")
    with context:
        fit(module, tmp_path, ckpt_path=tmp_path / "a.ckpt", max_epochs=1)
        assert_same(before, module)


class Scaled(NoDropout):
    scale = 1.0

    def training_step(self, batch, batch_idx):
        return self.scale * super().training_step(batch, batch_idx)


def test_a_second_run_may_have_a_larger_loss(tmp_path):
    module = made(Scaled, Backprop())
    for module.scale in (1e-4, 1.0):
        fit(module, tmp_path)


class Interrupted(NoDropout):
    cause: BaseException | None = None

    def training_step(self, batch, batch_idx):
        if self.cause is not None and batch_idx == 1:
            raise self.cause
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("cause", [RuntimeError("failed"), KeyboardInterrupt()])
def test_a_step_that_the_user_calls_after_an_error_is_the_users(cause, tmp_path):
    module = made(Interrupted, ForwardGradient())
    module.cause = cause
    with pytest.raises((RuntimeError, SystemExit)):
        fit(module, tmp_path)
    batch = next(iter(data()))
    assert torch.equal(module.training_step(batch, 0), F.cross_entropy(module.net(batch[0]), batch[1]))
    module.cause = None
    assert fit(module, tmp_path).global_step == 18


def test_fabric_is_refused():
    module = made(Plain, ForwardGradient())
    fabric = L.Fabric(accelerator="cpu", devices=1)
    trained: Any = fabric.setup(module, module.configure_optimizers())[0]
    trained.mark_forward_method("training_step")
    with pytest.raises(
        ConfigError, match="this module is trained by Fabric, which would backpropagate; call the estima"
    ):
        trained.training_step(next(iter(data())), 0)


@pytest.mark.skipif(not hasattr(L.LightningModule, "to_torchscript"), reason="Lightning has removed it")
@pytest.mark.filterwarnings("ignore:.*(torch.jit|TorchScript)")
def test_a_converted_module_can_be_scripted():
    class Scripted(Plain):
        __jit_ignored_attributes__ = ("estimator",)

        def __init__(self):
            super().__init__()
            self.estimator = ForwardGradient()

        def forward(self, x):
            return self.net(x)

    module, x = made(Scripted, ForwardGradient()), torch.ones(2, 4)
    assert torch.equal(module.to_torchscript()(x), module.eval()(x))


def test_a_trainer_goes_on_with_a_plain_module(tmp_path):
    trainer = fit(made(Plain, Backprop()), tmp_path, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(made(Plain), data(), data())
    assert trainer.global_step == 12


class CallsBackward(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        loss.backward()
        return loss


class CallsManualBackward(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        return loss


class NoLoss(Plain):
    def training_step(self, batch, batch_idx):
        return {"value": super().training_step(batch, batch_idx)}


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=str)
@pytest.mark.parametrize(
    ("user_class", "message"),
    [
        (CallsBackward, "training_step calls backward itself; return the loss and leave its gradient to the estimator"),
        (CallsManualBackward, "training_step calls backward itself; return the loss"),
        (NoLoss, 'training_step must return a loss, a dict with "loss", or None .* got a dict with the keys value'),
    ],
)
def test_training_steps_that_cannot_be_differentiated(user_class, message, estimator, tmp_path):
    backward = torch.Tensor.backward
    with pytest.raises(LossError, match=message) as caught:
        fit(made(user_class, estimator), tmp_path)
    assert "\n" not in str(caught.value)
    assert torch.Tensor.backward is backward


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Iterates(Plain):
    def training_step(self, dataloader_iter):  # ty: ignore[incompatible-method-override]
        return super().training_step(next(dataloader_iter)[0], 0)


class OwnBackward(Plain):
    def backward(self, loss):
        super().backward(2 * loss)


class OnInstance(Plain):
    def __init__(self):
        super().__init__()
        self.training_step = lambda batch, batch_idx: super(OnInstance, self).training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "convert takes a LightningModule, got a Linear; in a training loop of your own"),
        (lambda: torch.compile(Plain()), "convert takes an uncompiled module; compile the module that it returns"),
        (L.LightningModule, "LightningModule defines no training_step"),
        (Manual, "Manual sets automatic_optimization=False and steps its optimizers itself; return the loss"),
        (Iterates, "training_step takes dataloader_iter; let it take batch"),
        (OnInstance, "the training_step of this OnInstance is set on the instance, which hides the one that convert"),
        (OwnBackward, "OwnBackward defines backward, which is not called, as gradients come from the estimator"),
    ],
)
def test_modules_that_cannot_be_converted(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        convert(make(), ForwardGradient())


def test_a_hook_that_is_set_on_a_converted_module_is_refused(tmp_path):
    module = made(Plain, ForwardGradient())
    module.on_save_checkpoint = lambda checkpoint: None
    with pytest.raises(ConfigError, match="the on_save_checkpoint of this Plain is set on the instance"):
        fit(module, tmp_path)


def test_a_name_is_no_estimator():
    with pytest.raises(ConfigError, match=r"convert takes an estimator such as ForwardGradient\(\), got 'fwdgrad'"):
        convert(Plain(), "fwdgrad")  # ty: ignore[invalid-argument-type]
