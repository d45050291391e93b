"""Metrics (which may be the loss), attributes and lists of a training step count once under convert."""

import copy
import importlib.util
import io
import itertools
import multiprocessing
import random
import re
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, TensorDataset

from fgtrain import SPSA, Backprop, ForwardExact, ForwardGradient
from fgtrain.errors import ConfigError, LossError, UnsupportedOperation
from fgtrain.forward_ad.dual import Dual
from fgtrain.lightning import convert
from fgtrain.lightning.step_snapshot import BatchSnapshot
from fgtrain.network.parameters import slots_of


class Regression(L.LightningModule):
    def __init__(self, metric=torchmetrics.MeanSquaredError):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.metric = metric()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Alone(Regression):
    def training_step(self, batch, batch_idx):
        loss = self.metric(self.net(batch[0]), batch[1])
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        return loss


class OneOfTwo(Regression):
    def training_step(self, batch, batch_idx):
        return self.metric(self.net(batch[0]), batch[1]) + 0.1 * F.mse_loss(self.net(-batch[0]), batch[1])


class UpdateThenCompute(Regression):
    """A constant to backpropagation, beside a term that moves."""

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        self.metric.update(out, batch[1])
        return self.metric.compute() * F.mse_loss(out, batch[1])


class UpdateWithGradients(Regression):
    def training_step(self, batch, batch_idx):
        self.metric._enable_grad = True
        self.metric.reset()
        self.metric.update(self.net(batch[0]), batch[1])
        return self.metric.compute()


def loader(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=generator)
    return DataLoader(TensorDataset(x.to(dtype), torch.stack([x.sum(1), x[:, 0]], 1).to(dtype)), 8)


def fit(make, estimator=None, dtype=torch.float32, **options):
    """The module, plain where there is no estimator, and what it logged."""
    torch.manual_seed(0)
    module = make().to(dtype)
    if estimator is not None:
        convert(module, estimator)
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**(defaults | options))
    torch.manual_seed(1)
    trainer.fit(module, loader(dtype))
    return module, trainer.callback_metrics


def assert_same(plain, converted, metrics: Any = (), found: Any = ()):
    assert converted.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, converted.state_dict()[name]), name
    for name in metrics:
        assert torch.equal(metrics[name], found[name]), name


def carrying(x, seen=None):
    """Whether a tensor with a derivative or a graph is held by x, at any depth."""
    seen = set() if seen is None else seen
    if id(x) in seen:
        return False
    seen.add(id(x))
    if isinstance(x, torch.Tensor):
        return isinstance(x, Dual) or x.grad_fn is not None
    parts = vars(x) if isinstance(x, nn.Module) else x
    parts = list(parts.values()) if isinstance(parts, dict) else parts
    return isinstance(parts, list | tuple) and any(carrying(part, seen) for part in parts)


METRICS = [torchmetrics.MeanSquaredError, torchmetrics.MeanAbsoluteError, lambda: torchmetrics.CosineSimilarity("mean")]


@pytest.mark.parametrize("user_class", [Alone, OneOfTwo, UpdateThenCompute, UpdateWithGradients])
@pytest.mark.parametrize("metric", METRICS, ids=["mse", "mae", "cosine"])
def test_a_metric_may_be_the_loss(user_class, metric):
    def make():
        return user_class(metric)

    plain, metrics = fit(make, dtype=torch.float64, max_epochs=1)
    backprop, found = fit(make, Backprop(), dtype=torch.float64, max_epochs=1)
    assert_same(plain, backprop, metrics, found)
    num_params = sum(p.numel() for p in plain.parameters())
    complete, _ = fit(
        make, ForwardGradient(num_tangents=num_params, combine="projection"), dtype=torch.float64, max_epochs=1
    )
    for p, q in zip(plain.parameters(), complete.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5)  # the cosine similarity computes in single precision
    assert not carrying(backprop)
    assert not carrying(complete)


class Pops(Regression):
    """Takes its batch apart."""

    def training_step(self, batch, batch_idx):
        y = batch.pop()
        batch[0] = {"x": batch[0]}
        return F.mse_loss(self.net(batch[0].pop("x")), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert batch == [{}]


def test_a_batch_is_whole_whenever_the_step_runs():
    """ForwardExact runs it several times, and gives the weights of backpropagation."""
    plain, _ = fit(Pops, dtype=torch.float64)
    converted, _ = fit(Pops, ForwardExact(chunk_size=8), dtype=torch.float64)
    torch.testing.assert_close(converted.net.state_dict(), plain.net.state_dict())


class Schedule(Callable):
    """A user's own class, which is no module."""

    def __init__(self, inner=None):
        self.count, self.history, self.inner, self.average = 0, [], inner, torch.zeros(1)
        self.training = self  # the name of a module's attribute, and a cycle

    def __call__(self):
        self.count += 1
        self.history.append(self.count)
        self.average.add_(self.count)
        return self.count + len(self.history) + self.average.item() + (self.inner() if self.inner else 0)


class OwnState(Regression):
    """Its loss depends on what earlier steps left in containers and objects, and on generators of its own."""

    def __init__(self):
        super().__init__()
        self.schedules = {"weight": Schedule(Schedule())}
        self.queue, self.lists, self.counter, self.seen = deque(maxlen=2), defaultdict(list), Counter(), set()
        self.torchs, self.numpys, self.pythons = torch.Generator(), np.random.default_rng(0), random.Random(0)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.queue.append(self.global_step)
        self.lists["steps"].append(self.global_step)
        self.counter["steps"] += 1
        self.seen.add(self.global_step)
        noise = torch.rand(1, generator=self.torchs).item() + self.numpys.random() + self.pythons.random()
        noise += self.schedules["weight"]()
        return loss * (noise + sum(self.queue) + len(self.lists["steps"]) + self.counter["steps"] + len(self.seen))


def test_containers_objects_and_generators_of_a_module_change_once_a_step():
    plain, _ = fit(OwnState, dtype=torch.float64)
    converted, _ = fit(OwnState, ForwardExact(chunk_size=8), dtype=torch.float64)
    torch.testing.assert_close(converted.net.state_dict(), plain.net.state_dict())
    assert (converted.queue, converted.lists, converted.counter) == (plain.queue, plain.lists, plain.counter)


class DrawsItsBatch(Regression):
    """Takes a batch of another loader in its step, which cannot be taken back."""

    def on_train_start(self):
        self.others = itertools.cycle(loader())

    def training_step(self, batch, batch_idx):
        return super().training_step(next(self.others), batch_idx)


@pytest.mark.parametrize("estimator", [ForwardExact(chunk_size=8), ForwardGradient(num_tangents=2, chunk_size=1)])
def test_a_loss_of_another_batch_at_every_call_is_refused(estimator):
    fit(DrawsItsBatch, ForwardGradient(num_tangents=2))  # one pass
    with pytest.raises(
        UnsupportedOperation, match=r"the loss changes when its pass is repeated: .*position of an iter"
    ):
        fit(DrawsItsBatch, estimator)


class ChangesTheBatch(Regression):
    def training_step(self, batch, batch_idx):
        batch[0].mul_(2)
        return super().training_step(batch, batch_idx)


def test_a_batch_that_the_step_changes_in_place():
    fit(ChangesTheBatch, ForwardGradient(num_tangents=2))  # one pass
    for estimator in (SPSA(), ForwardExact(chunk_size=8)):
        with pytest.raises(LossError, match=r"^training_step changes its batch in place, .*; change a copy instead"):
            fit(ChangesTheBatch, estimator)


def test_a_batch_that_refuses_changes_is_left_alone():
    class Fixed(dict):
        def clear(self):
            raise TypeError("cannot be changed")

    BatchSnapshot((Fixed(x=torch.ones(1)), 0)).restore()


class Everywhere(Regression):
    """Metrics in all kinds of places, of all kinds, and the values of steps in attributes and lists."""

    def __init__(self):
        super().__init__()
        mean, mse, mae = torchmetrics.MeanMetric, torchmetrics.MeanSquaredError, torchmetrics.MeanAbsoluteError
        self.plain_list: Any = [mean(), mse()]
        self.plain_dict: Any = {
            "a": {"b": torchmetrics.CosineSimilarity()},
            "c": (torchmetrics.MetricCollection([mae()]),),
        }
        self.pair = torchmetrics.MetricCollection({"mse": mse(), "rmse": mse(squared=False)})
        self.extremes, self.last = torchmetrics.MinMaxMetric(mean()), torchmetrics.wrappers.Running(mean(), 2)
        self.outputs_of_steps, self.num_steps = [], 0
        self.last_loss: Any = None
        self.lazy: Any = None

    def training_step(self, batch, batch_idx):
        out, y = self.net(batch[0]), batch[1]
        if self.lazy is None:
            self.lazy = torchmetrics.MeanMetric()
        loss = F.mse_loss(out, y) + torchmetrics.MeanSquaredError()(out, y)
        for metric in (self.plain_list[0], self.extremes, self.last, self.lazy):
            metric(loss)
        for metric in (self.plain_list[1], self.plain_dict["a"]["b"], self.plain_dict["c"][0], self.pair):
            metric(out, y)
            metric.update(2 * out, y)
        self.outputs_of_steps.append(loss)
        self.num_steps += 1
        self.last_loss = loss
        return loss

    def seen(self):
        metrics: list[Any] = [*self.plain_list, self.plain_dict["a"]["b"], *self.pair.values(), self.last, self.lazy]
        counts = [metric._update_count for metric in metrics]
        collection = self.plain_dict["c"][0].compute()
        values = [*(metric.compute() for metric in metrics), *collection.values(), *self.extremes.compute().values()]
        return counts, torch.stack([*values, torch.stack(self.outputs_of_steps).mean(), self.last_loss]).detach()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient(num_tangents=3), SPSA()], ids=str)
def test_what_a_step_keeps_counts_once_and_holds_values(estimator):
    plain, _ = fit(Everywhere)
    converted, _ = fit(Everywhere, estimator)
    assert not carrying(converted) or isinstance(estimator, Backprop)  # which leaves graphs, as Lightning does
    counts, values = plain.seen()
    found_counts, found_values = converted.seen()
    assert found_counts == counts
    assert converted.num_steps == len(converted.outputs_of_steps) == 6
    torch.testing.assert_close(found_values, values, rtol=1e-2, atol=1e-2)  # spsa's loss is that of a moved point


class LogsTwice(Regression):
    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        for name, factor in (("first", 1), ("second", 2)):
            self.metric(factor * out, batch[1])
            self.log(name, self.metric, on_step=True, on_epoch=False)
        self.metric.reset()
        return F.mse_loss(out, batch[1])


def test_what_is_logged_of_a_metric_is_its_result_at_that_time():
    plain, metrics = fit(LogsTwice)
    converted, found = fit(LogsTwice, Backprop())
    assert metrics["first"] != metrics["second"]
    assert_same(plain, converted, metrics, found)


class BesideAnother(Regression):
    """A backward pass and a metric of another thread, whose work is not part of the step."""

    others = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.work_of_another_thread).result()
        return super().training_step(batch, batch_idx)

    def work_of_another_thread(self):
        x = torch.ones(1, requires_grad=True)
        x.square().backward()
        torch.autograd.backward(x.square())
        assert x.grad is not None
        self.others.update(x.grad)


@pytest.mark.parametrize("estimator", [ForwardGradient(num_tangents=2), SPSA()], ids=str)
def test_what_another_thread_does_meanwhile_is_left_alone(estimator):
    BesideAnother.others.reset()
    fit(BesideAnother, estimator)
    assert BesideAnother.others.update_count >= 2 * 3 * (1 + isinstance(estimator, SPSA))
    assert BesideAnother.others.compute() == 4


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient(num_tangents=2)], ids=str)
def test_a_trained_module_is_copied_and_saved(estimator):
    module, _ = fit(Everywhere, estimator)
    module.trainer = None
    if isinstance(estimator, Backprop):  # what holds a graph cannot be copied, in Lightning neither
        module.outputs_of_steps, module.last_loss = [torch.ones(())], torch.ones(())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert isinstance(twin, Everywhere)
        assert_same(module, twin)
        assert twin.seen()[0] == module.seen()[0]


class Pruned(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        layer: Any = self.net[0]
        if batch_idx == 0:
            prune.l1_unstructured(layer, "weight", 0.3)
        elif batch_idx == 2:
            prune.remove(layer, "weight")


class Parametrized(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            parametrizations.weight_norm(self.net[0])
        elif batch_idx == 2:
            parametrize.remove_parametrizations(self.net[0], "weight")


class TiedLater(Regression):
    def __init__(self):
        super().__init__()
        self.net.insert(2, nn.Linear(4, 4))
        self.net.insert(3, nn.Linear(4, 4))

    def on_train_batch_start(self, batch, batch_idx):
        first: Any = self.net[2]
        second: Any = self.net[3]
        second.weight = first.weight if batch_idx == 1 else nn.Parameter(first.weight.detach().clone())


class Averaged(Regression):
    def on_fit_start(self):
        self.average = torch.optim.swa_utils.AveragedModel(self.net)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.update_parameters(self.net)


class Unfrozen(Regression):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def no_callback():
    return []


CHANGING = {
    "prune and remove": (Pruned, no_callback),
    "parametrization": (Parametrized, no_callback),
    "tied later": (TiedLater, no_callback),
    "AveragedModel": (Averaged, no_callback),
    "ModelPruning": (Regression, lambda: [L.pytorch.callbacks.ModelPruning("l1_unstructured", amount=0.3)]),
    "EMAWeightAveraging": (Regression, lambda: [L.pytorch.callbacks.EMAWeightAveraging(decay=0.9)]),
    "StochasticWeightAveraging": (Regression, lambda: [L.pytorch.callbacks.StochasticWeightAveraging(0.01, 1)]),
    "GradientAccumulationScheduler": (
        Regression,
        lambda: [L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})],
    ),
    "BackboneFinetuning": (Unfrozen, lambda: [L.pytorch.callbacks.BackboneFinetuning(1, backbone_initial_lr=0.01)]),
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.filterwarnings("ignore:Lightning couldn't infer the indices:UserWarning")
@pytest.mark.filterwarnings("ignore:The optimizer contains frozen:UserWarning")
def test_models_that_change_while_they_train(name):
    user_class, callbacks = CHANGING[name]
    plain, _ = fit(user_class, callbacks=callbacks(), max_epochs=3)
    backprop, _ = fit(user_class, Backprop(), callbacks=callbacks(), max_epochs=3)
    assert_same(plain, backprop)

    torch.manual_seed(0)
    before = user_class()
    learnt, _ = fit(user_class, ForwardGradient(num_tangents=8), callbacks=callbacks(), max_epochs=6)
    batch = next(iter(loader()))
    assert learnt.training_step.__wrapped__(learnt, batch, 0) < before.training_step(batch, 0)


class OtherK(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        convert(self, ForwardGradient(num_tangents=1 + batch_idx))


def test_another_number_of_directions_at_every_step():
    module, _ = fit(OtherK, ForwardGradient())
    assert module._fgtrain.estimator.num_tangents == 3


def test_a_module_that_comes_where_another_was_is_found():
    model = nn.ModuleDict({"body": nn.Tanh(), "head": nn.Linear(2, 2)})
    parts: Any = model._modules
    slots_of(model)
    for _ in range(20):  # the memory of the old one, and so its id, is often that of the new one
        parts["head"] = None
        parts["head"] = head = nn.Linear(2, 2)
        assert slots_of(model).params["head.weight"] is head.weight


def convert_old(told):
    warnings.simplefilter("ignore")
    module: Any = type("Old", (importlib.import_module("pytorch_lightning").LightningModule,), {})()
    try:
        convert(module, Backprop())
    except ConfigError as error:
        told.send(str(error))


@pytest.mark.skipif(importlib.util.find_spec("pytorch_lightning") is None, reason="pytorch_lightning is not installed")
def test_modules_of_the_other_namespace_are_named():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=convert_old, args=(sender,))  # that package changes logging
    process.start()
    process.join()
    assert process.exitcode == 0
    assert receiver.poll(0)
    assert re.search(r"a LightningModule of pytorch_lightning, .* lightning\.pytorch; replace `imp", receiver.recv())
