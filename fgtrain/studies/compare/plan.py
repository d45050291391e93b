"""The plan of a comparison: parsed from the command line and saved, so that a comparison can be continued."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from fgtrain.errors import ConfigError
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.runs.cli import CONF
from fgtrain.runs.config import drop_arguments_of_replaced_targets, name_targets

SEARCH_SEED = 10_000  # for runs that choose a learning rate; the compared runs have seeds 0, 1, ...


@dataclass
class Comparison:
    """One comparison.

    Args:
        methods: files in conf/method.
        seeds: runs of each method, with seeds 0 to seeds - 1.
        budget: the budget of each run: "2000steps", or "60s" of training. Time is converted to steps by a trial run of
            each method, so that schedules know their length.
        lr: "yaml" for the rate in each method's file, or "search" for the best of `lr_points` around it.
        lr_points: odd number of learning rates tried, neighbours a factor of sqrt(10) apart.
        target: validation accuracy (classification) or value above the minimum (test functions) whose time is measured.
        out: folder of the results; None for a name made from the other arguments.
        overrides: arguments for scripts/train.py that all runs share.
    """

    methods: list[str] = field(default_factory=list)
    seeds: int = 3
    budget: str = "2000steps"
    lr: str = "yaml"
    lr_points: int = 5
    target: float | None = None
    out: str | None = None
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError(
                "methods is not set; give two or more files in conf/method, such as methods=[backprop,fwdgrad]"
            )
        unknown = sorted(set(self.methods) - {path.stem for path in (CONF / "method").glob("*.yaml")})
        if unknown:
            known = ", ".join(sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
            raise ConfigError(f"methods: there is no {', '.join(unknown)}; conf/method has {known}")
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {self.seeds}")
        if not re.fullmatch(r"[0-9]*\.?[0-9]+s|[0-9]+steps", self.budget) or not self.amount > 0:
            raise ConfigError(
                f"budget must be a number of steps or seconds, such as 2000steps or 60s, got {self.budget}"
            )
        if self.lr not in ("yaml", "search"):
            raise ConfigError(f"lr must be yaml or search, got {self.lr}: one rate for all methods favours one of them")
        if self.lr_points < 1 or self.lr_points % 2 == 0:
            raise ConfigError(f"lr_points must be odd, so that the file's own rate is among them, got {self.lr_points}")

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
        names = ["_".join(self.methods), *shared, f"{self.seeds}seeds", self.budget, f"lr-{self.lr}"]
        return Path("comparisons") / "_".join(names)[:200]

    def remember(self) -> None:
        """Save the plan in the folder of the comparison.

        Raises:
            ConfigError: the folder holds another comparison.
        """
        plan = json.dumps({k: v for k, v in asdict(self).items() if k != "out"}, indent=2) + "\n"
        path = self.folder / "plan.json"
        if path.exists() and path.read_text() != plan:
            raise ConfigError(f"{self.folder} holds another comparison; give another folder with out=...")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(plan, path)


def parse(arguments: Sequence[str]) -> Comparison:
    """The comparison that a command line asks for; unknown keys are passed on to scripts/train.py.

    Raises:
        ConfigError: a value makes no sense.
        OmegaConfBaseException: a value has the wrong type.
    """
    own = {f.name for f in fields(Comparison)} - {"overrides"}
    mine = [argument for argument in arguments if argument.partition("=")[0] in own]
    shared = [argument for argument in arguments if argument not in mine]
    merged = OmegaConf.merge(OmegaConf.structured(Comparison), OmegaConf.from_dotlist(mine), {"overrides": shared})
    comparison = OmegaConf.to_object(merged)
    assert isinstance(comparison, Comparison)
    return comparison


def compose_run(shared: Sequence[str], *own: str) -> tuple[DictConfig, dict[str, str]]:
    """The configuration of one run, and the chosen file of each group."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*shared, *own, "quiet=true"], return_hydra_config=True)
    choices = name_targets(cfg.hydra.runtime.choices, [*shared, *own])
    with open_dict(cfg):
        del cfg["hydra"]
    drop_arguments_of_replaced_targets(cfg, [*shared, *own])
    return cfg, choices
