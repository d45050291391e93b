"""Runs scripts like their command lines, in the process of the test."""

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra

from fgtrain.__main__ import run
from fgtrain.commands.compare import run as compare_command

PACKAGE = '''
import lightning as L
import torch
from torch import nn

from fgtrain import ForwardGradient


class MyNet(nn.Sequential):
    def __init__(self, num_classes, width: int = 8):
        super().__init__(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, num_classes))


class MyData(L.LightningDataModule):
    num_classes = 2

    def __init__(self, size: int = 64):
        super().__init__()
        inputs = torch.randn(size, 5, generator=torch.Generator().manual_seed(0))
        self.examples = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())

    def _loader(self):
        return torch.utils.data.DataLoader(self.examples, batch_size=16)

    train_dataloader = val_dataloader = test_dataloader = _loader


class Sized(MyData):
    def __init__(self, batch_size: int = 4, seed: int = 3, *, classes):
        super().__init__()
        self.facts = batch_size, seed, classes


class Doubled(ForwardGradient):
    """A method of one's own."""


class MyModule(L.LightningModule):
    def training_step(self, batch):
        return None


def not_a_module(num_classes):
    return 3
'''


ROOT = Path(__file__).resolve().parents[1]


CONF = ROOT / "conf"


def options(group):
    """The names in a config group, without helpers."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))


def composed(*overrides):
    """The configuration of scripts/train.py."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["run_dir=.", *overrides])


def train(folder, *overrides):
    """Run the script in `folder`; (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", ["train.py", *overrides])
        if not any("experiment=" in override for override in overrides):  # the only ones that set hydra.mode
            patch.setattr(Hydra, "get_mode", lambda *_, **__: None)  # composes the configuration once more to see it
        try:
            status = run("train")
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def run_compare(folder, *arguments):
    """Run scripts/compare.py in `folder`; (stdout, stderr). Errors are raised."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        compare_command(arguments)
    return out.getvalue(), err.getvalue()


def results_under(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("results.json"))]


SWEEP_ON_TWO_PROCESSES = (
    *("-m", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=2", "callbacks=none"),
    *("method=fwdgrad", "lr=0.1,-1"),
)


def assert_every_other_job_failed(folder, status, err, methods=("fwdgrad",)):
    """Of each method's two jobs the first ran, on two processes; the second is named. All jobs share a folder."""
    assert status == 2, err
    assert {(r["method"], r["world_size"]) for r in results_under(folder)} == {(method, 2) for method in methods}
    assert len(list((folder / "multirun").glob("*/*"))) == 1
    for job in range(1, 2 * len(methods), 2):
        assert re.search(rf"fgtrain: job {job}_\S*lr=-1\S* failed: lr must be positive, got -1.0", err), err
