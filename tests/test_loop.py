"""The short loop is Lightning's loop: the same hooks in the same order, the same numbers in the same places."""

from itertools import count
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

from fgtrain import Backprop
from fgtrain.lightning.loop import StepLoop, use_step_loop
from fgtrain.studies.benchmarks.loop import loop_overhead

from .test_module import Small, assert_equal_weights, make

HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_end",
]


class Witness(L.Callback):
    """Writes down what it sees, and logs as a user's callback may: in the hook of that name."""

    def __init__(self, logs_in):
        self.seen = []
        self.logs_in = logs_in

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        epoch, fetched = trainer.current_epoch, trainer.fit_loop.epoch_loop.total_batch_idx
        self.seen.append(
            (batch_idx, trainer.global_step, epoch, fetched, trainer.is_last_batch, outputs["loss"].item())
        )
        if self.logs_in == "on_train_batch_end":
            pl_module.log("mine", outputs["loss"], on_step=True, on_epoch=True)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.logs_in == "on_train_epoch_end":
            pl_module.log("mine", float(trainer.current_epoch))
        self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def fit(tmp_path, short, *more, module=None, logs_in="on_train_batch_end", **options):
    witness, order = Witness(logs_in), []
    record = {name: lambda *_, name=name: order.append(name) for name in HOOKS}
    length: dict[str, Any] = {"max_epochs": -1, "max_steps": 12, "val_check_interval": 4}
    length |= {"check_val_every_n_epoch": None} | options
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        callbacks=[witness, LambdaCallback(**record), *more],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in more),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **length,
    )
    if short:
        use_step_loop(trainer)
    module = module or make(Backprop())
    trainer.fit(module, Small())
    return trainer, witness.seen, order, module


@pytest.mark.parametrize("logs_in", ["on_train_batch_end", "on_train_epoch_end", None])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_steps": -1, "max_epochs": 2, "val_check_interval": 1.0, "check_val_every_n_epoch": 2}],
    ids=["steps", "epochs"],
)
def test_same_as_lightnings(options, logs_in, tmp_path):
    own, seen, order, module = fit(tmp_path, True, logs_in=logs_in, **options)
    theirs, expected_seen, expected_order, expected = fit(tmp_path, False, logs_in=logs_in, **options)
    assert isinstance(own.fit_loop.epoch_loop, StepLoop)
    assert order == expected_order
    assert seen == expected_seen
    assert_equal_weights(module.state_dict(), expected.state_dict())
    for metrics in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        assert getattr(own, metrics) == getattr(theirs, metrics)
    state, theirs_state = own.fit_loop.state_dict(), theirs.fit_loop.state_dict()
    state["state_dict"] = {name: state["state_dict"][name] for name in theirs_state["state_dict"]}
    assert state == theirs_state


def test_hooks_of_the_module_are_called(tmp_path):
    class Hooked(type(make(Backprop()))):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None  # ends the epoch

    module = make(Backprop())
    module.__class__ = Hooked
    _, seen, *_ = fit(tmp_path, True, module=module, max_steps=-1, max_epochs=2, limit_val_batches=0)
    assert [s[0] for s in seen if isinstance(s, tuple)] == [0, 1, 0, 1]


def test_the_precision_plugin_is_given_back(tmp_path):
    trainer, *_ = fit(tmp_path, True)
    assert "_after_closure" not in vars(trainer.precision_plugin)


def test_measurement_of_the_loop(monkeypatch):
    """By a clock that shows 0, 1, 4, 9, .. seconds: 1 - 0 for the warm-up, 9 - 4 for the bare loop, 25 - 16."""
    clock = SimpleNamespace(process_time=(float(i**2) for i in count()).__next__)
    monkeypatch.setattr("fgtrain.studies.benchmarks.loop.time", clock)
    measured = loop_overhead("backprop", num_steps=20, repeats=1)
    assert measured == pytest.approx({"bare_us": 5e6 / 20, "trained_us": 9e6 / 20, "overhead_us": 4e6 / 20})
