"""The LightningModule gives the results of a plain loop, under every flag of the trainer."""

import sys

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from fgtrain import Backprop, ForwardGradient, LowRank, write_grads
from fgtrain.data import Digits
from fgtrain.errors import ConfigError
from fgtrain.lightning.callbacks import Monitor, StepProgress
from fgtrain.memory import forget_peak_memory, peak_memory_mib
from fgtrain.models import MLP
from fgtrain.random import keyed_generator
from fgtrain.schedulers import cosine
from tests.small import Small, assert_equal_weights, make, trainer

ESTIMATORS = [
    Backprop(),
    ForwardGradient(),
    ForwardGradient(LowRank(), num_tangents=2),
    ForwardGradient(num_tangents=2, combine="projection"),
]


def plain_loop(module, data, steps, accumulate=1, clip=None):
    """The same updates without Lightning: the weights after a number of optimizer steps."""
    data.setup("fit")
    model, loader = module.model, data.train_dataloader()
    optimizer = module.make_optimizer(model.parameters())
    done = 0
    while done < steps:
        for i, batch in enumerate(loader):
            micro = i % accumulate
            estimate = module.estimator(
                model,
                lambda net, batch=batch: module.task.losses(net, batch),
                generator=keyed_generator(module.seed, done, micro),
            )
            grads = estimate.grads if accumulate == 1 else {n: g / accumulate for n, g in estimate.grads.items()}
            write_grads(model, grads, accumulate=micro > 0)
            if micro + 1 == accumulate or i + 1 == len(loader):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                done += 1
                if done == steps:
                    break
    return model.state_dict()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"clip_grad_norm": 0.01}], ids=str)
def test_equals_a_plain_loop(estimator, options, tmp_path):
    module = make(estimator, **options)
    trainer(tmp_path, max_steps=12).fit(module, Small())
    plain = plain_loop(
        make(estimator), Small(), 12, options.get("accumulate_grad_batches", 1), options.get("clip_grad_norm")
    )
    assert_equal_weights(module.model.state_dict(), plain)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2}, 10),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "overfit_batches": 2}, 4),
        ({"fast_dev_run": True}, 1),
        ({"max_epochs": 2, "limit_train_batches": 0.4, "limit_val_batches": 1}, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("estimator", ESTIMATORS[:2], ids=str)
def test_trainer_flags_count_steps(estimator, options, steps, tmp_path):
    run = trainer(tmp_path, Monitor(1), StepProgress(), **options)
    run.fit(make(estimator), Small())
    assert run.global_step == steps


def test_accumulation_counts_optimizer_steps(tmp_path):
    run = trainer(tmp_path, max_epochs=2)
    run.fit(make(Backprop(), accumulate_grad_batches=2), Small())
    assert run.global_step == 6  # five batches are steps of two, two and one


def test_learning_rate_follows_the_schedule(tmp_path):
    module = make(ForwardGradient(), scheduler=cosine)
    run = trainer(tmp_path, max_steps=10)
    run.fit(module, Small())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)
    module = make(ForwardGradient(), scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.1))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, Small())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"max_steps": 10}, 10), ({"max_epochs": 3}, 15), ({"max_epochs": 3, "max_steps": 4}, 4)],
    ids=str,
)
def test_schedule_knows_the_length_of_the_run(options, expected, tmp_path):
    seen = []

    def schedule(optimizer, total_steps):
        seen.append(total_steps)
        return cosine(optimizer, total_steps, warmup_steps=2)

    trainer(tmp_path, **options).fit(make(Backprop(), scheduler=schedule), Small())
    assert seen == [expected]


def test_schedule_without_a_length_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the scheduler needs the run's length: set trainer.max_steps"):
        trainer(tmp_path).fit(make(Backprop(), scheduler=cosine), Small())


def test_early_stopping(tmp_path):
    module = make(Backprop(), optimizer=lambda params: torch.optim.SGD(params, lr=1e-9))
    run = trainer(tmp_path, EarlyStopping("val/loss", patience=2, min_delta=0.1), max_epochs=50)
    run.fit(module, Small())
    assert run.current_epoch == 3


def saves_at(folder, step):
    return ModelCheckpoint(folder, "cut", every_n_train_steps=step, save_top_k=1)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("cut", [3, 5, 7])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_equals_straight(estimator, cut, tmp_path):
    def optimizer(params):
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    straight = make(estimator, optimizer=optimizer, scheduler=lambda o: cosine(o, 12))
    trainer(tmp_path, max_steps=12).fit(straight, Small())
    first = make(estimator, optimizer=optimizer, scheduler=lambda o: cosine(o, 12))
    trainer(tmp_path, saves_at(tmp_path / "a", cut), max_steps=cut).fit(first, Small())
    resumed = make(estimator, optimizer=optimizer, scheduler=lambda o: cosine(o, 12))
    trainer(tmp_path, saves_at(tmp_path / "b", cut), max_steps=12).fit(
        resumed, Small(), ckpt_path=tmp_path / "a" / "cut.ckpt"
    )
    assert_equal_weights(resumed.model.state_dict(), straight.model.state_dict())


def test_checkpoint_of_the_best_model(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "best", monitor="val/acc", mode="max", save_last=True)
    run = trainer(tmp_path, checkpoint, max_epochs=4)
    module = make(Backprop())
    run.fit(module, Small())
    assert {p.name for p in tmp_path.glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_equal_weights({name: state[name] for name in module.state_dict()}, module.state_dict())


class Fp16(MixedPrecision):
    """CUDA's 16-mixed with its gradient scaler, on this machine."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_mixed_precisions(precision, estimator, tmp_path):
    """The step is that of full precision, up to the rounding of the arithmetic."""
    exact, module = make(estimator), make(estimator)
    options = {"plugins": [Fp16()]} if precision == "16-mixed" else {"precision": precision}
    start = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    steps = []
    for trained, how in ((exact, {}), (module, options)):
        trainer(tmp_path, max_steps=1, **how).fit(trained, Small())
        steps.append(torch.cat([p.detach().flatten() for p in trained.model.parameters()]) - start)
    assert 0 < (steps[1] - steps[0]).norm() < 0.05 * steps[0].norm()


def test_clipping_is_to_the_norm_without_the_loss_scale(tmp_path):
    """One SGD step then has the length lr clip_grad_norm."""
    module = make(Backprop(), clip_grad_norm=1e-3)
    start = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    trainer(tmp_path, max_steps=1, plugins=[Fp16()]).fit(module, Small())
    step = torch.cat([p.detach().flatten() for p in module.model.parameters()]) - start
    torch.testing.assert_close(step.norm(), torch.tensor(0.1 * 1e-3), rtol=1e-3, atol=0)


class Cast(Small):
    """The same inputs in another dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def load(self):
        splits, _ = super().load()
        return splits, lambda inputs: inputs.to(self.dtype)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_true_precisions(precision, dtype, estimator, tmp_path):
    """The weights are those of a plain loop with model and inputs of that dtype."""
    module, plain = make(estimator), make(estimator)
    trainer(tmp_path, max_steps=3, precision=precision).fit(module, Small())
    plain.model.to(dtype)
    weights = plain_loop(plain, Cast(dtype), 3)
    assert {value.dtype for value in weights.values()} == {dtype}
    assert_equal_weights(module.model.state_dict(), weights)


def test_observers_change_nothing(tmp_path):
    watched, alone = make(ForwardGradient()), make(ForwardGradient())
    trainer(tmp_path, Monitor(1), StepProgress(), max_steps=8).fit(watched, Small())
    trainer(tmp_path, max_steps=8).fit(alone, Small())
    assert_equal_weights(watched.state_dict(), alone.state_dict())


def test_learns_digits(tmp_path):
    data = Digits(256)
    module = make(Backprop(), model=MLP((1, 8, 8), 10))
    run = trainer(tmp_path, max_steps=300)
    run.fit(module, data)
    (metrics,) = run.test(module, data, verbose=False)
    assert metrics["test/acc"] > 0.9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak is the process's")
def test_peak_memory_is_that_of_one_run_not_of_those_before():
    large = torch.ones(50_000_000)
    before = peak_memory_mib()
    del large
    forget_peak_memory()
    assert peak_memory_mib() < before - 100
    again = torch.ones(50_000_000)
    assert peak_memory_mib() > before - 100
    del again
