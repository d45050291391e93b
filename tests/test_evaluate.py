"""scripts/evaluate.py gives what the run said of itself."""

import json
import shutil
import sys

import pytest
import torch

from fgtrain.cli import USER_ERRORS
from fgtrain.lightning.evaluate import evaluate

from .test_script import load_script, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    status, _, err = train(
        folder, "method=backprop", "trainer.max_steps=40", "trainer.val_check_interval=20", "run_dir=here"
    )
    assert status == 0, err
    return folder / "here"


@pytest.mark.parametrize("split", ["val", "test"])
def test_equals_what_the_run_found(folder, split):
    found = evaluate(folder / "checkpoints" / "last.ckpt", split)
    run = json.loads((folder / "results.json").read_text())
    assert found["steps"] == 40
    for name in ("loss", "acc"):
        assert found["metrics"][f"{split}/{name}"] == pytest.approx(run["metrics"][f"{split}/{name}"], rel=1e-6)
    written = json.loads((folder / f"evaluation_last_{split}.json").read_text())
    assert written["metrics"] == found["metrics"]
    assert {"method", "task", "data", "model", "seed", "num_parameters", "checkpoint"} <= written.keys()


def test_script(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "of_train.json"
    checkpoint = folder / "checkpoints" / "best.ckpt"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(checkpoint), "--split", "train", "--out", str(out)])
    load_script("evaluate").main()
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics.keys() == {"train/loss", "train/acc"}
    assert f"train/acc {metrics['train/acc']:.6g}" in capsys.readouterr().out


def test_mistakes(folder, tmp_path):
    with pytest.raises(USER_ERRORS, match=r"nope.ckpt is no file; give the path of a checkpoint"):
        evaluate(tmp_path / "nope.ckpt", "test")
    with pytest.raises(USER_ERRORS, match=r"split must be one of train, val, test, got all"):
        evaluate(folder / "checkpoints" / "best.ckpt", "all")
    lone = tmp_path / "a" / "b" / "c" / "lone.ckpt"
    lone.parent.mkdir(parents=True)
    shutil.copy(folder / "checkpoints" / "best.ckpt", lone)
    with pytest.raises(USER_ERRORS, match=r"lone.ckpt is not in a run's folder"):
        evaluate(lone, "test")
    shutil.copy(folder / "config.yaml", lone.parent)
    torch.save({"state_dict": {"other": torch.zeros(1)}, "global_step": 1}, lone)
    with pytest.raises(USER_ERRORS, match=r"lone.ckpt does not fit the run of .*config.yaml"):
        evaluate(lone, "test")
