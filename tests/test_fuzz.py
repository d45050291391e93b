"""Every command line and configuration gives a run, or one line and a non-zero status."""

import io
import random
import string
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from fgtrain.runs.cli import run_app
from fgtrain.runs.config import to_plain
from fgtrain.runs.config_check import check
from fgtrain.runs.world import plan
from tests.commands import CONF, options

GROUPS = sorted(group.name for group in CONF.iterdir() if group.is_dir() and options(group.name))
KEYS = """
seed lr accumulate_grad_batches clip_grad_norm shrinkage rowwise max_skipped_steps detect_divergence self_check resume
quiet distributed.tangents distributed.timeout_seconds distributed.check_every_n_steps method.num_tangents
distributed.gradients distributed.local_steps
method.combine method.tangents method.chunk_size method._target_ tangents._target_ data.batch_size data._target_
model.hidden model._target_ optimizer.momentum optimizer._target_ scheduler._target_ trainer.max_steps
trainer.precision trainer.devices trainer.strategy trainer.num_nodes trainer._target_ callbacks.checkpoint
task._target_
""".split()  # noqa: SIM905 - a list of forty names reads worse
BAD_VALUES = """
abc -1 -0.5 nan -inf [] [abc] {} {a:1} null true ${nope} ${lr ??? 1e999 [1, {a 'x "x a=b ../x 0x10 1_0 \\ ,1 1, ]
os.getcwd fgtrain fgtrain.Nope builtins.int 3.7.1 é 🙂
""".split()  # noqa: SIM905
SYNTAX = [
    "=",
    "==1",
    "lr",
    "lr==",
    "~",
    "~lr=",
    "+=",
    "++",
    "@lr=1",
    "lr@x=1",
    "--",
    "--nope",
    "-x",
    "--config-name",
    "-c",
]
SYNTAX += ["--config-name=nope", "--config-dir=nope", "--multirun=1", "--package", "lr=[", "hydra=1", "hydra.run=3"]
SYNTAX += [
    "+method=backprop",
    "method@x=backprop",
    "method=[backprop,fwdgrad]",
    "method=null",
    "hydra.nope=1",
    "\x00",
    "",
]


SEEDS = range(10)  # 50 refusals each


def words(draw):
    return "".join(draw.choice(string.printable) for _ in range(draw.randrange(1, 12)))


def arguments(draw):
    """A command line that very likely has at least one mistake."""
    kinds = [
        lambda: f"{draw.choice(GROUPS)}={draw.choice(BAD_VALUES)}",
        lambda: f"{draw.choice(['', '+', '++', '~'])}{draw.choice(KEYS)}={draw.choice(BAD_VALUES)}",
        lambda: f"{draw.choice(['', '+'])}{draw.choice(KEYS)}x={draw.choice(BAD_VALUES)}",
        lambda: draw.choice(SYNTAX),
        lambda: words(draw),
        lambda: f"{draw.choice(KEYS)}={words(draw)}",
    ]
    return [draw.choice(kinds)() for _ in range(draw.randrange(1, 4))]


def config_file(draw):
    """A group's file with a line of it altered."""
    group = draw.choice(GROUPS)
    text = (CONF / group / f"{draw.choice(options(group))}.yaml").read_text()
    lines = text.splitlines() or [""]
    at = draw.randrange(len(lines))
    key = lines[at].partition(":")[0]
    lines[at] = draw.choice(
        [f"{key}: {draw.choice(BAD_VALUES)}", f"{key}x: 1", f"\t{lines[at]}", words(draw), "", "defaults: [nope]", "[]"]
    )
    return group, "\n".join(lines)


def config_stage(cfg):
    """All that happens before something is built."""
    check(cfg)
    plan(to_plain(cfg)["trainer"])


def outcome(*given):
    """Status and what was printed on stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["train.py", *given])
        patch.setattr(sys, "path", [*sys.path])
        try:
            run_app(config_stage, config_name="train")
        except SystemExit as end:
            status = end.code
    return status, err.getvalue()


def refused(*given):
    """Whether it is; it must be so in one line, or in one for each job of a sweep."""
    try:
        status, err = outcome(*given)
    except Exception as error:
        pytest.fail(f"{given} ends in {type(error).__name__}: {error}")
    if status == 0:
        return False
    assert status == 2, (given, err)
    lines = err.splitlines()
    assert all(line.startswith("fgtrain: ") for line in lines), (given, err)
    jobs = sum(line.startswith("fgtrain: job ") for line in lines)
    assert len(lines) == (jobs + 1 if jobs else 1), (given, err)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_malformed_command_lines(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, count = random.Random(seed), 0
    while count < 35:
        count += refused("hydra.run.dir=run", *arguments(draw))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_malformed_config_files(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, count = random.Random(seed), 0
    while count < 15:
        group, text = config_file(draw)
        (tmp_path / "conf" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / group / "fuzzed.yaml").write_text(text)
        count += refused("--config-dir", "conf", "hydra.run.dir=run", f"{group}=fuzzed")
