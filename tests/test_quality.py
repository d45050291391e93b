import math
from statistics import mean

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fgtrain import SPSA, Backprop, ForwardGradient, Rademacher
from fgtrain.errors import ConfigError
from fgtrain.lightning import EstimatorModule
from fgtrain.lightning.callbacks import GradientQuality
from fgtrain.quality import quality
from fgtrain.tasks import Classification
from tests.converted import Full, NoDropout, fit, made
from tests.properties import flat
from tests.small import Small, assert_equal_weights, make, trainer


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(5, 3)
    )


class Kept(GradientQuality):
    """Remembers what it found."""

    def __init__(self, every_n_steps=1):
        super().__init__(every_n_steps)
        self.found = []

    def compare(self, trainer, module, batch, batch_idx):
        self.found.append(super().compare(trainer, module, batch, batch_idx))
        return self.found[-1]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("estimator", [ForwardGradient(num_tangents=2), Backprop(), SPSA()], ids=str)
def test_training_is_the_same_bit_for_bit(estimator, options, tmp_path):
    states = []
    for callbacks in ([], [GradientQuality(1)]):
        module = make(estimator, network(), **options)
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks, max_steps=8).fit(module, Small())
        states.append({**module.state_dict(), "random state": torch.get_rng_state()})
    assert_equal_weights(*states)


def test_backprop_is_perfect(tmp_path):
    kept = Kept()
    trainer(tmp_path, kept, max_steps=4).fit(make(Backprop(), network()), Small())
    assert len(kept.found) == 4
    for found in kept.found:
        assert found["quality/cosine"] == pytest.approx(1)
        assert found["quality/relative_squared_error"] == 0
        assert found["quality/expected_squared_error"] == 0
        assert found["quality_of_1/norm_ratio"] == 1


@pytest.mark.slow
def test_mean_error_is_the_closed_form(tmp_path):
    """||d v - g||^2 / ||g||^2 = (n - 2) d^2 / ||g||^2 + 1 for signs v, of deviation at most sqrt(2) (n - 2)."""
    steps, kept = 150, Kept()
    module = make(ForwardGradient(Rademacher()), optimizer=lambda params: torch.optim.SGD(params, lr=1e-6))
    trainer(tmp_path, kept, max_steps=steps).fit(module, Small())
    n = sum(p.numel() for p in module.parameters())
    assert {found["quality/expected_squared_error"] for found in kept.found} == {n - 1}
    assert all(found["quality/expected_cosine"] == pytest.approx(n**-0.5) for found in kept.found)
    average = mean(found["quality/relative_squared_error"] for found in kept.found)
    assert abs(average - (n - 1)) <= 5 * math.sqrt(2 / steps) * (n - 2)


def test_it_is_the_estimate_of_the_step(tmp_path):
    """Norm ratio times the exact norm is the norm the optimizer sees."""
    kept, seen = Kept(), []

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).norm().item())
            return super().step(closure)

    module = make(ForwardGradient(), network(), optimizer=lambda params: Seen(params, lr=0.1))
    trainer(tmp_path, kept, max_steps=3).fit(module, Small())
    module = make(Backprop(), network(), optimizer=lambda params: Seen(params, lr=0.1))
    trainer(tmp_path, max_steps=1).fit(module, Small())
    assert kept.found[0]["quality/norm_ratio"] == pytest.approx(seen[0] / seen[3], rel=1e-5)


def test_layers_add_up():
    exact = {f"{layer}.{name}": torch.randn(3) for layer in ("a", "b.c") for name in ("weight", "bias")}
    estimate = {name: torch.randn(3) for name in exact}
    found = quality(estimate, exact)
    assert found.keys() == {"", "a", "b.c"}
    squares = {name: flat({n: g for n, g in exact.items() if n.startswith(name)}).square().sum() for name in found}
    errors = {name: found[name].relative_squared_error * squares[name].item() for name in found}
    assert errors["a"] + errors["b.c"] == pytest.approx(errors[""])


def test_an_unused_parameter_counts_with_a_gradient_of_zero():
    found = quality({"a.weight": torch.tensor([3.0, 4.0]), "b.weight": torch.ones(11)}, {"a.weight": torch.ones(2)})
    assert found.keys() == {"", "a"}
    assert found[""].cosine == pytest.approx(7 / (36 * 2) ** 0.5)
    assert found[""].relative_squared_error == pytest.approx((4 + 9 + 11) / 2)
    assert found[""].norm_ratio == pytest.approx((36 / 2) ** 0.5)


class PartlyUsed(nn.Module):
    """An embedding with sparse gradients, and a layer that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.embedding, self.unused = nn.Embedding(4, 3, sparse=True), nn.Linear(3, 7)

    def forward(self, x):
        return self.embedding((x.flatten(1) > 0).sum(1) % 4)


def test_the_closed_form_of_a_model_with_unused_parameters_and_sparse_gradients(tmp_path):
    kept = Kept()
    trainer(tmp_path, kept, max_steps=2).fit(make(ForwardGradient(Rademacher()), PartlyUsed()), Small())
    for found in kept.found:
        assert found["quality/expected_squared_error"] == 40 - 1
        cosine, ratio = found["quality/cosine"], found["quality/norm_ratio"]
        assert ratio == pytest.approx(40 * cosine, rel=1e-5)  # of d v for signs v, where d = g . v
        assert found["quality/relative_squared_error"] == pytest.approx(ratio**2 - 2 * cosine * ratio + 1, rel=1e-5)


def test_logged_every_few_steps(tmp_path):
    run = trainer(tmp_path, GradientQuality(3), max_steps=7, logger=TensorBoardLogger(tmp_path, "", ""))
    run.fit(make(ForwardGradient()), Small())
    events = EventAccumulator(str(tmp_path)).Reload()
    names = ("cosine", "relative_squared_error", "norm_ratio")
    expected = {f"{group}/{name}" for group in ("quality", "quality_of_1", "quality_of_3") for name in names}
    assert expected | {"quality/expected_squared_error"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("quality/cosine")] == [0, 3, 6]
    assert "quality/cosine" in run.callback_metrics
    assert "quality_of_1/cosine" not in run.callback_metrics  # they would fill the closing table


@pytest.mark.parametrize("estimator", [ForwardGradient(num_tangents=2), Backprop()], ids=str)
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_converted_module_is_looked_at_and_trains_the_same(estimator, tmp_path):
    """One that logs, has metrics and skips a batch."""
    kept, alone, looked_at = Kept(), made(Full, estimator), made(Full, estimator)
    expected = fit(alone, tmp_path)
    found = fit(looked_at, tmp_path, callbacks=[kept])
    assert_equal_weights(looked_at.state_dict(), alone.state_dict())
    assert looked_at.events == alone.events
    for name, value in expected.callback_metrics.items():
        assert torch.equal(found.callback_metrics[name], value), name
    compared = [metrics for metrics in kept.found if metrics]
    assert 0 < len(compared) < len(kept.found)  # a skipped batch has no gradient
    assert "quality_of_net.0/cosine" in compared[0]
    if isinstance(estimator, Backprop):
        assert all(metrics["quality/cosine"] == pytest.approx(1) for metrics in compared)


def test_it_finds_the_same_in_a_converted_module(tmp_path):
    of_script, of_user = Kept(), Kept()
    module = EstimatorModule(
        made(NoDropout).net, Classification(), ForwardGradient(), lambda ps: torch.optim.SGD(ps, 0.1, 0.9)
    )
    fit(module, tmp_path, callbacks=[of_script], limit_val_batches=0)
    fit(made(NoDropout, ForwardGradient()), tmp_path, callbacks=[of_user])
    for a, b in zip(of_script.found, of_user.found, strict=True):
        assert a["quality/cosine"] == pytest.approx(b["quality/cosine"], rel=1e-4)


def test_a_module_without_an_estimator_is_told_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"but Full trains without an estimator; convert it first, with fgtrain\.l"):
        fit(made(Full), tmp_path, callbacks=[GradientQuality()])


def test_bad_interval():
    with pytest.raises(ConfigError, match="every_n_steps must be at least 1, got 0"):
        GradientQuality(0)
