"""Mean and spread over the seeds of a sweep, as curves in TensorBoard."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

TAGS = ("train/loss", "val/loss", "val/acc", "val/distance_to_minimum")
Curve = Mapping[int, float]


def write_seed_curves(folder: Path, runs: Sequence[tuple[Path, Sequence[str]]]) -> None:
    """Write the runs seeds/NAME/mean, lowest and highest, with the tags of the runs, so that they share their charts.

    NAME holds the arguments that the sweep varies, without the seed.

    Args:
        folder: the folder of the sweep.
        runs: the folder of each finished run and its arguments. Runs whose arguments differ in `seed` alone belong
            together; a single one gets no curves.
    """
    from torch.utils.tensorboard import SummaryWriter  # late: help and completion need not wait for it

    groups: dict[str, list[Path]] = defaultdict(list)
    common = set.intersection(*(set(arguments) for _, arguments in runs)) if runs else set()
    for run_dir, arguments in runs:
        name = ",".join(sorted(a for a in arguments if a not in common and not a.startswith("seed=")))
        groups[name.replace("/", "-").replace("$", "")[:200] or "all"].append(run_dir)
    for name, run_dirs in groups.items():
        curves = [_curves(run_dir) for run_dir in run_dirs] if len(run_dirs) > 1 else []
        shared = [tag for tag in TAGS if curves and all(tag in found for found in curves)]
        for which in ("mean", "lowest", "highest") if shared else ():
            with SummaryWriter(str(folder / "seeds" / name / which)) as writer:
                for tag in shared:
                    for step in sorted(set.intersection(*(set(found[tag]) for found in curves))):
                        values = [found[tag][step] for found in curves]
                        spread = {"mean": fmean(values), "lowest": min(values), "highest": max(values)}
                        writer.add_scalar(tag, spread[which], step)


def _curves(run_dir: Path) -> dict[str, Curve]:
    """{tag: {step: value}} of the events in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # late, as above

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in TAGS if tag in events.Tags()["scalars"]}
