"""scripts/evaluate.py gives the metrics that the run reported."""

import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf

from fgtrain.commands.evaluate import main as run_command
from fgtrain.errors import CheckpointError
from fgtrain.runs.evaluate import evaluate
from fgtrain.runs.messages import USER_ERRORS
from tests.commands import results_under, train
from tests.interrupted import assert_same, final_weights


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


@pytest.mark.slow
def test_double_precision_is_read_whole(tmp_path):
    """By evaluation and by a resumed run: Lightning loads weights before it makes the model double."""
    options = ("method=backprop", "trainer.precision=64-true", "scheduler=constant", "logger=none")
    for folder, stops in (("cut", (2, 4)), ("straight", (4,))):
        (tmp_path / folder).mkdir()
        for steps in stops:
            command = ("hydra.run.dir=run", "resume=auto", f"trainer.max_steps={steps}")
            status, _, err = train(tmp_path / folder, *options, *command)
            assert status == 0, err
    assert_same(*(final_weights(tmp_path / name) for name in ("cut", "straight")))
    (run,) = results_under(tmp_path / "cut")
    assert evaluate(tmp_path / "cut" / "run", "test")["metrics"]["test/loss"] == run["metrics"]["test/loss"]


def test_script(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "of_train.json"
    checkpoint = folder / "checkpoints" / "best.ckpt"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(checkpoint), "--split", "train", "--out", str(out)])
    run_command()
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics.keys() == {"train/loss", "train/acc"}
    assert f"train/acc {metrics['train/acc']:.6g}" in capsys.readouterr().out


def test_mistakes(folder, tmp_path):
    with pytest.raises(USER_ERRORS, match=r"nope.ckpt is not a file; give the path of a checkpoint"):
        evaluate(tmp_path / "nope.ckpt", "test")
    with pytest.raises(USER_ERRORS, match=r"split must be one of train, val, test, got all"):
        evaluate(folder / "checkpoints" / "best.ckpt", "all")
    lone = tmp_path / "a" / "b" / "c" / "lone.ckpt"
    lone.parent.mkdir(parents=True)
    shutil.copy(folder / "checkpoints" / "best.ckpt", lone)
    message = (
        rf"lone.ckpt is not in a run's folder: .*; copy that of its run to {re.escape(str(lone.parent))}/config.yaml"
    )
    with pytest.raises(USER_ERRORS, match=message):
        evaluate(lone, "test")
    shutil.copy(folder / "config.yaml", lone.parent)
    assert evaluate(lone, "test")["metrics"] == evaluate(folder / "checkpoints" / "best.ckpt", "test")["metrics"]
    torch.save({"state_dict": {"other": torch.zeros(1)}, "global_step": 1}, lone)
    with pytest.raises(USER_ERRORS, match=r"lone.ckpt does not fit the run of .*config.yaml"):
        evaluate(lone, "test")


def test_folder_stands_for_its_last_checkpoint(folder, tmp_path):
    found = evaluate(folder, "test", tmp_path / "found.json")
    assert (found["checkpoint"], found["steps"]) == ("last.ckpt", 40)


def test_a_link_to_a_checkpoint_is_that_checkpoint(folder, tmp_path):
    (tmp_path / "latest.ckpt").symlink_to(folder / "checkpoints" / "last.ckpt")
    assert evaluate(tmp_path / "latest.ckpt", "test", tmp_path / "found.json")["steps"] == 40
    status, _, err = train(tmp_path, "method=backprop", "data.batch_size=16", f"resume={tmp_path / 'latest.ckpt'}")
    assert (status, err.count("\n")) == (2, 1)
    assert f"data.batch_size is 256 in the run of {folder} and 16 in this command" in err


@pytest.fixture
def foreign(folder, tmp_path):
    """A run's folder that a stranger may change."""
    return shutil.copytree(folder, tmp_path / "foreign")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_of_two_processes_is_evaluated_by_one(strategy, foreign):
    expected = evaluate(foreign, "test")["metrics"]
    cfg = OmegaConf.load(foreign / "config.yaml")
    OmegaConf.save(OmegaConf.merge(cfg, {"trainer": {"strategy": strategy, "devices": 2}}), foreign / "config.yaml")
    assert evaluate(foreign, "test")["metrics"] == expected


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "content",
    [
        lambda path: path.write_bytes(pickle.dumps({"state_dict": Payload()})),
        lambda path: torch.save({"state_dict": Payload()}, path),
        lambda path: torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False),
        lambda path: path.write_bytes(b""),
    ],
    ids=["pickle", "code", "legacy", "empty"],
)
def test_checkpoint_of_a_stranger_is_one_line(content, foreign, monkeypatch):
    monkeypatch.chdir(foreign)
    content(foreign / "checkpoints" / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"best.ckpt is damaged or not a checkpoint"):
        evaluate(foreign / "checkpoints" / "best.ckpt", "test")
    assert not (foreign / "ran").exists()


@pytest.mark.parametrize("parts", [{}, {"state_dict": 3}, {"state_dict": {"model.1.weight": "text"}}], ids=str)
def test_parts_of_another_kind_are_one_line(parts, foreign):
    torch.save(parts, foreign / "checkpoints" / "best.ckpt")
    with pytest.raises(USER_ERRORS, match=r"does not fit the run of"):
        evaluate(foreign / "checkpoints" / "best.ckpt", "test")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "- 1"),
        ("config.yaml", "\x00"),
        ("config.yaml", "nope: 1"),
        ("config.yaml", "seed: 1\ntrainer:\n"),
        ("config.yaml", "seed: !!python/object/apply:os.system ['touch ran']"),
        ("results.json", "{"),
        ("results.json", "[]"),
    ],
)
def test_malformed_files_are_one_line(name, text, foreign, monkeypatch):
    monkeypatch.chdir(foreign)
    (foreign / name).write_text(text)
    with pytest.raises(USER_ERRORS) as caught:
        evaluate(foreign / "checkpoints" / "best.ckpt", "test")
    assert name in str(caught.value) or "nope" in str(caught.value)
    assert not (foreign / "ran").exists()
