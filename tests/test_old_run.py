"""A run of an earlier version (commit 7301494, 60 steps of fwdgrad on digits) is evaluated, replayed and extended."""

import json
import shutil
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

from fgtrain.lightning.checkpoints import read_checked
from fgtrain.runs.evaluate import evaluate
from fgtrain.runs.replay import replay
from tests.commands import train

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")

KEPT = Path(__file__).parent / "runs" / "of_7301494"
RTOL, ATOL = 1e-5, 1e-6  # another machine's matrix products, over 60 steps


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(KEPT, tmp_path / "run"))


def test_evaluates(folder):
    was = json.loads((KEPT / "results.json").read_text())["metrics"]
    found = evaluate(folder, "test")["metrics"]
    assert found["test/loss"] == pytest.approx(was["test/loss"], rel=1e-5)
    assert found["test/acc"] == pytest.approx(was["test/acc"], abs=1 / 360)  # one image


def test_replays(folder, monkeypatch):
    """The log's digests are left out: they change with the last bit, and so with the processor."""
    monkeypatch.setattr("fgtrain.runs.replay.digest", lambda _: ANY)
    module, steps = replay(folder)
    assert steps == 60
    expected = read_checked(folder / "checkpoints" / "last.ckpt")["state_dict"]
    for name, value in module.model.state_dict().items():
        torch.testing.assert_close(value, expected[f"model.{name}"], rtol=RTOL, atol=ATOL, msg=name)


@pytest.mark.slow
def test_is_extended(folder):
    status, _, err = train(
        folder.parent,
        "hydra.run.dir=run",
        "resume=auto",
        "trainer.max_steps=80",
        "callbacks=replay_log",
        "model.init=torch",
    )
    assert status == 0, err
    assert json.loads((folder / "results.json").read_text())["steps"] == 80
    last = read_checked(folder / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 80
