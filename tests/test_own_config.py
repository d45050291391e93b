"""A user's project: modules, data and configurations outside of the repository, which is not changed."""

import sys
import textwrap

import pytest
import torch
from omegaconf import OmegaConf

from fgtrain.__main__ import run
from fgtrain.runs.evaluate import evaluate
from tests.commands import PACKAGE, results_under, train


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the package my_package_N, importable only from there, and the configurations my_conf."""
    name = f"my_package_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(PACKAGE)
    files = {
        "model/wide.yaml": f"_target_: {name}.MyNet\nwidth: 32\n",
        "data/mine.yaml": f"_target_: {name}.MyData\nsize: 128\n",
        "method/doubled.yaml": f"""
            # @package _global_
            method:
              _target_: {name}.Doubled
              tangents: ${{tangents}}
              num_tangents: 2
            lr: 0.01
            """,
        "experiment/ours.yaml": """
            # @package _global_
            defaults:
              - override /model: wide
              - override /data: mine
              - override /method: doubled
              - override /tangents: low_rank
            trainer:
              max_steps: 6
              val_check_interval: 2
            """,
    }
    for path, text in files.items():
        (tmp_path / "my_conf" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my_conf" / path).write_text(textwrap.dedent(text))
    monkeypatch.setattr("sys.path", [*sys.path])
    return tmp_path, name


SHORT = ["trainer.max_steps=4", "trainer.val_check_interval=2"]


def test_targets_on_the_command_line(project):
    folder, name = project
    overrides = [f"model._target_={name}.MyNet", f"data._target_={name}.MyData", "+model.width=4", "seed=1", *SHORT]
    status, _, err = train(folder, "method=fwdgrad", *overrides)
    assert status == 0, err
    (results,) = results_under(folder)
    assert results["num_parameters"] == 5 * 4 + 4 + 4 * 2 + 2
    assert (results["model"], results["data"]) == (f"{name}.MyNet", f"{name}.MyData")
    assert results["steps"] == 4
    assert "test/acc" in results["metrics"]


@pytest.mark.slow
def test_evaluate_and_replay_find_modules_in_the_current_folder(project, monkeypatch, capsys):
    """Installed, the commands have the folder of the program in the path of imports, not the current one."""
    folder, name = project
    path = [entry for entry in sys.path if entry not in ("", str(folder))]
    overrides = [f"model._target_={name}.MyNet", f"data._target_={name}.MyData", "callbacks=replay_log", *SHORT]
    status, _, err = train(folder, *overrides, "hydra.run.dir=run", "quiet=true")
    assert status == 0, err
    monkeypatch.chdir(folder)
    for command, *arguments in (("evaluate", "--split", "val"), ("replay", "weights.pt")):
        del sys.modules[name]
        monkeypatch.setattr("sys.path", [*path])
        monkeypatch.setattr(sys, "argv", ["fgtrain", "run", *arguments])
        run(command)
    assert "val/acc" in capsys.readouterr().out
    assert (folder / "weights.pt").is_file()


@pytest.mark.slow
def test_a_class_of_ones_own_has_its_own_defaults(project):
    folder, name = project
    targets = [f"model._target_={name}.MyNet", f"data._target_={name}.Sized", f"method._target_={name}.Doubled"]
    status, _, err = train(folder, *targets, "lr=0.1", "quiet=true", *SHORT)
    assert status == 0, err
    assert err.splitlines()[0] == (
        "fgtrain: kept from the chosen file, since the new _target_ has no default: data.classes=None"
    )
    (run_dir,) = (path.parent for path in folder.rglob("config.yaml"))
    assert "_Doubled_" in run_dir.name
    saved = OmegaConf.load(run_dir / "config.yaml")
    assert dict(saved.data) == {"_target_": f"{name}.Sized", "seed": 42, "classes": None}
    assert set(saved.method) == {"_target_", "tangents", "shrinkage", "rowwise"}
    status, _, err = train(folder, "--config-dir", str(run_dir), "--config-name", "config")
    assert status == 0, err
    assert len(list(folder.glob("runs/*/*_Doubled_*"))) >= 2


LOADERS = """

from lightning.pytorch.utilities import CombinedLoader
from fgtrain.tasks import Task


class Pair(MyData):
    def train_dataloader(self):
        return {"a": self._loader(), "b": self._loader()}

    def val_dataloader(self):
        return CombinedLoader(self.train_dataloader(), "min_size")

    test_dataloader = val_dataloader


class PairTask(Task):
    def losses(self, net, pair):
        (inputs, labels), (others, _) = pair["a"], pair["b"]
        return nn.functional.cross_entropy(net(inputs), labels, reduction="none") + (net(others) ** 2).mean(1)

    def metrics(self, net, pair):
        return {"loss": self.losses(net, pair)}


class Several(MyData):
    def val_dataloader(self):
        return [self._loader(), self._loader()]


class SeveralTests(MyData):
    def test_dataloader(self):
        return {"same": self._loader(), "first": torch.utils.data.DataLoader([self.examples[0]])}
"""


@pytest.mark.slow
def test_a_task_of_ones_own_on_a_pair_of_loaders(project):
    folder, name = project
    (folder / f"{name}.py").write_text(PACKAGE + LOADERS)
    model = f"model._target_={name}.MyNet"
    options = [f"data._target_={name}.Pair", f"task._target_={name}.PairTask"]
    monitor = ["callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min"]
    status, _, err = train(folder, model, *options, *monitor, *SHORT, "hydra.run.dir=run")
    assert status == 0, err
    assert "test/loss" in results_under(folder)[0]["metrics"]
    assert evaluate(folder / "run", "train")["metrics"].keys() == {"train/loss"}
    status, _, err = train(folder, model, f"data._target_={name}.Several", *SHORT)
    assert (status, err.count("\n")) == (2, 1)
    assert "val_dataloader of Several returns 2 loaders, but a run validates on one: join" in err


@pytest.mark.slow
def test_several_test_loaders_have_their_own_results(project):
    folder, name = project
    (folder / f"{name}.py").write_text(PACKAGE + LOADERS)
    classes = [f"model._target_={name}.MyNet", f"data._target_={name}.SeveralTests"]
    status, _, err = train(folder, *classes, "hydra.run.dir=run", *SHORT)
    assert status == 0, err
    found = results_under(folder)[0]["metrics"]
    assert found["test/loss/dataloader_idx_0"] == pytest.approx(found["val/loss"])
    assert found["test/loss/dataloader_idx_1"] != pytest.approx(found["val/loss"])
    evaluated = evaluate(folder / "run", "test")["metrics"]
    assert evaluated == pytest.approx({key: value for key, value in found.items() if key.startswith("test/")})


def test_a_config_directory(project):
    folder, _ = project
    status, _, err = train(folder, "--config-dir", "my_conf", "experiment=ours")
    assert status == 0, err
    (results,) = results_under(folder)
    assert (results["method"], results["data"], results["model"]) == ("doubled", "mine", "wide")
    assert results["num_parameters"] == 5 * 32 + 32 + 32 * 2 + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model._target_=NAME.Nope"], "fgtrain: model: _target_ 'NAME.Nope' cannot be imported"),
        (["data._target_=NAME.MyNet", "+data.num_classes=2"], "fgtrain: data must be a LightningDataModule, got MyNet"),
        (
            ["data._target_=NAME.MyData", "model._target_=NAME.not_a_module"],
            "fgtrain: model must be an nn.Module, got int",
        ),
        (["data._target_=NAME.MyData", "model._target_=NAME.MyModule"], "fgtrain: model is a LightningModule"),
        (["data._target_=NAME.MyData", "model._target_=NAME.MyNet", "model.width=a"], "fgtrain: model.width"),
        (["--config-dir", "no_conf"], "fgtrain: Additional config directory"),
    ],
)
def test_mistakes_are_one_line(arguments, message, project):
    folder, name = project
    status, _, err = train(folder, *(a.replace("NAME", name) for a in arguments), *SHORT)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(message.replace("NAME", name))


def test_evaluate_in_another_folder_is_one_line(tmp_path, monkeypatch, capfd):
    values = dict.fromkeys(("data", "model", "optimizer", "trainer", "task"), "{_target_: fgtrain.Backprop}")
    values |= {"lr": "0.1", "method": "{_target_: module_of_mine.Method}"}
    (tmp_path / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "last.ckpt")])
    with pytest.raises(SystemExit):
        run("evaluate")
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith(" start the command in the folder of module_of_mine, or install it\n")
