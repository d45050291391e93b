"""Unsuitable data and runs without a step give one-line errors."""

import math
import re
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fgtrain import ForwardGradient
from fgtrain.data import InMemoryDataModule
from fgtrain.errors import ConfigError
from fgtrain.lightning.callbacks.first_batch import refuse_too_many_directions
from tests.commands import results_under, train

QUICK = ("trainer.max_steps=6", "trainer.val_check_interval=3", "method=backprop", "hydra.run.dir=run")


class Given(InMemoryDataModule):
    """Thirty-two images of 2 x 2 in three classes, but for what `how` changes."""

    input_shape = (1, 2, 2)
    num_classes = 3

    def __init__(self, batch_size: int = 8, how: str = ""):
        super().__init__(batch_size)
        self.how = how

    def load(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 1, 2, 2, generator=generator)
        y = torch.randint(3, (32,), generator=generator)
        transform = torch.Tensor.double if self.how == "float64" else torch.Tensor.float
        if self.how == "shape":
            x = x.repeat(1, 3, 1, 1)
        elif self.how == "nan rows":
            x[::8] = math.nan
        elif self.how == "one nan row":
            x[3] = math.nan
        elif self.how == "one-based":
            y = y + 1
        elif self.how in ("int32", "float32"):
            y = y.to(getattr(torch, self.how))
        splits = {name: (x.clone(), y.clone()) for name in ("train", "val", "test")}
        if self.how.startswith("empty"):
            splits[self.how.split()[1]] = (x[:0], y[:0])
        return splits, transform


class Unnumbered(Given):
    """Does not say how many classes there are."""

    def __getattribute__(self, name):
        if name == "num_classes":
            raise AttributeError(name)
        return super().__getattribute__(name)


class OnlyTraining(L.LightningDataModule):
    """Has one split, in a DataLoader that shuffles."""

    input_shape = (1, 2, 2)
    num_classes = 3

    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 1, 2, 2, generator=generator), torch.randint(3, (32,), generator=generator)
        return DataLoader(TensorDataset(x, y), self.batch_size, shuffle=True)


class TwoLoaders(OnlyTraining):
    """A batch is a list of two."""

    def train_dataloader(self):
        return [super().train_dataloader()] * 2


class Wide(nn.Sequential):
    """A layer of four parameters with 4096 outputs, and a head."""

    def __init__(self, num_classes: int, frozen: bool):
        super().__init__(nn.Flatten(), Repeated(), nn.Linear(4096, num_classes))
        self[1].requires_grad_(not frozen)


class Repeated(nn.Module):
    """Four factors for 4096 outputs."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return (x * self.factor).repeat(1, 1024)


class OddLater(L.LightningDataModule):
    """Four batches of images of 2 x 2 in three classes; the third one of training, or of validation, is replaced."""

    input_shape = (1, 2, 2)
    num_classes = 3

    def __init__(self, how: str, split: str = "train", batch_size: int = 8):
        super().__init__()
        self.how, self.split = how, split

    def _loader(self, split):
        x, y = torch.randn(8, 1, 2, 2), torch.arange(8) % 3
        odd: dict[str, Any] = {
            "label": (x, y + 1),
            "dict": {"x": x, "y": y},
            "size": (torch.randn(8, 1, 3, 3), y),
            "type": (x.double(), y),
            "counts": (x, y[:5]),
            "sound": (x, y),
        }
        batches: Any = [(x, y)] * 4
        if split == self.split:
            batches[2] = odd[self.how]
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")


class Fails(nn.Module):
    """Raises an error of its own in the third training step."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(4, num_classes)
        self.steps = 0

    def forward(self, x):
        self.steps += len(x) > 2  # the check of the first batch takes two examples
        if self.steps == 3:
            raise IndexError("of the model")
        return self.linear(x.flatten(1))


class Large(nn.Module):
    """Takes images of 224 x 224 only."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(224 * 224, num_classes)

    def forward(self, x):
        return self.linear(x.flatten(1))


def run(folder, how, *options):
    return train(
        folder, "data._target_=tests.test_first_batch.Given", f"+data.how={how}", "data.batch_size=8", *QUICK, *options
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one-based", "labels of the train split run from 1 to 3; they must be from 0 to 2, for num_classes=3"),
        (
            "int32",
            "labels of the first batch are int32 of shape (8,); classification needs class indices",
        ),
        ("float32", "labels of the first batch are float32 of shape (8,); classification needs class indices"),
        ("float64", "the data gives float64, but the model has float32 parameters; convert the data"),
        ("shape", "inputs of the train split have the shape (3, 2, 2), but input_shape of the data is (1, 2, 2)"),
        ("empty train", "the training set of Given is empty: its loader yields no batch"),
    ],
)
def test_bad_data_is_one_line(how, message, tmp_path):
    status, out, err = run(tmp_path, f"'{how}'")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_model_that_takes_other_shapes_is_one_line(tmp_path):
    status, _, err = run(tmp_path, "", "model._target_=tests.test_first_batch.Large")
    assert (status, err.count("\n")) == (2, 1), err
    assert "cannot take two examples of the data, (2, 1, 2, 2) float32, (2,) int64: mat1 and mat2 shapes" in err


@pytest.mark.parametrize("method", ["activity", "activity_head", "fdfa", "gauss_newton", "second_order"])
def test_directions_of_other_methods_larger_than_the_memory_are_one_line(method, tmp_path):
    status, _, err = train(tmp_path, f"method={method}", "method.num_tangents=1000000000", "hydra.run.dir=run")
    assert (status, err.count("\n")) == (2, 1), err
    assert re.search(r"1000000000 directions of .* MiB each do not fit .*; method.num_tangents=\d+ fit$", err)


@pytest.mark.parametrize(("frozen", "status"), [(True, 0), (False, 2)])
def test_only_outputs_behind_trained_parameters_have_derivatives(frozen, status, tmp_path, monkeypatch):
    """A direction over the head has 48 KiB; the derivative of the first layer's output has 128 KiB."""
    monkeypatch.setattr("fgtrain.lightning.callbacks.first_batch.free_memory", lambda _: 2**20)
    options = (
        *QUICK,
        "method=fwdgrad",
        "method.num_tangents=16",
        "quiet=true",
        "data._target_=tests.test_first_batch.Given",
    )
    found, _, err = train(tmp_path, "model._target_=tests.test_first_batch.Wide", f"+model.frozen={frozen}", *options)
    assert found == status, err
    assert ("do not fit into the 0.000977 GiB of free memory" in err) is not frozen


@pytest.mark.slow
def test_the_points_of_a_function_are_counted_without_a_batch(tmp_path, monkeypatch):
    """Eight directions over 1024 starts have 64 KiB, and so do the derivatives of the points."""
    options = ("task=beale", "task.starts=1024", "method=fwdgrad", "method.num_tangents=8", "trainer.max_steps=1")
    for free, status in ((2**17 - 1, 2), (2**17, 0)):
        monkeypatch.setattr("fgtrain.lightning.callbacks.first_batch.free_memory", lambda _, free=free: free)
        assert train(tmp_path, *options, "quiet=true", f"hydra.run.dir={status}")[0] == status


@pytest.mark.parametrize("tangents", ["normal", "low_rank"])
def test_directions_larger_than_the_memory_are_one_line(tangents, tmp_path):
    options = ("method=fwdgrad", f"tangents={tangents}", "hydra.run.dir=run")
    status, _, err = train(tmp_path, *options, "method.num_tangents=1000000000")
    assert (status, err.count("\n")) == (2, 1), err
    chunk = int(err.partition("method.chunk_size=")[2].partition(" ")[0])
    assert chunk < 10**9
    refuse_too_many_directions(ForwardGradient(num_tangents=10**9, chunk_size=100), nn.Linear(64, 10), 2**26)
    with pytest.raises(
        ConfigError, match=r"100000 directions of 0.00248 MiB each do not fit into the 0.0625 GiB of free"
    ):
        refuse_too_many_directions(ForwardGradient(num_tangents=100_000), nn.Linear(64, 10), 2**26)


@pytest.mark.parametrize("split", ["train", pytest.param("val", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("label", "labels of NAME run from 1 to 3; they must be from 0 to 2, for num_classes=3"),
        ("dict", "NAME has the type dict; a batch for classification must be (inputs, labels), two tensors"),
        ("size", "inputs of NAME have the shape (1, 3, 3), but input_shape of the data is (1, 2, 2)"),
        ("counts", "NAME has 8 inputs and 5 labels"),
        (
            "type",
            "NAME is unlike the first batch and cannot be used: it has float64 (1, 2, 2), int64 (), the first one "
            "float32 (1, 2, 2), int64 (); correct or remove it",
        ),
    ],
)
def test_a_bad_batch_behind_the_first_is_one_line(how, message, split, tmp_path):
    data = ("data._target_=tests.test_first_batch.OddLater", f"+data.how={how}", f"+data.split={split}")
    status, _, err = train(tmp_path, *data, *QUICK, "quiet=true")
    name = {"train": "batch 2 of epoch 0", "val": "batch 2 of the validation"}[split]
    assert (status, err.splitlines()[-1]) == (2, f"fgtrain: {message.replace('NAME', name)}"), err
    assert "Traceback" not in err


def test_an_error_of_the_model_keeps_its_traceback(tmp_path):
    data = ("data._target_=tests.test_first_batch.OddLater", "+data.how=sound")
    with pytest.raises(IndexError, match="of the model"):
        train(tmp_path, *data, "model._target_=tests.test_first_batch.Fails", *QUICK, "self_check=false")


def test_data_without_num_classes_is_one_line(tmp_path):
    status, _, err = run(tmp_path, "", "data._target_=tests.test_first_batch.Unnumbered")
    assert (status, err.count("\n")) == (2, 1), err
    assert "model: fgtrain.models.MLP needs num_classes, which the data lacks; give the datamodule" in err


def test_the_batch_of_several_loaders_is_looked_at(tmp_path):
    status, _, err = train(tmp_path, "data._target_=tests.test_first_batch.TwoLoaders", *QUICK, "quiet=true")
    assert status == 2
    assert err.splitlines()[1:] == [
        "fgtrain: the first batch has 2 parts (list, list); a batch for classification must be (inputs, labels), "
        "two tensors"
    ]


@pytest.mark.parametrize("split", ["val", "test"])
def test_empty_split_is_told(split, tmp_path):
    status, _, err = run(tmp_path, f"'empty {split}'", "quiet=true")
    assert status == 0, err
    assert err.count("\n") == 1
    assert f"the {'validation' if split == 'val' else 'test'} split of Given is empty" in err
    assert not any(name.startswith(split) for name in results_under(tmp_path)[0]["metrics"])


def test_data_without_other_splits_is_trained_on(tmp_path):
    options = ("data._target_=tests.test_first_batch.OnlyTraining", *QUICK, "quiet=true", "callbacks=none")
    status, _, err = train(tmp_path, *options)
    assert status == 0, err
    assert err.splitlines() == [
        "fgtrain: the validation split of OnlyTraining is missing (no val_dataloader)",
        "fgtrain: the test split of OnlyTraining is missing (no test_dataloader): no test/... in the results",
    ]
    assert results_under(tmp_path)[0]["steps"] == 6


@pytest.mark.parametrize("options", ["trainer.max_steps=0", "trainer.limit_train_batches=0"])
def test_nothing_trained_is_no_success(options, tmp_path):
    status, _, err = run(tmp_path, "", options)
    assert status == 2
    assert "nothing was trained" in err.splitlines()[-1]
    assert not results_under(tmp_path)


def test_lost_batches_are_told(tmp_path):
    status, _, err = run(tmp_path, "'one nan row'", "quiet=true", "max_skipped_share=null", "trainer.max_epochs=3")
    assert status == 0, err
    lines = err.splitlines()
    assert any("the loss is nan; this batch is skipped" in line for line in lines)
    assert lines[-1].endswith("of 8 batches were skipped, since their numbers were not finite")


def test_too_many_lost_batches_end_the_run(tmp_path):
    status, _, err = run(tmp_path, "'one nan row'", "quiet=true")
    assert status == 2
    assert "of 8 batches were skipped, more than max_skipped_share=0.1" in err.splitlines()[-1]
    assert not results_under(tmp_path)


def test_all_batches_lost(tmp_path):
    status, _, err = run(tmp_path, "'nan rows'", "max_skipped_steps=5")
    assert status == 2
    assert "the loss is nan, for 5 batches in a row" in err.splitlines()[-1]
    assert "the first batch holds nan or infinity" in err


@pytest.mark.parametrize("method", ["backprop", "fwdgrad"])
def test_training_loss_is_there_for_early_stopping_and_checkpoints(method, tmp_path):
    looked = ["callbacks.early_stopping.patience=0", "callbacks.early_stopping.min_delta=100"]
    for callback in ("early_stopping", "checkpoint"):
        looked += [f"callbacks.{callback}.monitor=train/loss", f"callbacks.{callback}.mode=min"]
    looked = [f"+{text}" if "min_delta" in text else text for text in looked]
    status, _, err = train(
        tmp_path, *QUICK, f"method={method}", "callbacks=early_stopping", "trainer.max_steps=30", *looked
    )
    assert status == 0, err
    (results,) = results_under(tmp_path)
    assert results["steps"] == 6  # the second look
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("callback", ["early_stopping", "checkpoint"])
@pytest.mark.parametrize("name", ["val/los", "train/los", "accuracy", "test/acc"])
def test_a_metric_that_there_is_not_is_told_before_training(callback, name, tmp_path):
    status, out, err = train(
        tmp_path, *QUICK, "quiet=true", "callbacks=early_stopping", f"callbacks.{callback}.monitor={name}"
    )
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert f"monitor={name} is not a metric; there are train/directional_derivative, " in err
    assert "train/loss, train/lr, train/step_ms, val/acc, val/loss" in err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_metric_that_is_not_there_yet_is_told(tmp_path):
    monitor = "callbacks.early_stopping.monitor=train/grad_norm"
    status, _, err = train(tmp_path, *QUICK, "quiet=true", "callbacks=early_stopping", monitor)
    assert (status, err.count("\n")) == (2, 1), err
    assert "trainer.log_every_n_steps" in err
