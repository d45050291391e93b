"""A run from its seed and K floats a step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgtrain.commands.replay import main as run_command
from fgtrain.errors import CheckpointError, ConfigError, StorageError
from fgtrain.lightning.atomic_files import save_atomically
from fgtrain.lightning.checkpoints import read_checked
from fgtrain.runs.messages import USER_ERRORS
from fgtrain.runs.replay import replay
from tests.commands import results_under, train
from tests.every_method import EVERY_METHOD
from tests.every_method import make as make_estimator
from tests.interrupted import SignalAt

LOGGED = ("callbacks=replay_log", "hydra.run.dir=run", "trainer.max_steps=30", "trainer.val_check_interval=10")


def weights(folder):
    return read_checked(folder / "run" / "checkpoints" / "last.ckpt")["state_dict"]


def assert_replays(folder):
    module, _ = replay(folder / "run")
    expected = weights(folder)
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, expected[f"model.{name}"]), name


@pytest.mark.slow
@EVERY_METHOD
def test_replay_rebuilds_the_weights(method, tmp_path):
    if not make_estimator(method).scalar_reducible:
        pytest.skip("needs the data: test_methods_that_need_the_data_are_refused")
    # forward_exact takes a derivative per number
    smaller = ["model.hidden=[2]", "trainer.max_steps=5", "trainer.val_check_interval=2"] * (method == "forward_exact")
    assert train(tmp_path, f"method={method}", *LOGGED, *smaller)[0] == 0
    assert_replays(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("method.num_tangents=3", "optimizer=adam", "clip_grad_norm=0.1"),
        ("accumulate_grad_batches=2", "scheduler.warmup_steps=5", "method.combine=projection", "method.num_tangents=2"),
        ("trainer.max_steps=-1", "trainer.max_epochs=3", "trainer.precision=64-true"),
    ],
    ids=" ".join,
)
def test_whatever_the_training_is(options, tmp_path):
    assert train(tmp_path, *LOGGED, *options)[0] == 0
    assert_replays(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_run_that_was_cut(tmp_path, monkeypatch):
    """The checkpoint holds the log of the step after which it is written, wherever its callback stands."""
    options = (*LOGGED, "callbacks.recovery.every_n_steps=7")
    with monkeypatch.context() as patch:
        patch.setattr("fgtrain.runs.build.StepProgress", lambda: SignalAt(16))
        assert train(tmp_path, *options)[0] == 143
    assert_replays(tmp_path)
    assert train(tmp_path, *options, "resume=auto")[0] == 0
    assert_replays(tmp_path)


@pytest.mark.slow
def test_script_and_size(tmp_path, monkeypatch, capsys):
    steps = 300
    assert train(tmp_path, *LOGGED, f"trainer.max_steps={steps}", "trainer.val_check_interval=300")[0] == 0
    assert (tmp_path / "run" / "replay.pt").stat().st_size < 4 * steps + 4096
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["replay.py", "run", "weights.pt"])
    run_command()
    said = f"{steps} steps replayed: bit for bit the weights of the run, written to weights.pt\n"
    assert capsys.readouterr().out == said
    rebuilt, expected = torch.load(tmp_path / "weights.pt", weights_only=True), weights(tmp_path)
    assert all(torch.equal(value, expected[f"model.{name}"]) for name, value in rebuilt.items())
    path = tmp_path / "run" / "replay.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"replay.pt is damaged"):
        replay(tmp_path / "run")


@pytest.mark.slow
def test_altered_logs_are_refused(tmp_path):
    assert train(tmp_path, *LOGGED)[0] == 0
    path = tmp_path / "run" / "replay.pt"
    good = read_checked(path)

    def altered(**changes):
        save_atomically({**good, **changes}, path)
        return replay(tmp_path / "run")

    derivatives = good["derivatives"].clone()
    derivatives[3] = derivatives[3].nextafter(torch.tensor(torch.inf))
    with pytest.raises(CheckpointError, match="leads to other weights than the run had after 30 steps"):
        altered(derivatives=derivatives)
    with pytest.raises(CheckpointError, match="leads to other weights"):
        altered(derivatives=good["derivatives"][:-1])
    with pytest.raises(CheckpointError, match="starts from other weights"):
        altered(initial="0")
    with pytest.raises(CheckpointError, match="is not a replay log of format 1"):
        altered(format=2)
    with pytest.raises(CheckpointError, match="derivatives cannot come from a run"):
        altered(derivatives=good["derivatives"][:0])
    save_atomically({name: value for name, value in good.items() if name != "final"}, path)
    with pytest.raises(CheckpointError, match="is not a replay log of format 1"):
        replay(tmp_path / "run")
    save_atomically(good["derivatives"], path)
    with pytest.raises(CheckpointError, match="it holds a Tensor"):
        replay(tmp_path / "run")
    save_atomically(good, path)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config.yaml is missing; give the folder of a run"):
        altered()


def test_methods_that_need_the_data_are_refused(tmp_path):
    status, _, err = train(tmp_path, "method=backprop", *LOGGED)
    assert (status, err.count("\n")) == (2, 1), err
    assert "unlike those of Backprop; use ForwardGradient, GaussNewton, SPSA or MeZO (" in err


@pytest.mark.slow
def test_saved_configuration_runs_again(tmp_path):
    assert train(tmp_path, "hydra.run.dir=run", "trainer.max_steps=20", "seed=3", "method.num_tangents=2")[0] == 0
    status, _, err = train(tmp_path, "--config-dir", "run", "--config-name", "config")
    assert status == 0, err
    first, again = results_under(tmp_path)
    same = ("method", "task", "data", "model", "seed", "steps", "num_parameters")
    assert {name: first[name] for name in same} == {name: again[name] for name in same}
    measured = {"train/step_ms", "train/peak_memory_mib"}
    first_metrics, metrics = ({k: v for k, v in r["metrics"].items() if k not in measured} for r in (first, again))
    assert "test/acc" in metrics
    assert metrics == first_metrics
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["seed"] == 3
    assert torch.__version__.startswith(provenance["packages"]["torch"])
    assert "hydra.run.dir=run" in provenance["command"]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert (provenance["git"] or {"commit": ""})["commit"] == commit  # none outside a checkout


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("derivatives", [1.0]),
        ("derivatives", torch.zeros(30, 0)),
        ("derivatives", torch.zeros(30, 1, dtype=torch.complex64)),
        ("derivatives", torch.zeros(30)),
        pytest.param(
            "derivatives",
            torch.ones(30, 1).to_sparse(),
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
            id="sparse",
        ),
        ("steps", "30"),
        ("steps", -1),
        ("batches_per_epoch", 0),
        ("batches_per_epoch", 2.5),
        ("initial", 3),
        ("final", None),
    ],
    ids=str,
)
def test_log_of_a_stranger_is_one_line(part, value, tmp_path):
    log = {"format": 1, "initial": "a", "final": "b", "steps": 30, "batches_per_epoch": 5}
    save_atomically(log | {"derivatives": torch.zeros(30, 1), part: value}, tmp_path / "replay.pt")
    with pytest.raises(CheckpointError, match=rf"replay.pt is damaged: {part} cannot come from a run"):
        replay(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("", "it has no lr, data, model"), ("nonsense: 1", "config.yaml is not the config")]
)
def test_a_configuration_of_a_stranger_is_one_line(text, message, tmp_path):
    log = {"format": 1, "initial": "a", "final": "b", "steps": 30, "batches_per_epoch": 5}
    save_atomically(log | {"derivatives": torch.zeros(30, 1)}, tmp_path / "replay.pt")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(USER_ERRORS, match=message):
        replay(tmp_path)


def test_a_file_without_a_name_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        save_atomically({}, Path())


def test_a_folder_without_a_log(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*replay.pt; only a run with callbacks=replay_log writes"):
        replay(tmp_path)


def test_a_place_that_cannot_be_written_is_noticed_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["replay", str(tmp_path), str(tmp_path / "file" / "weights.pt")])
    with pytest.raises(SystemExit):
        run_command()
    assert capsys.readouterr().err == f"fgtrain: cannot write {tmp_path / 'file'}: it is not a folder\n"
