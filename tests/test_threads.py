"""Estimators in several threads, copied and pickled: each behaves as it does alone."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fgtrain.estimators
from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators import ForwardGradient, ForwardInTime, GradientEstimator
from fgtrain.forward_ad.registry import RULES, without_rules
from fgtrain.models import Residual
from tests.cases import Custom

STEPS = 12
METHODS = [
    method
    for name in fgtrain.estimators.__all__
    if isinstance(method := getattr(fgtrain.estimators, name), type)
    and issubclass(method, GradientEstimator)
    and method not in (GradientEstimator, ForwardInTime)  # which needs a recurrence
]
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(3)), torch.arange(16) % 3


class Scattered(nn.Module):
    """Only PyTorch's own forward mode follows it."""

    def forward(self, x):
        return torch.func.vmap(torch.sin)(x)


def network(middle):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), middle, nn.Linear(8, 3))


def loss(model):
    return F.cross_entropy(model(X), Y, reduction="none")


def train(model, estimator, wait=lambda: None):
    """Losses and the last gradients of a few steps."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        wait()
        estimate = estimator(model, loss, generator=generator)
        found.append(estimate.loss)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.1 * estimate.grads[name]
    return found, estimate.grads


@pytest.mark.parametrize("num_tangents", [1, 2])
@pytest.mark.parametrize("middle", [nn.Tanh, Scattered], ids=["fast", "native"])
def test_threads_compute_what_one_does(middle, num_tangents):
    estimator, barrier = ForwardGradient(num_tangents=num_tangents), Barrier(4, timeout=600)
    expected = train(network(middle()), estimator)
    models = [network(middle()) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(train, model, estimator, barrier.wait) for model in models]:
            torch.testing.assert_close(future.result(), expected, rtol=0, atol=0)


def test_error_in_a_thread_leaves_the_process_as_before():
    expected = train(network(nn.Tanh()), ForwardGradient(num_tangents=2))
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(UnsupportedOperation, match="Function without jvp"),
    ):
        pool.submit(train, network(Custom()), ForwardGradient(num_tangents=2)).result()
    torch.testing.assert_close(train(network(nn.Tanh()), ForwardGradient(num_tangents=2)), expected, rtol=0, atol=0)
    with without_rules():
        torch.testing.assert_close(train(network(nn.Tanh()), ForwardGradient(num_tangents=2)), expected)


def test_without_rules_concerns_the_passes_of_its_thread(monkeypatch):
    used = []
    monkeypatch.setitem(RULES, F.linear, lambda *args: used.append(args) or NotImplemented)
    with without_rules(), ThreadPoolExecutor(1) as pool:
        train(network(nn.Tanh()), ForwardGradient())
        assert not used
        pool.submit(train, network(nn.Tanh()), ForwardGradient()).result()
    assert used


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_estimators_are_copied_before_and_after_use(method, copied):
    estimator, model = method(), network(Residual(nn.Linear(8, 8)))
    copied(estimator)
    estimator(model, loss)
    found = copied(estimator)(copied(model), loss, generator=torch.Generator().manual_seed(2))
    expected = estimator(model, loss, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_estimators_are_built_anywhere(method):
    with torch.inference_mode():
        estimator = method()
    model = network(Residual(nn.Linear(8, 8)))
    expected, found = (e(copy.deepcopy(model), loss, generator=torch.Generator()) for e in (method(), estimator))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
