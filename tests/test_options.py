"""fgtrain train --info and --help: the composed configuration, with the comments of conf/ behind its keys."""

import re
from itertools import zip_longest

import pytest
import yaml
from omegaconf import OmegaConf

from fgtrain.runs.options import commented, groups
from tests.commands import CONF, composed, train

FILES = groups()
TURNS = list(zip_longest(*([f"{group}={name}" for name in names] for group, names in FILES.items())))
KEY = re.compile(r" *[\w/]+:")


def without_comment(line):
    return line.partition(" # ")[0]


@pytest.mark.parametrize("files", TURNS, ids=str)
def test_every_option_has_a_comment(files):
    """Every file of conf/ is composed once, with one of every other group."""
    chosen = [file for file in files if file and not file.startswith("experiment=")]
    text = commented(OmegaConf.to_yaml(composed(*chosen)))
    keys = [line for line in text.splitlines() if KEY.match(line)]
    assert len(keys) > 60
    assert [line for line in keys if not re.search(r" # \S", line)] == []


@pytest.mark.parametrize("path", sorted(CONF.glob("[!eh]*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_a_comment_is_found_again_behind_its_key(path):
    """A comment that stands in two files with different words would be shown in one place only."""
    text = path.read_text()
    package = "" if "# @package" in text else f"# @package {path.parent.name}\n"
    lines = text.splitlines()
    shown = commented("\n".join([package.rstrip(), *map(without_comment, lines)])).splitlines()[1:]
    for line, found in zip(lines, shown, strict=True):
        if KEY.match(line) and " # " in line:
            assert found.split(" # ")[1] == line.split(" # ")[1], line


def test_info_is_the_configuration(tmp_path):
    status, out, err = train(tmp_path, "--info", "method=gauss_newton", "lr=0.5")
    assert (status, err) == (0, "")
    expected = composed("method=gauss_newton", "lr=0.5", "run_dir=${hydra:runtime.output_dir}")
    assert yaml.safe_load(out) == yaml.safe_load(OmegaConf.to_yaml(expected))
    (line,) = (line for line in out.splitlines() if "max_change" in line)
    assert line.rpartition(" # ")[2] in (CONF / "method" / "gauss_newton.yaml").read_text()
    assert list(tmp_path.iterdir()) == []


def test_help_describes_the_command_before_the_options(tmp_path):
    status, out, err = train(tmp_path, "--help", "model=cnn")
    assert (status, err) == (0, "")
    assert out.startswith("Train with any method: fgtrain train method=fwdgrad")
    for group, names in FILES.items():
        assert f"  {group}={', '.join(names)}\n" in out
    assert "channels: 64 " in out


def test_resolve_shows_values_without_a_folder(tmp_path):
    status, out, err = train(tmp_path, "--cfg", "job", "--resolve", "lr=0.5")
    assert (status, err) == (0, "")
    shown = yaml.safe_load(out)
    assert (shown["optimizer"]["lr"], shown["callbacks"]["recovery"]["dirpath"]) == (0.5, "RUN_DIR/checkpoints")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--info", "methd=backprop"], "methd is not a key of the configuration; did you mean method?"),
        (["--info", "-m", "seed=1,2"], "--info describes one run; leave out -m and give each key one value"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    assert train(tmp_path, *arguments) == (2, "", f"fgtrain: {message}\n")


def test_files_of_ones_own_have_comments_and_are_listed(tmp_path):
    own = tmp_path / "mine" / "model"
    own.mkdir(parents=True)
    (own / "small.yaml").write_text(
        "_target_: fgtrain.models.MLP\nextra: [{a: {b: 1}}] # nested\nhidden: [8] # units\n"
    )
    (own / "broken.yaml").write_text("a: [1\n")
    arguments = ("--config-dir", str(tmp_path / "mine"), "model=small", "+model.text='one: 1\n\n two: 2'")
    status, out, err = train(tmp_path, "--help", *arguments)
    assert (status, err) == (0, "")
    assert re.search(r"^  model=cnn, .*, broken, small$", out, re.MULTILINE)
    assert re.search(r"^  extra: +# nested$", out, re.MULTILINE)
    assert re.search(r"^  hidden: +# \w", out, re.MULTILINE)
    status, _, err = train(tmp_path, *arguments[:2], "model=smal")
    assert (status, err.endswith("; did you mean model=small?\n")) == (2, True)
