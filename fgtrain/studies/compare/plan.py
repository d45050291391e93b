"""The plan of a comparison: parsed from the command line and saved, so that a comparison can be continued."""

import inspect
import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf, open_dict
from yaml import YAMLError

from fgtrain.errors import ConfigError
from fgtrain.lightning.atomic_files import make_folder, write_atomically
from fgtrain.runs.cli import CONF
from fgtrain.runs.config import drop_arguments_of_replaced_targets, name_targets, refuse_interpolation
from fgtrain.runs.results import RESULTS
from fgtrain.studies.compare.target import parse_target
from fgtrain.studies.compare.variants import Variant, variant_of

SET_BY_COMPARE = {
    "method": "; methods=[...] names the compared ones",
    "seed": "; seeds=... is the number of seeds",
    "trainer.max_steps": "; budget=...steps is the length of a run",
    "trainer.log_every_n_steps": "",
    "callbacks": "",
    "run_dir": "; out=... is the folder of all runs",
}
"""{an argument of scripts/train.py that has no effect here: what to give instead}."""

SEARCH_SEED = 10_000  # for runs that choose a learning rate; the compared runs have seeds 0, 1, ...


@dataclass
class Comparison:
    """One comparison.

    Args:
        methods: files in conf/method. A variant of one adds its own arguments after a colon, joined by +:
            methods=[backprop,fwdgrad_lowrank:num_tangents=1,fwdgrad_lowrank:num_tangents=8].
        seeds: runs of each method, with seeds 0 to seeds - 1.
        budget: the budget of each run: 2000steps, or 60s of training. A trial run of each method converts time to
            steps, so that schedules know their length.
        lr: yaml for the rate in each method's file, or search for the best of lr_points around it, with other seeds.
        lr_points: odd number of learning rates tried, neighbours a factor of sqrt(10) apart. If the best is the
            smallest or the largest, more are tried on that side, at most twice.
        search_seeds: runs of every learning rate tried; the mean of their validation losses counts.
        target: validation accuracy (without accuracy: loss, or value above the minimum) whose time is measured.
            backprop-0.003 is the mean final value of backprop's own runs minus 0.003. null is 0.9 (without accuracy:
            0.1).
        out: folder of the results; null for a name made from the other arguments.
        config_dir: folder of your own configurations, added to conf, as for scripts/train.py.
        overrides: arguments for scripts/train.py that all runs share.
    """

    methods: list[str] = field(default_factory=list)
    seeds: int = 3
    budget: str = "2000steps"
    lr: str = "yaml"
    lr_points: int = 5
    search_seeds: int = 2
    target: str | None = None
    out: str | None = None
    config_dir: str | None = None
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if odd := [method for method in self.methods if not isinstance(method, str)]:
            raise ConfigError(f"methods: {odd[0]} is not a method's file, such as in methods=[backprop,fwdgrad]")
        if not self.methods:
            raise ConfigError(
                "methods is not set; give two or more files in conf/method, such as methods=[backprop,fwdgrad]"
            )
        folders = self._folders_of_configurations()
        known = sorted({path.stem for folder in folders for path in (folder / "method").glob("*.yaml")})
        if unknown := sorted({variant.file for variant in self.variants} - set(known)):
            places = " and ".join(["conf/method", *(f"{folder}/method" for folder in folders[1:])])
            raise ConfigError(
                f"methods: there is no {', '.join(unknown)}; {places} {'have' if folders[1:] else 'has'} "
                f"{', '.join(known)}"
            )
        names = [variant.folder for variant in self.variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"methods: {', '.join(twice)} is listed twice")
        if self.seeds < 1 or self.search_seeds < 1:
            name = "seeds" if self.seeds < 1 else "search_seeds"
            raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seeds > SEARCH_SEED:
            raise ConfigError(f"seeds must be at most {SEARCH_SEED}: the search uses the seeds after it")
        if not re.fullmatch(r"[0-9]*\.?[0-9]+s|[0-9]+steps", self.budget) or not 0 < self.amount < math.inf:
            raise ConfigError(
                f"budget must be a number of steps or seconds, such as 2000steps or 60s, got {self.budget}"
            )
        if self.lr not in ("yaml", "search"):
            raise ConfigError(f"lr must be yaml or search, got {self.lr}: one rate for all methods favours one of them")
        if self.lr_points < 3 or self.lr_points % 2 == 0:
            raise ConfigError(
                f"lr_points must be odd and at least 3, so that the file's own rate is in the middle, got "
                f"{self.lr_points}"
            )
        parse_target(self.target, self.methods)
        for key in (override.lstrip("+~").partition("=")[0] for override in self.overrides):
            if key.partition(".")[0] == "logger":
                raise ConfigError("compare reads the TensorBoard events of its runs; leave logger=... out")
            if key in SET_BY_COMPARE:
                raise ConfigError(f"compare sets {key} of its runs itself; leave {key}=... out{SET_BY_COMPARE[key]}")

    def _folders_of_configurations(self) -> list[Path]:
        if self.config_dir is None:
            return [CONF]
        if not Path(self.config_dir).is_dir():
            raise ConfigError(f"--config-dir: there is no folder {self.config_dir}")
        return [CONF, Path(self.config_dir)]

    @property
    def variants(self) -> list[Variant]:
        """The compared methods."""
        return [variant_of(label) for label in self.methods]

    @property
    def in_seconds(self) -> bool:
        """Whether the budget is a time."""
        return not self.budget.endswith("steps")

    @property
    def amount(self) -> float:
        """The number in the budget."""
        return float(self.budget.removesuffix("steps").removesuffix("s"))

    @property
    def folder(self) -> Path:
        """The folder of the runs and the report."""
        if self.out is not None:
            return Path(self.out)
        shared = [re.sub(r"[^\w.=-]+", "-", override) for override in self.overrides]
        names = [
            "_".join(variant.folder for variant in self.variants),
            *shared,
            f"{self.seeds}seeds",
            self.budget,
            f"lr-{self.lr}",
        ]
        return Path("comparisons") / "_".join(names)[:200]

    def remember(self) -> None:
        """Save the plan in the folder of the comparison.

        Raises:
            ConfigError: the folder holds finished runs of another comparison.
        """
        plan = json.dumps({k: v for k, v in asdict(self).items() if k != "out"}, indent=2) + "\n"
        path = self.folder / "plan.json"
        if path.exists() and path.read_text() != plan and any(self.folder.rglob(RESULTS)):
            raise ConfigError(f"{self.folder} holds another comparison; give another folder with out=...")
        refuse_interpolation(self.folder)
        make_folder(self.folder)
        write_atomically(plan, path)


OWN = frozenset(f.name for f in fields(Comparison)) - {"overrides", "config_dir"}
"""The keys of a comparison on the command line."""

LISTS = frozenset(f.name for f in fields(Comparison) if f.default_factory is list)
"""The keys that take a list."""


def parse(arguments: Sequence[str], config_dir: str | None = None) -> Comparison:
    """The comparison that a command line asks for; unknown keys are passed on to scripts/train.py.

    Raises:
        ConfigError: a value makes no sense.
        OmegaConfBaseException: a value has the wrong type.
    """
    mine, shared = split(arguments)
    given = {"overrides": shared, "config_dir": config_dir}
    try:
        listed = OmegaConf.from_dotlist(mine)
    except YAMLError as error:
        raise ConfigError(f"{' '.join(mine)} cannot be read: {' '.join(str(error).split())[:200]}") from error
    merged = OmegaConf.merge(OmegaConf.structured(Comparison), listed, given)
    comparison = OmegaConf.to_object(merged)
    assert isinstance(comparison, Comparison)
    return comparison


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a comparison, and those for scripts/train.py.

    Raises:
        ConfigError: a list is not in brackets.
    """
    mine = [argument for argument in arguments if argument.partition("=")[0] in OWN]
    for key, _, value in (argument.partition("=") for argument in mine):
        if key in LISTS and not value.startswith("["):
            raise ConfigError(f"{key} takes a list in brackets: {key}=[{value}]")
    return mine, [argument for argument in arguments if argument not in mine]


def describe_arguments() -> str:
    """Every argument with its default, from the docstring of `Comparison`."""
    section = (inspect.getdoc(Comparison) or "").partition("Args:\n")[2]
    texts = {name: " ".join(text.split()) for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.M)}
    defaults = {f.name: f.default for f in fields(Comparison) if f.name in OWN}
    lines = []
    for name, default in defaults.items():
        shown = "[...]" if name == "methods" else "null" if default is None else default
        text = textwrap.fill(texts[name], 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append(f"    {name}={shown}\n{text}")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """A value of an override that stands for any text, such as the name of a folder."""
    return QuotedString(text, Quote.single).with_quotes()


def compose_run(shared: Sequence[str], *own: str, config_dir: str | None = None) -> tuple[DictConfig, dict[str, str]]:
    """The configuration of one run, and the chosen file of each group."""
    path = [] if config_dir is None else [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).resolve()}')}]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*path, *shared, *own, "quiet=true"], return_hydra_config=True)
    choices = name_targets(cfg.hydra.runtime.choices, [*shared, *own])
    with open_dict(cfg):
        del cfg["hydra"]
    drop_arguments_of_replaced_targets(cfg, [*shared, *own])
    return cfg, choices
