"""compile=true changes the time of a run and nothing else."""

import shutil

import pytest
import torch
import torch._inductor.config as inductor
from torch import nn

from fgtrain.compilation import compile_model
from fgtrain.errors import ConfigError
from tests.test_script import results_under, train

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled before is found; what is changed is put back."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("method", ["backprop", "fwdgrad", "spsa", "activity", "backprop_checkpoint"])
def test_same_numbers_through_the_script(method, fresh, tmp_path, monkeypatch):
    source = """
from torch import nn


class DropoutNet(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, num_classes))
"""
    (tmp_path / "dropout_net.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for flag in ("false", "true"):
        options = ["model._target_=dropout_net.DropoutNet", "trainer.max_steps=20", "trainer.val_check_interval=10"]
        status, _, err = train(
            tmp_path, f"method={method}", f"compile={flag}", f"hydra.run.dir=compile_{flag}", *options
        )
        assert status == 0, err
        (results,) = results_under(tmp_path / f"compile_{flag}")
        found.append(results["metrics"])
    plain, compiled = found
    for name in ("train/loss", "val/loss", "test/loss"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-5), name


def test_without_a_compiler_it_is_one_line(fresh):
    with (
        inductor.patch({"cpp.cxx": ("no_such_compiler",)}),
        pytest.raises(ConfigError, match=r"^compile=true: torch.compile fails here.*use compile=false$"),
    ):
        compile_model(nn.Linear(2, 2), torch.device("cpu"))
