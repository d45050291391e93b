"""Non-finite numbers never reach the weights."""

import math
from collections import deque
from functools import partial
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.nn import functional as F

from fgtrain import Backprop, Estimate, ForwardGradient, GradientEstimator, write_grads
from fgtrain.errors import DivergenceError
from fgtrain.estimators import FDFA, LocalGuess, LocalLosses
from fgtrain.lightning.callbacks import Monitor
from fgtrain.lightning.divergence import Divergence
from fgtrain.random import keyed_generator
from tests.commands import results_under, train
from tests.properties import flat
from tests.small import Small, assert_equal_weights, make, trainer


class Broken(GradientEstimator):
    """An estimator that replaces a value of another one's estimate at certain calls."""

    scalar_reducible = True

    def __init__(self, estimator, part, value, calls):
        super().__init__()
        self.estimator = estimator
        self.part = part
        self.value = value
        self.calls = calls
        self.count = -1

    def forward(self, model, loss_fn, *, generator=None, reduce=None):
        estimate = self.estimator(model, loss_fn, generator=generator)
        self.count += 1
        if self.count not in self.calls:
            return estimate
        if self.part == "grads":
            name = sorted(estimate.grads)[0]
            grads = {n: g.clone() for n, g in estimate.grads.items()}
            grads[name].view(-1)[-1] = self.value
            return estimate._replace(grads=grads)
        return estimate._replace(**{self.part: torch.full_like(getattr(estimate, self.part), self.value)})


def without_the_step_of_call(bad, module, data, accumulate):
    """A plain loop over one epoch that leaves out the step to which one batch belongs."""
    data.setup("fit")
    batches = list(data.train_dataloader())
    optimizer = module.make_optimizer(module.model.parameters())
    done = 0
    for first in range(0, len(batches), accumulate):
        group = batches[first : first + accumulate]
        if first <= bad < first + accumulate:
            continue
        for micro, batch in enumerate(group):
            estimate = module.estimator(
                module.model,
                lambda net, batch=batch: module.task.losses(net, batch),
                generator=keyed_generator(module.seed, done, micro),
            )
            grads = {name: g / accumulate for name, g in estimate.grads.items()}
            write_grads(module.model, grads, accumulate=micro > 0)
        optimizer.step()
        done += 1
    return module.model.state_dict()


@pytest.mark.parametrize("part", ["loss", "directional_derivatives", "grads"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_bad_step_is_as_if_it_had_not_been(part, value, accumulate, tmp_path):
    module = make(Broken(ForwardGradient(), part, value, {3}), accumulate_grad_batches=accumulate)
    trainer(tmp_path, Monitor(1), max_epochs=1).fit(module, Small())
    assert module.divergence.skipped_steps == 1
    expected = without_the_step_of_call(3, make(ForwardGradient()), Small(), accumulate)
    assert_equal_weights(module.model.state_dict(), expected)


def test_buffers_of_a_bad_batch_are_put_back(tmp_path):
    class Poisoned(Small):
        def load(self):
            splits, transform = super().load()
            splits["train"][0][7] = math.nan  # in one batch of an epoch
            return splits, transform

    module = make(Backprop(), model=nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    trainer(tmp_path, max_epochs=2).fit(module, Poisoned())
    assert module.divergence.skipped_steps == 2
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("estimator", [FDFA, LocalGuess, LocalLosses])
def test_estimators_learn_nothing_from_a_bad_batch(estimator):
    torch.manual_seed(0)
    estimator, model = estimator(), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, labels = torch.randn(8, 4), torch.arange(8) % 3
    for _ in range(3):
        estimator(model, lambda m: F.cross_entropy(m(inputs), labels, reduction="none"))
    learnt = {name: value.clone() for name, value in estimator.state_dict().items() if name != "num_updates"}
    assert any(value.any() for value in learnt.values())
    bad = inputs.clone()
    bad[-1, 0] = math.nan
    estimate = estimator(model, lambda m: F.cross_entropy(m(bad), labels, reduction="none"))
    with pytest.raises(DivergenceError, match="is not finite"):
        write_grads(model, estimate.grads)
    for name, value in learnt.items():
        assert torch.equal(estimator.state_dict()[name], value), name


def test_too_many_in_a_row_stop_the_run(tmp_path):
    broken = Broken(ForwardGradient(), "loss", math.nan, {2, *range(4, 100)})
    module = make(broken, divergence=Divergence(max_skipped_steps=3))
    with pytest.raises(DivergenceError, match=r"^step 3: the loss is nan, for 3 batches in a row .*lower lr"):
        trainer(tmp_path, max_steps=50).fit(module, Small())
    assert broken.count == 6
    assert all(p.isfinite().all() for p in module.parameters())


def test_without_a_finite_batch_the_data_are_suspected(tmp_path):
    module = make(Broken(ForwardGradient(), "loss", math.nan, set(range(100))), divergence=Divergence())
    with pytest.raises(
        DivergenceError, match=r"^step 0: the loss is nan, .*; look for non-finite values in the data, or"
    ):
        trainer(tmp_path, max_steps=50).fit(module, Small())


def test_loss_far_above_its_start_stops_the_run(tmp_path):
    def optimizer(params):
        return torch.optim.SGD(params, lr=100.0)

    module = make(Backprop(), optimizer=optimizer, divergence=Divergence(3, detect_divergence=10.0))
    with pytest.raises(DivergenceError, match=r"the loss is \d.*above detect_divergence=10 times that for 3 steps"):
        trainer(tmp_path, max_steps=50).fit(module, Small())


def test_loss_that_grows_slowly_from_its_best_stops_the_run():
    """It never is ten times the first one."""

    class OneRank:
        world_size = 1
        loggers = optimizers = ()
        global_step = 0

    judge, alone = Divergence(3, detect_divergence=10.0), cast(Any, OneRank())
    alone.optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)]
    losses = [2.0] + [2.0 * 0.9**k for k in range(60)] + [0.05 * 1.1**k for k in range(60)]
    estimates = [Estimate(torch.tensor(value), {"w": torch.ones(2)}, None) for value in losses]
    with pytest.raises(
        DivergenceError, match=r"the loss is [\d.]+; its lowest value was [\d.]+, and it has been above"
    ):
        deque(judge.inspect(estimate, alone) for estimate in estimates)


def test_a_loss_that_crosses_zero_is_not_judged():
    """Multiples of a value around zero say nothing."""

    class OneRank:
        world_size = 1
        loggers = ()

    judge = Divergence(3, detect_divergence=10.0)
    for value in [1.0] * 5 + [-5.0] * 30 + [50.0] * 30:
        assert judge.inspect(Estimate(torch.tensor(value), {"w": torch.ones(2)}, None), cast(Any, OneRank()))


def test_skipped_share():
    class OneRank:
        world_size = 1
        is_global_zero = True
        loggers = ()
        global_step = 0

    judge, alone = Divergence(100, max_skipped_share=0.1), cast(Any, OneRank())
    bad = Estimate(torch.tensor(math.nan), {"w": torch.ones(2)}, None)
    for _ in range(10):
        assert not judge.inspect(bad, alone)
    with pytest.raises(DivergenceError, match=r"11 of 11 batches were skipped, more than max_skipped_share=0.1"):
        judge.inspect(bad, alone)


def test_of_several_ranks_the_gradients_are_judged():
    """The loss and, with some methods, the derivatives are those of a rank's own shard."""

    class TwoRanks:
        world_size = 2
        is_global_zero = True
        loggers = ()
        global_step = 0

    judge, ranks = Divergence(), cast(Any, TwoRanks())
    fine = Estimate(torch.tensor(math.nan), {"w": torch.ones(2)}, torch.tensor([math.nan]))
    assert judge.inspect(fine, ranks)
    assert not judge.inspect(fine._replace(grads={"w": torch.tensor([math.inf])}), ranks)


def test_counts_survive_in_the_checkpoint():
    before, after = Divergence(), Divergence()
    before.skipped_steps = 4
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()


@pytest.mark.parametrize("options", [{"max_skipped_steps": 0}, {"detect_divergence": 1.0}, {"max_skipped_share": 2.0}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match="must be"):
        Divergence(**options)


def test_through_the_script(tmp_path):
    status, _, err = train(tmp_path, "method=fwdgrad", "lr=1e6", "trainer.max_steps=300")
    assert status == 2
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("fgtrain: step ")
    assert "lower lr, cap the derivative (method.clip_derivative=...)" in last
    assert not results_under(tmp_path)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize(("part", "value"), [("grads", math.nan), ("grads", math.inf), ("loss", math.nan)])
@pytest.mark.parametrize("bad", [1, 3])
def test_a_step_of_lbfgs_with_a_later_evaluation_that_is_not_finite_is_taken_back(
    part, value, bad, line_search, tmp_path
):
    def lbfgs(params):
        return torch.optim.LBFGS(params, lr=0.1, max_iter=4, line_search_fn=line_search)

    weights = []
    record = LambdaCallback(
        on_train_batch_end=lambda _, module, *__: weights.append(flat(dict(module.named_parameters())))
    )
    scheduler = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    module = make(Broken(Backprop(), part, value, {bad}), optimizer=lbfgs, scheduler=scheduler)
    before = flat(dict(module.named_parameters()))
    trainer(tmp_path, record, max_steps=3).fit(module, Small())
    assert torch.equal(weights[0], before)
    assert not torch.equal(weights[1], weights[0])
    assert all(w.isfinite().all() for w in weights)
    assert module.divergence.skipped_steps == 1
