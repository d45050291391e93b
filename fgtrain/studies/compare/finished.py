"""One finished run of a comparison, read from its folder."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fgtrain.runs.results import read_results
from fgtrain.studies.compare.clock import SECONDS

CURVES = ("val/loss", "val/acc", "val/distance_to_minimum")
TRAINED = "train/loss"  # the curve if there is no validation split
QUALITY = re.compile(r"quality(_of_.*)?/(cosine|relative_squared_error)")
EXACT = 1e-4  # largest relative squared error of a gradient that counts as exact; half precision rounds to 1e-5


class Finished(NamedTuple):
    """One run that is compared.

    Args:
        method: its label, see `Variant`.
        seed: seed of initialisation, data order and directions.
        results: the content of its results.json.
        curves: {tag: [(step, value)]}.
    """

    method: str
    seed: int
    results: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]

    @property
    def diverged(self) -> bool:
        """Whether it was ended because it had diverged."""
        return "diverged" in self.results

    @property
    def seconds(self) -> float:
        """The time of all training steps."""
        return self.seconds_at(self.results["steps"])

    def seconds_at(self, step: int) -> float:
        """The time of the first `step` training steps."""
        steps, seconds = zip((0, 0.0), *self.curves.get(SECONDS, []), strict=True)
        return float(np.interp(step, steps, seconds))

    def cosines(self) -> dict[str, list[tuple[int, float]]]:
        """{module: [(step, cosine between its estimate and its exact gradient)]}."""
        tags = [tag for tag in self.curves if tag.startswith("quality_of_") and tag.endswith("/cosine")]
        return {tag.removeprefix("quality_of_").removesuffix("/cosine"): self.curves[tag] for tag in tags}

    def is_exact(self, module: str) -> bool:
        """Whether every gradient of a module that was compared was the exact one."""
        errors = [error for _, error in self.curves.get(f"quality_of_{module}/relative_squared_error", [])]
        return bool(errors) and max(errors) < EXACT

    def cosine(self) -> list[tuple[int, float]]:
        """[(step, mean cosine of the modules whose gradient is estimated)]; of all parameters if there is none."""
        estimated = [curve for module, curve in self.cosines().items() if not self.is_exact(module)]
        if not estimated:
            return self.curves.get("quality/cosine", [])
        values = np.array([[value for _, value in curve] for curve in estimated])
        known = np.isfinite(values)  # an exact gradient of 0 has no direction
        means = np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)
        return [(step, float(mean)) for (step, _), mean in zip(estimated[0], means, strict=True)]


def read(folder: Path, method: str, seed: int) -> Finished:
    """The run of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [t for t in events.Tags()["scalars"] if t in {*CURVES, TRAINED, SECONDS} or QUALITY.fullmatch(t)]
    # Lightning logs a validation with the index of the last step, so after one step with 0.
    curves = {tag: [(e.step + (tag in CURVES), e.value) for e in events.Scalars(tag)] for tag in tags}
    return Finished(method, seed, read_results(folder) or {}, curves)
