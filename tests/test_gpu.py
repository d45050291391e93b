"""Tests for an accelerator. Each test also runs on the CPU, to check the test itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fgtrain import Backprop, ForwardGradient, LowRank, Normal, Rademacher, Sphere, directional_derivatives, write_grads
from fgtrain.memory import peak_mib
from fgtrain.models import Residual
from fgtrain.random import keyed_generator
from fgtrain.studies.benchmarks.steps import make_problem
from fgtrain.tangents.directions import dense
from tests.commands import results_under, train
from tests.conditions import compiles
from tests.every_method import EVERY_METHOD, make

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def problem(device, dtype=torch.float64, *, norms=True):
    """A network with the layers that have rules of their own, and its loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norms else nn.Identity(), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(36, 16), Residual(nn.Linear(16, 16))),
        *(nn.LayerNorm(16) if norms else nn.Identity(), nn.GELU(), nn.Linear(16, 3)),
    ).to(device, dtype)
    inputs, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 2, 1, 2, 0, 1], device=device)
    inputs = inputs.to(device, dtype)
    return model, lambda m: F.cross_entropy(m(inputs), labels, reduction="none")


@DEVICES
@pytest.mark.parametrize("law", [Normal(), Rademacher(), Sphere(), LowRank(2)], ids=repr)
def test_derivative_is_the_inner_product_with_the_gradient(device, law):
    model, loss_fn = problem(device)
    exact = Backprop()(copy.deepcopy(model), loss_fn).grads
    tangents = law.sample(dict(model.named_parameters()), seeds=[5, 6, 7])
    _, derivatives = directional_derivatives(model, loss_fn, tangents)
    expected = sum((dense(tangents[name]) * g).flatten(1).sum(1) for name, g in exact.items())
    torch.testing.assert_close(derivatives, expected, rtol=1e-10, atol=1e-10)


@DEVICES
@compiles
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # on a GPU the compiler warns of settings for TensorFloat32
def test_compiled_derivatives_are_those_of_the_model_as_written(device, caplog):
    model, loss_fn = problem(device)
    tangents = LowRank().sample(dict(model.named_parameters()), seeds=[5, 6])
    expected = directional_derivatives(copy.deepcopy(model), loss_fn, tangents)
    model.compile()
    found = directional_derivatives(model, loss_fn, tangents)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert "uncompiled" not in caplog.text


@DEVICES
@EVERY_METHOD
def test_every_method_makes_a_step(device, method):
    model, loss_fn = problem(device, torch.float32, norms=False)  # which some methods refuse
    estimator = make(method).to(device)
    grads = estimator(model, loss_fn, generator=keyed_generator(1)).grads
    assert {g.device.type for g in grads.values()} == {device}
    write_grads(model, grads)
    before = [p.clone() for p in model.parameters()]
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


@DEVICES
@EVERY_METHOD
def test_one_seed_gives_one_estimate(device, method):
    model, loss_fn = problem(device, norms=False)
    first, again = (
        make(method).to(device)(copy.deepcopy(model), loss_fn, generator=keyed_generator(2)).grads for _ in range(2)
    )
    for name, g in first.items():
        torch.testing.assert_close(g, again[name], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@DEVICES
def test_memory_is_that_of_inference(device):
    """Of activations: one with its derivative, and the next one with its own, whatever the depth."""
    peaks = []
    for model in ("deep8", "deep24"):
        deep = make_problem(model, 4096, torch.device(device))
        estimator = ForwardGradient(LowRank())

        def step(estimator=estimator, deep=deep):
            return estimator(deep.model, deep.losses, generator=keyed_generator(0)).loss

        step()  # the first one tries the engine
        with torch.no_grad():
            forward = peak_mib(lambda deep=deep: deep.losses(deep.model), torch.device(device))
        peaks.append(peak_mib(step, torch.device(device)))
        assert peaks[-1] <= 2.2 * forward
    assert peaks[1] <= 1.05 * peaks[0]


@needs_gpu
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", ["backprop", "fwdgrad", "fwdgrad_lowrank", "activity_head"])
def test_script_trains_on_the_gpu(method, precision, tmp_path):
    options = ("trainer.accelerator=gpu", "trainer.devices=1", f"trainer.precision={precision}")
    status, _, err = train(tmp_path, f"method={method}", *options, "trainer.max_steps=300")
    assert status == 0, err
    (results,) = results_under(tmp_path)
    assert results["metrics"]["test/acc"] > 0.3
    assert results["skipped_steps"] < 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus_exchange_the_derivatives_alone(tmp_path):
    status, _, err = train(
        tmp_path, "method=fwdgrad_lowrank", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=gpu"
    )
    assert status == 0, err
    (results,) = results_under(tmp_path)
    assert results["comm/bytes_per_step"] <= 8 * 2 * 16
