"""A run writes no values from the environment anywhere, and it can still be repeated and resumed."""

import pytest
import torch
from omegaconf import OmegaConf

from fgtrain.runs.config import to_plain, to_saved, typed
from tests.commands import composed, results_under, train

SECRET = "hunter2"
SHORT = ("trainer.max_steps=4", "trainer.val_check_interval=2", "quiet=true", "method=backprop", "data=text")
SHORT += ("task=language_modeling", "model=lstm", "data.path='${oc.env:FOLDER}/text'", "lr='${oc.env:RATE}'")
SHORT += ("data.batch_size='${oc.decode:${oc.env:BATCH}}'",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / SECRET).mkdir()
    (tmp_path / SECRET / "text").write_text("a text of one's own. " * 100)
    for name, value in {"FOLDER": str(tmp_path / SECRET), "RATE": "0.1", "BATCH": "8"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def leaks(folder):
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def weights(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_a_run_repeated_and_resumed(folder, monkeypatch):
    status, _, err = train(folder, *SHORT, "hydra.run.dir=run")
    assert status == 0, err
    saved = (folder / "run" / "config.yaml").read_text()
    assert "path: ${oc.env:FOLDER}/text" in saved
    assert "batch_size: ${oc.decode:${oc.env:BATCH}}" in saved
    status, _, err = train(folder, "--config-dir", "run", "--config-name", "config", "hydra.run.dir=again")
    assert status == 0, err
    before, after = weights(folder / "run"), weights(folder / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)
    status, _, err = train(folder, *SHORT, "hydra.run.dir=run", "resume=auto", "trainer.max_steps=6")
    assert status == 0, err
    status, _, err = train(folder, *SHORT, "hydra.run.dir=run", "resume=auto", "data.path=other")
    assert (status, err.count("\n")) == (2, 1)
    assert "data.path is ${oc.env:FOLDER}/text in the run of" in err
    monkeypatch.setenv("RATE", "0.2")
    status, _, err = train(folder, *SHORT, "hydra.run.dir=run", "resume=auto", "lr=0.1", "trainer.max_steps=8")
    assert (status, err.count("\n")) == (2, 1)
    assert "lr is ${oc.env:RATE} in the run of" in err
    assert leaks(folder) == []


def test_another_process_gets_the_same_values(folder):
    """They are strings in the environment; the top level of the configuration has types."""
    cfg = composed("lr='${oc.env:RATE}'", "seed='${oc.env:BATCH}'", "max_skipped_share='${oc.env:RATE}'")
    assert to_plain(typed(to_saved(cfg))) == to_plain(cfg)


@pytest.mark.slow
def test_several_processes(folder):
    processes = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "callbacks=none")
    status, _, err = train(folder, *SHORT, *processes, "seed='${oc.env:BATCH}'")
    assert status == 0, err
    assert leaks(folder) == []


@pytest.mark.slow
def test_a_sweep(folder):
    status, _, err = train(folder, *SHORT, "seed=0,1", "-m")
    assert status == 0, err
    assert len(results_under(folder)) == 2
    assert leaks(folder) == []
    assert len(list(folder.rglob(f"*{SECRET}*"))) == 1


def test_what_refers_to_it_is_not_written_either(monkeypatch):
    monkeypatch.setenv("NAME", SECRET)
    cfg = OmegaConf.create(
        {
            "a": "${oc.env:NAME}",
            "b": {"c": ["${a}", "x${.0}", 3, "${d}"], "e": "${oc.env:NONE,7}"},
            "d": 4,
            "f": "${b}",
        }
    )
    saved = to_saved(cfg)
    assert saved == {"a": "${oc.env:NAME}", "b": {"c": ["${a}", "x${.0}", 3, 4], "e": "${oc.env:NONE,7}"}} | {
        "d": 4,
        "f": "${b}",
    }
    assert to_plain(OmegaConf.create(saved)) == to_plain(cfg)


def test_what_is_joined_with_it_is_resolved(monkeypatch):
    """A run is resumed at another time, and read where Hydra does not run."""
    monkeypatch.setenv("NAME", SECRET)
    cfg = OmegaConf.create(
        {"a": "${turn:}/${oc.env:NAME}", "b": "${a}", "c": "${d}-${oc.env:NONE,x}-${turn:}", "d": "${oc.env:NAME}"}
        | {"e": "${oc.decode:${oc.env:FOUR}}", "f": [r"\${oc.env:NAME}${oc.env:NAME}"]}
    )
    monkeypatch.setenv("FOUR", "4")
    OmegaConf.register_new_resolver("turn", lambda: "now", replace=True)
    saved, plain = to_saved(cfg), to_plain(cfg)
    OmegaConf.clear_resolver("turn")
    assert SECRET not in str(saved)
    assert to_plain(OmegaConf.create(saved)) == plain
    assert (saved["a"], saved["b"], saved["c"]) == ("now/${oc.env:NAME}", "${a}", "${oc.env:NAME}-${oc.env:NONE,x}-now")
