"""Output: what cannot be written is told before the work, devices stay devices, and any terminal or pipe will do."""

import io
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgtrain import __main__ as console
from fgtrain.errors import ConfigError, StorageError
from fgtrain.lightning.atomic_files import is_device, make_folder, refuse_unwritable, write_atomically
from fgtrain.runs.messages import USER_ERRORS
from fgtrain.runs.owner import owned
from fgtrain.studies.compare.finished import read
from fgtrain.studies.compare.plan import compose_run, parse, quoted
from fgtrain.studies.compare.runs import _finish
from tests.commands import run_compare

NAMES = ["it's", "a=b, c", "[1,2]", 'say "x"', "ünï", "end\\"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command of the console; (exit status, the line on stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fgtrain", *arguments])
        with pytest.raises(SystemExit) as end:
            console.main()
        out, err = capsys.readouterr()
        assert out == ""
        return end.value.code, err

    return run


@pytest.fixture
def finished(tmp_path):
    """The folder of a run, as far as the commands look before their work."""
    (tmp_path / "run").mkdir()
    keys = ("lr", "data", "model", "method", "optimizer", "trainer", "task")
    (tmp_path / "run" / "config.yaml").write_text("".join(f"{key}: 1\n" for key in keys))
    return tmp_path / "run"


def works(*_, **__):
    raise AssertionError("the work began")


@pytest.mark.parametrize(("place", "reason"), [("", "Is a directory"), ("file/x", "it is not a folder")])
@pytest.mark.parametrize("command", ["evaluate", "replay", "bench"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    command, place, reason, finished, run, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("fgtrain.runs.evaluate.read_checked", lambda _: {})
    monkeypatch.setattr("fgtrain.runs.evaluate.build", works)
    monkeypatch.setattr("fgtrain.commands.replay.replay", works)
    monkeypatch.setattr("fgtrain.commands.bench.measure", works)
    checkpoint = finished / "last.ckpt"
    checkpoint.touch()
    path = str(tmp_path / place)
    arguments = {"evaluate": [checkpoint, "--out", path], "replay": [finished, path], "bench": ["--json", path]}
    status, err = run(command, *map(str, arguments[command]))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("fgtrain: cannot write ")
    assert reason in err


@pytest.mark.parametrize(
    "command", [["train"], ["evaluate", "."], ["replay", ".", "w.pt"], ["compare", "methods=[backprop]", "out=here"]]
)
def test_a_path_that_hydra_would_resolve_is_told_before_the_work(command, finished, run, tmp_path, monkeypatch):
    folder = finished.rename(tmp_path / "a${now:%Y}b")
    (folder / "last.ckpt").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("fgtrain.runs.evaluate.first_good", lambda found: found[0])
    monkeypatch.setattr("fgtrain.runs.replay._read_log", lambda _: {})
    status, err = run(*command)
    assert (status, err.count("\n")) == (2, 1)
    assert f"fgtrain: the path {folder}" in err
    assert "contains ${, which Hydra resolves; use another folder" in err
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_missing_folders_of_a_file_are_made(tmp_path):
    refuse_unwritable(tmp_path / "new" / "folder" / "x.json")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="a folder in which nobody can make a file")
def test_a_folder_that_takes_no_files():
    with pytest.raises(StorageError, match=r"cannot write /proc/self/fd: "):
        make_folder(Path("/proc/self/fd"))
    with pytest.raises(StorageError, match=r"cannot write /proc/self/fd: "):
        refuse_unwritable(Path("/proc/self/fd/x.json"))


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    refuse_unwritable(pipe)
    write_atomically("text", pipe)
    reader.join(10)
    assert read == ["text"]
    assert list(tmp_path.iterdir()) == [pipe]
    assert pipe.is_fifo()


@pytest.mark.parametrize(("name", "number"), [("stdout", 1), ("stderr", 2), ("fd/1", 1)])
def test_a_stream_that_leads_to_a_file_goes_on_where_it_is(name, number, capfd):  # which leads it to a file
    path = Path("/dev") / name
    os.write(number, b"first, ")
    refuse_unwritable(path)
    write_atomically("second, ", path)
    os.write(number, b"third")
    assert "".join(capfd.readouterr()) == "first, second, third"


@pytest.mark.parametrize("name", ["null", "stdout", "fd/1"])
def test_devices_are_known(name):
    assert is_device(Path("/dev") / name)
    assert not is_device(Path(__file__))
    assert not is_device(Path(__file__).parent)


def test_characters_that_the_terminal_lacks(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["fgtrain", "bench"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr("fgtrain.commands.bench.main", lambda: print("results in ünï"))
    assert console.main() == 0
    assert written.getvalue() == b"results in \\xfcn\\xef\n"


@pytest.mark.parametrize("arguments", [["--help"], ["bench"], ["compare", "--help"]])
def test_a_reader_that_is_gone_ends_a_command(arguments, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["fgtrain", *arguments])
    monkeypatch.setattr("fgtrain.commands.bench.main", lambda: print("results"))
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            console.main()
    assert (end.value.code, capsys.readouterr().err) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fgtrain", "bench"])
    monkeypatch.setattr("fgtrain.commands.bench.main", lambda: print("results"))
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            console.main()
    assert (end.value.code, capsys.readouterr().err) == (
        2,
        "fgtrain: cannot write to stdout: No space left on device\n",
    )


def test_a_current_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "argv", ["fgtrain", "bench"])
    assert console.main() == 2
    err = capsys.readouterr().err
    assert err == "fgtrain: the current folder cannot be used (No such file or directory); change to another one\n"


def test_ctrl_c_keeps_the_rows_of_a_benchmark(tmp_path, monkeypatch, capsys):
    def measure(model, *_, **__):
        if model == "cnn":
            raise KeyboardInterrupt
        return [SimpleNamespace(as_dict=lambda: {"model": model})]

    path = tmp_path / "rows.json"
    monkeypatch.setattr("fgtrain.commands.bench.measure", measure)
    monkeypatch.setattr(sys, "argv", ["fgtrain", "bench", "--models", "mlp", "cnn", "--json", str(path)])
    assert console.main() == 130
    assert json.loads(path.read_text()) == [{"model": "mlp"}]
    assert capsys.readouterr() == ("", "fgtrain: interrupted\n")


@pytest.mark.parametrize(
    "option",
    [
        "--batch-sizes 8 0",
        "--rounds 0",
        "--threads -1",
        "--num-tangents 0",
        "--ranks 0",
        "--gbit 0",
        "--models mlp nope",
    ],
)
def test_bad_arguments_of_a_benchmark_are_told_before_it(option, run, monkeypatch):
    monkeypatch.setattr("fgtrain.commands.bench.measure", works)
    status, err = run("bench", *option.split())
    assert (status, err.count("\n")) == (2, 1)
    assert option.split()[0] in err or "no classification model 'nope'" in err


def test_json_has_an_effect_or_is_refused(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    status, err = run("bench", "--thin-wire", "--json", str(path))
    assert (status, "leave out --json" in err) == (2, True)
    monkeypatch.setattr("fgtrain.commands.bench.loop_overhead", lambda _: {"bare_us": 1.0, "to_plain": 2.0})
    monkeypatch.setattr(sys, "argv", ["fgtrain", "bench", "--loop", "--methods", "mezo", "--json", str(path)])
    assert console.main() == 0
    assert json.loads(path.read_text()) == [{"method": "mezo", "bare_us": 1.0, "to_plain": 2.0}]


@pytest.mark.parametrize("name", NAMES)
def test_a_comparison_in_a_folder_of_any_name(name, tmp_path):
    own = tmp_path / name
    (own / "method").mkdir(parents=True)
    (own / "method" / "mine.yaml").write_text("# @package _global_\nmethod:\n  _target_: fgtrain.Backprop\nlr: 0.3\n")
    cfg, _ = compose_run([], "method=mine", f"run_dir={quoted(str(own))}", config_dir=str(own))
    assert (cfg.run_dir, cfg.lr) == (str(own), 0.3)


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    command = ["methods=[backprop,fwdgrad]", "out=here"]
    with owned(tmp_path / "here"):
        with pytest.raises(ConfigError, match=r"here belongs to a run in progress .* another folder with out=\.\.\."):
            run_compare(tmp_path, *command)
        suite = tmp_path / "mine.yaml"
        suite.write_text("- {name: one, methods: [backprop]}\n")
        with pytest.raises(ConfigError, match=r"here belongs to a run in progress"):
            run_compare(tmp_path, f"suite={suite}", "out=here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == [".lock"]


def test_lost_events_of_a_comparison_are_named(tmp_path):
    """The table would have a time of 0 and would say that the target was never reached."""
    plan = parse(["methods=[backprop]", f"out={tmp_path}"])
    folder = tmp_path / "backprop" / "seed=0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"metrics": {"val/loss": 1.0}, "steps": 4}')
    with pytest.raises(ConfigError, match=r"backprop/seed=0 has lost TensorBoard events, .* delete this folder"):
        _finish(plan, plan.variants[0], 0, None, 4, folder)


def test_damaged_results_of_a_comparison_are_named(tmp_path):
    (tmp_path / "results.json").write_text('{"metr')
    with pytest.raises(USER_ERRORS, match=r"results.json cannot be read"):
        read(tmp_path, "backprop", 0)
