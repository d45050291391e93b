"""The console command: it is the scripts, finds its configuration where it is installed, and answers quickly."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import fgtrain
from fgtrain import __main__ as console
from fgtrain.errors import ConfigError, UserError
from fgtrain.runs.library_errors import library_errors_named
from tests.commands import ROOT, SWEEP_ON_TWO_PROCESSES, assert_every_other_job_failed, results_under


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the console with arguments; (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["/somewhere/fgtrain", *arguments])
        try:
            status = console.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_every_script_is_its_command(monkeypatch, capsys):
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    modules = {path.stem for path in (ROOT / "fgtrain" / "commands").glob("*.py")} - {"__init__"}
    assert scripts.keys() == console.COMMANDS.keys() == modules
    for name, path in scripts.items():
        monkeypatch.setattr(f"fgtrain.commands.{name}.main", lambda name=name: print(name))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert (end.value.code, capsys.readouterr().out) == (0, f"{name}\n")


@pytest.mark.parametrize("name", console.COMMANDS)
def test_command_gets_its_arguments(name, run, monkeypatch):
    monkeypatch.setattr(f"fgtrain.commands.{name}.main", lambda: print(sys.argv))
    assert run(name, "a=1", "--b") == (0, f"['fgtrain {name}', 'a=1', '--b']\n", "")


def test_help_has_a_line_for_each_command(run):
    for arguments in ([], ["-h"], ["--help"]):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        assert re.findall(r"^  (\w+) +\w", out, flags=re.MULTILINE) == list(console.COMMANDS)


@pytest.mark.parametrize("name", [name for name in console.COMMANDS if name != "train"])
def test_help_of_a_command_names_it(name, run):
    status, out, _ = run(name, "--help")
    assert not status
    assert f"fgtrain {name} " in " ".join(out.split())


@pytest.mark.parametrize("name", [name for name in console.COMMANDS if name not in ("train", "compare")])
def test_an_unknown_option_of_a_command_is_one_line(name, run):
    status, out, err = run(name, "--nope", *(["a", "b"] if name == "replay" else ["a"] if name == "evaluate" else []))
    assert (status, out) == (2, "")
    assert err == "fgtrain: unrecognized arguments: --nope; --help describes the arguments\n"


def test_version(run):
    assert run("--version") == (0, f"fgtrain {fgtrain.__version__}\n", "")
    assert re.fullmatch(r"\d+\.\d+\.\d+", fgtrain.__version__)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("trian", r"did you mean train\?"), ("method=fwdgrad", "the commands are train, compare, bench, .*")],
)
def test_unknown_command_is_one_line(name, hint, run):
    status, out, err = run(name, "--help")
    assert (status, out) == (2, "")
    assert re.fullmatch(f"fgtrain: there is no command '{name}'; {hint}\n", err)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fgtrain ", "train compare bench online profiles calibrate evaluate replay"),
        ("fgtrain re", "replay"),
        ("fgtrain train  model=cnn method=fwdgrad", "method=fwdgrad method=fwdgrad_lowrank"),
        ("fgtrain bench --m", ""),
    ],
)
def test_completion(line, words, run, monkeypatch):
    monkeypatch.setenv("COMP_LINE", line)
    status, out, _ = run("-sc", "query=bash")
    assert (status or 0, out.strip()) == (0, words)


def test_completion_is_installed_for_the_command(run):
    for arguments in (["train", "-sc", "install=bash"], ["--shell-completion", "install=bash"]):
        _, out, _ = run(*arguments)
        assert out.rstrip().endswith(" -F hydra_bash_completion fgtrain")


def test_ctrl_c_is_one_line(run, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "import_module", interrupted)
    assert run("train") == (130, "", "fgtrain: interrupted\n")


@pytest.mark.parametrize("raised", [RecursionError, ConfigError])
@pytest.mark.parametrize("within", ["fgtrain.commands.train.run_app", "fgtrain.runs.launch.launch"])
def test_error_after_ctrl_c_is_one_line(within, raised, run, monkeypatch):
    def interrupted(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise raised("an import that was interrupted") from None

    monkeypatch.setattr(within, interrupted)
    assert run("train") == (130, "", "fgtrain: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_lightning_is_one_line(run, tmp_path, monkeypatch):
    class Interrupting(L.LightningModule):
        def test_step(self, batch, batch_idx):
            signal.raise_signal(signal.SIGINT)

    def evaluate():
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        trainer.test(Interrupting(), [torch.zeros(1)])

    monkeypatch.setattr("fgtrain.commands.evaluate.main", evaluate)
    status, _, err = run("evaluate")
    assert (status, err.splitlines()[-1]) == (130, "fgtrain: interrupted")


def test_public_names_are_loaded_when_used():
    assert dir(fgtrain) == sorted(fgtrain.__all__)
    assert all(getattr(fgtrain, name).__name__.endswith(name) for name in fgtrain.__all__)
    with pytest.raises(AttributeError, match="module 'fgtrain' has no attribute 'nope'"):
        fgtrain.nope  # noqa: B018 - the access itself is tested


def test_nothing_heavy_is_loaded_before_a_run():
    heavy = "{'torch', 'lightning', 'matplotlib', 'sklearn', 'scipy'}"
    code = f"import sys, fgtrain.__main__, fgtrain.commands.train; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("error", "named", "message"),
    [
        (MisconfigurationException("odd"), ConfigError, "odd"),
        (MemoryError(), UserError, r"not enough memory \(MemoryError\); use a smaller data.batch_size or model"),
        (torch.OutOfMemoryError("9 GiB"), UserError, r"not enough memory \(9 GiB\); use a smaller data.batch_size"),
        (ConfigError("mine"), ConfigError, "mine"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_errors_of_libraries(error, named, message):
    with pytest.raises(named, match=f"^{message}") as caught, library_errors_named():
        raise error
    assert type(caught.value) is named


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of processes that find fgtrain in a folder into which its wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves a build folder
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "results")
    shutil.copytree(ROOT, source, ignore=ignored)
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)
    shutil.rmtree(source)
    path = os.pathsep.join([str(folder / "site" / "bin"), os.environ["PATH"]])
    return os.environ | {"PYTHONPATH": str(folder / "site"), "PATH": path}


def output(command, folder, environ):
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_away_from_the_checkout(installed, tmp_path):
    where = [sys.executable, "-c", "import fgtrain; print(fgtrain.__file__, fgtrain.__version__)"]
    site = installed["PYTHONPATH"]
    assert output(where, tmp_path, installed) == f"{site}/fgtrain/__init__.py {fgtrain.__version__}\n"
    (metadata,) = [file for file in os.listdir(site) if file.endswith(".dist-info")]
    assert metadata == f"fgtrain-{fgtrain.__version__}.dist-info"
    assert os.path.exists(f"{site}/fgtrain/py.typed")
    ranks = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    train = ["fgtrain", "train", *ranks, "trainer.max_steps=20", "hydra.run.dir=run", "callbacks=replay_log"]
    output(train, tmp_path, installed)
    (results,) = results_under(tmp_path)
    assert (results["steps"], results["world_size"]) == (20, 2)
    said = output([sys.executable, "-m", "fgtrain", "evaluate", "run", "--split", "test"], tmp_path, installed)
    assert f"test/acc {results['metrics']['test/acc']:.6g}" in said
    assert output(["fgtrain", "replay", "run", "weights.pt"], tmp_path, installed).startswith("20 steps replayed")
    command = ["fgtrain", "compare", "methods=[backprop]", "seeds=1", "budget=3steps", "out=compared"]
    output(command, tmp_path, installed)
    assert (tmp_path / "compared" / "table.md").read_text().count(f"`{shlex.join(command)}`") == 1


@pytest.mark.slow
def test_wheel_started_by_joblib(installed, tmp_path):
    command = ["fgtrain", "train", *SWEEP_ON_TWO_PROCESSES, "hydra/launcher=joblib"]
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=False)
    assert_every_other_job_failed(tmp_path, done.returncode, done.stderr)


@pytest.mark.slow
def test_wheel_started_by_torchrun(installed, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m"]
    output([*torchrun, "fgtrain", "train", "trainer=ddp", "trainer.max_steps=20", "quiet=true"], tmp_path, installed)
    (results,) = results_under(tmp_path)
    assert results["world_size"] == 2


@pytest.mark.slow
def test_source_distribution_holds_its_tests_and_what_they_read(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    folders = ("conf", "fgtrain", "scripts", "tests")
    files = {path.relative_to(source).as_posix() for f in folders for path in (source / f).rglob("*") if path.is_file()}
    build = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, check=True)
    with tarfile.open(tmp_path / f"fgtrain-{fgtrain.__version__}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(files - held) == []


CTRL_C_AT = """
import os, runpy, signal, sys
_, module = sys.argv

class Finder:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["fgtrain", "train"]
runpy.run_module("fgtrain", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["hydra", "torch", "lightning", "torchvision", "fgtrain.runs.run"])
def test_ctrl_c_during_imports(module, tmp_path):
    command = [sys.executable, "-c", CTRL_C_AT, module]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "fgtrain: interrupted\n")
