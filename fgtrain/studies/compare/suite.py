"""A suite: several comparisons, its rungs, run one after another and reported on one page."""

import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fgtrain.errors import ConfigError, DataError, UnsupportedOperation
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.runs.messages import one_line
from fgtrain.runs.owner import owned
from fgtrain.studies.compare.plan import LISTS, OWN, Comparison, split
from fgtrain.studies.compare.report import statement, write_report
from fgtrain.studies.compare.runs import Outcome, Tell, compare
from fgtrain.studies.compare.table import markdown_of

SUITES = Path(__file__).parent / "suites"
PAGE = "page.md"


class Rung(NamedTuple):
    """One comparison of a suite.

    Args:
        name: its heading.
        goal: what the methods should reach.
        plan: the comparison.
    """

    name: str
    goal: str
    plan: Comparison

    @property
    def command(self) -> list[str]:
        """Its arguments on the command line."""
        defaults = {f.name: f.default if f.default is not MISSING else [] for f in fields(Comparison)}
        given = {key: value for key, value in asdict(self.plan).items() if key in OWN and value != defaults[key]}
        texts = {key: f"[{','.join(value)}]" if isinstance(value, list) else value for key, value in given.items()}
        directory = [] if self.plan.config_dir is None else ["--config-dir", self.plan.config_dir]
        return [*directory, *(f"{key}={value}" for key, value in texts.items()), *self.plan.overrides]


def read_suite(arguments: Sequence[str], config_dir: str | None = None) -> tuple[Path, list[Rung]]:
    """The folder and the rungs of a suite.

    Args:
        arguments: suite=quick, suite=ladder or suite=my_suite.yaml; out=folder; what else is given changes every rung.
        config_dir: folder of your own configurations.

    Raises:
        ConfigError: there is no such suite, or one of its rungs makes no sense.
    """
    chosen = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("suite=", "out=")))
    mine, shared = split([argument for argument in arguments if not argument.startswith(("suite=", "out="))])
    path = SUITES / f"{chosen['suite']}.yaml"
    path = path if path.exists() else Path(chosen["suite"])
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in SUITES.glob("*.yaml")))
        raise ConfigError(f"suite: there is no {chosen['suite']}; give {known} or a YAML file of your own")
    folder = Path(chosen.get("out", f"comparisons/{path.stem}"))
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"suite: {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not (
        isinstance(found, list) and found and all(isinstance(r, dict) and r.get("name") is not None for r in found)
    ):
        raise ConfigError(f"suite: {path} must be a list of rungs, each with a name; {SUITES}/quick.yaml is an example")
    rungs = [_rung(dict(rung), folder, mine, shared, config_dir) for rung in found]
    places = [rung.plan.out for rung in rungs]
    if twice := [rung.name for rung in rungs if places.count(rung.plan.out) > 1]:
        raise ConfigError(
            f"suite: the rungs {' and '.join(twice)} would share a folder; names must differ in letters or digits"
        )
    return folder, rungs


def _rung(rung: dict[str, Any], folder: Path, mine: list[str], shared: list[str], config_dir: str | None) -> Rung:
    name, goal = str(rung.pop("name")), rung.pop("goal", None) or "none"
    if unknown := sorted(map(str, rung.keys() - OWN - {"overrides"} | rung.keys() & {"out"})):
        raise ConfigError(f"suite: the rung {name} has {', '.join(unknown)}; arguments of train.py go under overrides")
    for key in sorted({*LISTS, "overrides"} & rung.keys()):
        if not (isinstance(rung[key], list) and all(isinstance(value, str) for value in rung[key])):
            raise ConfigError(f"suite: {key} of the rung {name} must be a list of words, got {rung[key]}")
    out = folder / re.sub(r"\W+", "-", name).lower()[:200]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Comparison), rung, OmegaConf.from_dotlist(mine))
        merged.out, merged.config_dir, merged.overrides = str(out), config_dir, [*merged.overrides, *shared]
        plan = OmegaConf.to_object(merged)
    except (ConfigError, OmegaConfBaseException) as error:
        raise ConfigError(f"suite: the rung {name}: {one_line(error)}") from None
    assert isinstance(plan, Comparison)
    return Rung(name, goal, plan)


def run_suite(
    folder: Path,
    rungs: Sequence[Rung],
    command: str,
    tell: Tell,
    show: Callable[[str, list[dict[str, Any]] | None], None],
) -> Path:
    """Do the missing runs of every rung, and rewrite the page after each rung; a rung whose data are missing is a line.

    Args:
        folder: see `read_suite`.
        rungs: see `read_suite`.
        command: the command line.
        tell: see `compare`.
        show: called after every rung with its name and its rows, or with the reason for which there are none.

    Returns:
        The page.
    """
    sections = [_section(rung, ["Not yet run."]) for rung in rungs]
    page = folder / PAGE
    for i, rung in enumerate(rungs):
        try:
            with owned(rung.plan.folder, "out"):
                outcome = compare(rung.plan, lambda text, *counts, name=rung.name: tell(f"{name}: {text}", *counts))
                rows = write_report(rung.plan, outcome, rung_command(rung))
            sections[i] = _section(rung, _results(rung, folder, outcome, rows))
            show(rung.name, rows)
        except Exception as error:
            if not _is_tolerated(error):
                raise
            reason = f"Not run: {one_line(error)}."
            sections[i] = _section(rung, [reason])
            show(f"{rung.name}: {reason}", None)
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["# Comparison of methods", "", f"`{command}`", "", *(line for found in sections for line in found)]
        write_atomically("\n".join(lines), page)
    return page


def _is_tolerated(error: BaseException | None) -> bool:
    """Whether data are missing, or no method can train the model; Hydra wraps such errors."""
    return error is not None and (isinstance(error, DataError | UnsupportedOperation) or _is_tolerated(error.__cause__))


def rung_command(rung: Rung) -> str:
    """The command that runs a rung alone."""
    return " ".join(["python scripts/compare.py", *(f"'{a}'" if " " in a else a for a in rung.command)])


def _section(rung: Rung, lines: list[str]) -> list[str]:
    return [f"## {rung.name}", "", f"Goal: {rung.goal}.", "", *lines, ""]


def _results(rung: Rung, folder: Path, outcome: Outcome, rows: list[dict[str, Any]]) -> list[str]:
    command, _, *sentences = statement(rung.plan, outcome, rung_command(rung))
    own = rung.plan.folder.relative_to(folder)
    figure = f"![loss and error against steps and time]({own}/curves.png)"
    return [command, "", *markdown_of(rows), "", figure, "", " ".join(sentences)]
