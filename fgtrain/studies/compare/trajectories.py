"""The paths of all methods of a comparison on one contour of their test function."""

from collections.abc import Mapping

import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure

from fgtrain.lightning.callbacks.trajectory import draw_trajectories
from fgtrain.studies.compare.plan import Comparison, compose_run
from fgtrain.tasks import Function


def trajectories(plan: Comparison, lrs: Mapping[str, float]) -> Figure | None:
    """The paths of seed 0, which all methods start from the same points; None if there is nothing in the plane to draw.

    Args:
        plan: the comparison.
        lrs: {method: learning rate}, for the title.
    """
    files = {v.label: plan.folder / v.folder / "seed=0" / "trajectory.npz" for v in plan.variants}
    paths = {m: torch.from_numpy(np.load(file)["points"]) for m, file in files.items() if file.exists()}
    if not paths:  # another task, or no run of seed 0 was finished
        return None
    of_first = [*plan.overrides, f"method={plan.variants[0].file}"]
    function = instantiate(compose_run(of_first, "run_dir=.", config_dir=plan.config_dir)[0].task)
    assert isinstance(function, Function)
    if function.dim != 2:
        return None
    rates = sorted({lrs[method] for method in paths})
    return draw_trajectories(function, paths, f"lr {' and '.join(f'{lr:g}' for lr in rates)}, seed 0")
