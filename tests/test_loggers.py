"""A run writes its curves where `logger=` says: to TensorBoard, a CSV file, Weights & Biases, MLflow, or nowhere."""

import csv

import pytest

from tests.commands import train

SHORT = ("method=fwdgrad", "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1")
SHORT += ("self_check=false", "quiet=true", "hydra.run.dir=mine")


def test_csv_beside_tensorboard(tmp_path):
    status, _, err = train(tmp_path, *SHORT, "logger=[tensorboard,csv]")
    assert status == 0, err
    assert list((tmp_path / "mine").glob("events.out.tfevents.*"))
    folder = tmp_path / "mine" / "csv" / "version_0"
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["1", "2", "3", "4"]
    assert rows[-1]["step"] == "4"
    assert float(rows[-1]["val/acc"]) == float(next(row["val/acc"] for row in reversed(rows[:-1]) if row["val/acc"]))
    assert "num_tangents: 1" in (folder / "hparams.yaml").read_text()


def test_none(tmp_path):
    status, out, err = train(tmp_path, *SHORT[:-2], "hydra.run.dir=mine", "logger=none")
    assert status == 0, err
    assert "tensorboard" not in out
    assert not list((tmp_path / "mine").glob("events*"))
    assert (tmp_path / "mine" / "results.json").exists()


@pytest.mark.slow
def test_the_logger_of_a_continued_run_may_change(tmp_path):
    assert train(tmp_path, *SHORT)[0] == 0
    status, _, err = train(tmp_path, *SHORT, "trainer.max_steps=6", "logger=csv", "resume=auto")
    assert status == 0, err
    assert (tmp_path / "mine" / "csv" / "version_0" / "metrics.csv").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(f"lightning.pytorch.loggers.{name}._{name.upper()}_AVAILABLE", False)
    status, _, err = train(tmp_path, *SHORT, f"logger={name}")
    assert status == 2
    assert err == f"fgtrain: logger={name} needs a package that is not installed; pip install {name}\n"


@pytest.mark.filterwarnings("ignore")  # the packages have warnings of their own
def test_wandb_offline(tmp_path):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    status, _, err = train(tmp_path, *SHORT, "task=beale", "logger=wandb", "logger.wandb.offline=true")
    assert status == 0, err
    assert wandb.run is None
    (folder,) = (tmp_path / "mine" / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    assert list((folder / "files" / "media" / "images").glob("trajectory*.png"))


@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_database(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow")
    pytest.importorskip("sqlalchemy", reason="pip install mlflow")  # mlflow-skinny lacks it
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    status, _, err = train(tmp_path, *SHORT, "logger=mlflow")
    assert status == 0, err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("fgtrain").experiment_id])
    assert run.data.params["method/num_tangents"] == "1"
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 4
