"""Files of the configuration that name parts of PyTorch and Lightning, and messages for mistyped ones."""

import json

import lightning as L
import pytest
import torch
from hydra.utils import instantiate

from fgtrain import Backprop
from fgtrain.lightning.checkpoints import read_checked
from tests.commands import composed, train
from tests.small import Small, make, trainer

SHORT = ("trainer.max_steps=4", "trainer.val_check_interval=2", "self_check=false", "quiet=true", "hydra.run.dir=mine")


class Weights(L.Callback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_ema_averages_the_weights(tmp_path):
    average = instantiate(composed("callbacks=ema", "callbacks.ema.decay=0.75").callbacks.ema)
    module, weights = make(Backprop()), Weights()
    trainer(tmp_path, weights, average, max_steps=4).fit(module, Small())
    first, *later = weights.seen
    assert len(later) == 3
    expected = first
    for seen in later:
        expected = 0.75 * expected + 0.25 * seen
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(module.parameters()).detach(), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_ema_continues(tmp_path):
    ends = []
    for steps in ([4], [2, 4]):
        folder = tmp_path / str(len(steps))
        folder.mkdir()
        for n in steps:
            options = (*SHORT, f"trainer.max_steps={n}", "scheduler=constant", "callbacks=ema", "resume=auto")
            options += ("callbacks.recovery.every_n_steps=2",)
            status, _, err = train(folder, "method=fwdgrad", *options[1:])
            assert status == 0, err
        ends.append(read_checked(folder / "mine" / "checkpoints" / "last.ckpt"))
    straight, cut = ends
    for state in ("state_dict", "current_model_state"):
        for name, value in straight[state].items():
            assert torch.equal(value, cut[state][name]), (state, name)
    assert any(not torch.equal(v, straight["current_model_state"][k]) for k, v in straight["state_dict"].items())


def test_a_test_function_takes_every_callback(tmp_path):
    chosen = ("callbacks=[early_stopping,gradient_quality,replay_log]", "callbacks.recovery=null")
    status, _, err = train(tmp_path, "method=fwdgrad", *SHORT, "task=sphere", *chosen)
    assert status == 0, err
    written = {path.name for path in (tmp_path / "mine").iterdir()}
    assert written >= {"replay.pt", "trajectory.npz"}
    assert "checkpoints" not in written


def test_adamw_on_the_cpu_with_a_profile(tmp_path):
    cfg = composed("optimizer=adamw")
    assert isinstance(instantiate(cfg.optimizer)([torch.nn.Parameter(torch.zeros(1))]), torch.optim.AdamW)
    assert cfg.lr == 1e-3
    status, _, err = train(tmp_path, "method=backprop", "optimizer=adamw", "trainer=cpu", "profiler=simple", *SHORT)
    assert status == 0, err
    assert "run_training_batch" in (tmp_path / "mine" / "fit-profile.txt").read_text()
    assert json.loads((tmp_path / "mine" / "results.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["methd=backprop"], "methd is not a key of the configuration; did you mean method?"),
        (["precision=16"], "precision is not a key of the configuration; did you mean trainer.precision?"),
        (
            ["model.channels=3"],
            "model.channels is not a key of the configuration; it belongs to model=cnn, model=local_mixer",
        ),
        (["method.num_tangent=3"], "did you mean method.num_tangents?"),
        (
            ["model.zigzag=3"],
            "fgtrain train --info prints the keys; +model.zigzag=... adds it, if the class there takes it",
        ),
        (["method"], "; an argument is key=value, without spaces around ="),
        (["lr=0,1"], "lr gets several values; -m runs one after the other, and lr=[0,1] is one list"),
        (["--method=fwdgrad"], "--method=fwdgrad is not an option; write method=fwdgrad, without dashes"),
        (["trainer.devices=0"], "trainer.devices must be a number above 0, a list of indices or auto, got 0"),
        (["method=fwdgard"], "; did you mean method=fwdgrad?"),
        (["logger=tensorbord"], "; did you mean logger=tensorboard?"),
        (
            ["method=fwdgrad_lowrank", "tangents=sphere"],
            "tangents=sphere has no effect on the chosen method: it draws LowRank; set method.tangents.* or choose "
            "method=fwdgrad",
        ),
        (
            ["method=backprop", "tangents=low_rank", "tangents.rank=2"],
            "tangents=low_rank has no effect on the chosen method: it takes no law of tangents; choose method=fwdgrad",
        ),
    ],
)
def test_a_slip_gets_a_suggestion(arguments, end, tmp_path):
    status, _, err = train(tmp_path, *arguments, *SHORT)
    assert status == 2
    assert err.startswith("fgtrain: ")
    assert err.rstrip().endswith(end)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    status, _, err = train(tmp_path, "trainer=gpu", *SHORT)
    assert status == 2
    assert err.rstrip().endswith("PyTorch sees no GPU: use trainer=cpu, or install the build of torch for your GPU")
