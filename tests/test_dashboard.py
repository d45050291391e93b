"""What a run shows in TensorBoard and on the terminal."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from fgtrain import ForwardGradient
from fgtrain.lightning.callbacks import Dashboard, Monitor, StepProgress, Summary
from tests.commands import train
from tests.kills import PATIENCE
from tests.small import Small, assert_equal_weights, make, trainer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def events_of(folder):
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two methods on digits, and a path on a test function."""
    folder = tmp_path_factory.mktemp("sweep")
    options = ["trainer.max_steps=100", "trainer.val_check_interval=25"]
    quality = ["callbacks=gradient_quality", "callbacks.gradient_quality.every_n_steps=20"]
    status, _, err = train(folder, "-m", "method=backprop,fwdgrad", "quiet=true", *quality, *options)
    assert status == 0, err
    assert train(folder, "task=beale", "run_dir=multirun/beale", "trainer.max_steps=100")[0] == 0
    return folder


def runs(sweep, name):
    (found,) = (path.parent for path in sweep.rglob("results.json") if name in path.parent.name)
    return found


@pytest.mark.slow
def test_scalars_images_and_histograms(sweep):
    tags = events_of(runs(sweep, "fwdgrad")).Tags()
    assert {"train/loss", "val/acc", "quality/cosine", "quality/relative_squared_error"} <= set(tags["scalars"])
    assert "hp_metric" not in tags["scalars"]
    assert tags["histograms"] == ["train/directional_derivatives"]
    assert events_of(runs(sweep, "beale")).Tags()["images"] == ["trajectory"]


@pytest.mark.slow
def test_hyperparameters_and_final_metrics(sweep):
    for method, num_tangents in (("backprop", 0), ("fwdgrad", 1)):
        events = events_of(runs(sweep, method))
        content = events.PluginTagToContent("hparams")["_hparams_/experiment"]
        infos = vars(plugin_data_pb2)["HParamsPluginData"].FromString(content).experiment.metric_infos
        ends = {info.name.tag: events.Scalars(info.name.tag) for info in infos}
        assert {"test/acc", "val/loss", "train/steps_per_second", "train/memory_mib"} <= ends.keys()
        assert all(points[-1].step in (99, 100) for points in ends.values())  # a validation counts from 0
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        start = vars(plugin_data_pb2)["HParamsPluginData"].FromString(content).session_start_info.hparams
        assert start["method"].string_value == method
        assert start["K"].number_value == num_tangents
        assert start["lr"].number_value > 0
        assert sorted(start)[:5] == [
            "K",
            "lr",
            "method",
            "tangents",
            "train_seconds",
        ]  # what TensorBoard shows without being asked


@pytest.mark.slow
def test_layout_names_what_is_logged(sweep):
    events = events_of(runs(sweep, "fwdgrad"))
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = vars(layout_pb2)["Layout"].FromString(tensor.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["progress", "estimator quality", "cost"]
    charted = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert not charted - set(events.Tags()["scalars"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["backprop", "fwdgrad", "beale"])
def test_no_chart_is_empty_or_a_single_dot(sweep, name):
    events = events_of(runs(sweep, name))
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = vars(layout_pb2)["Layout"].FromString(tensor.tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    scalars = {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    assert all(scalars.keys() & set(chart.multiline.tag) for chart in charts)
    assert {tag for tag, points in scalars.items() if points < 2} <= {"test/acc", "test/loss"}
    assert "epoch" not in scalars


@pytest.mark.slow
def test_config_is_text(sweep):
    (tensor,) = events_of(runs(sweep, "fwdgrad")).Tensors("config/text_summary")
    assert b"    max_steps: 100" in tensor.tensor_proto.string_val[0]


def test_observers_change_nothing(tmp_path):
    def model():
        layers = [torch.nn.Flatten(), torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5)]
        return torch.nn.Sequential(*layers, torch.nn.Linear(6, 3))

    torch.manual_seed(1)
    watched, alone = make(ForwardGradient(), model()), make(ForwardGradient(), model())
    alone.model.load_state_dict(watched.model.state_dict())
    observers = [Summary(), Monitor(1), StepProgress(), Dashboard({})]
    torch.manual_seed(2)
    trainer(tmp_path, *observers, max_steps=8, logger=TensorBoardLogger(tmp_path)).fit(watched, Small())
    torch.manual_seed(2)
    trainer(tmp_path, max_steps=8).fit(alone, Small())
    assert_equal_weights(watched.state_dict(), alone.state_dict())


@pytest.mark.slow
def test_terminal(tmp_path):
    status, out, err = train(
        tmp_path, "method=fwdgrad_lowrank", "trainer.max_steps=40", "trainer.val_check_interval=20"
    )
    assert status == 0
    lines = err.splitlines()
    assert lines[0].split() == ["parameters", "4,810", "in", "4", "tensors"]
    assert lines[1].startswith("tangents         16 a step, LowRank")
    assert lines[2].startswith("expected error   0.998 times")  # sqrt(s / (1 + s)), s = (4810 - 1) / 16
    assert lines[2].rstrip().endswith("cosine 0.058")  # 1 / sqrt(1 + s)
    assert lines[3].startswith("memory per step  ")
    assert sum(line.startswith("step ") for line in lines) == 10
    assert "\x1b" not in out + err  # no control characters into a file
    assert train(tmp_path, "method=backprop", "quiet=true", "trainer.max_steps=3") == (0, "", "")


TABS = {"scalars": "timeseries", "custom_scalars": "custom_scalars", "hparams": "hparams", "images": "images"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_pages_in_a_browser(sweep, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", str(port), "--logdir", sweep]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keep = os.environ.get("FGTRAIN_SCREENSHOTS")  # a folder, to look at them
    try:
        url = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(url, timeout=PATIENCE).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.3)
        sizes = {}
        for name, tab in TABS.items():
            picture = tmp_path / f"{name}.png"
            screenshot(f"{url}#{tab}", picture, tmp_path / f"profile_{name}")
            pixels = imread(picture)[64:, :, :3]  # without the tool bar
            sizes[name] = len(torch.unique(torch.tensor(pixels).reshape(-1, 3).mul(255).int(), dim=0))
            if keep:
                shutil.copy(picture, keep)
        assert min(sizes.values()) > 30, sizes  # colours: an empty page has a handful
    finally:
        server.terminate()
        server.wait()


def screenshot(url, picture, profile):
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--window-size=1400,900", "--virtual-time-budget=20000"]
    subprocess.run([*command, f"--screenshot={picture}", url], check=True, capture_output=True, timeout=PATIENCE)
