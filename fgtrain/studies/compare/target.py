"""The target of a comparison: a value, and the step and the time at which a run first reaches it."""

import math
from collections.abc import Sequence
from statistics import fmean

from fgtrain.errors import ConfigError
from fgtrain.studies.compare.finished import Finished


def parse_target(text: str | None, labels: Sequence[str]) -> tuple[str | None, float | None]:
    """(method whose final value counts or None, number to add to it).

    Args:
        text: a number, or a label with an added or subtracted number; None gives (None, None).
        labels: the compared methods.

    Raises:
        ConfigError: it is neither.

    >>> parse_target("backprop-0.003", ["backprop", "fwdgrad"])
    ('backprop', -0.003)
    """
    if text is None:
        return None, None
    for label in [None, *sorted(labels, key=len, reverse=True)]:
        try:
            if text.startswith(label or "") and math.isfinite(number := float(text.removeprefix(label or "") or "0")):
                return label, number
        except ValueError:
            continue
    raise ConfigError(
        f"target must be a number or a compared method's final value with + or -, such as {labels[0]}-0.003, got {text}"
    )


def metric_of(runs: Sequence[Finished]) -> str | None:
    """The curve in which the target is looked for; None without validation."""
    return next((tag for tag in ("val/acc", "val/loss") if any(tag in run.curves for run in runs)), None)


def target_value(text: str | None, labels: Sequence[str], runs: Sequence[Finished]) -> float | None:
    """The target; None if it is relative to a method without a run that finished, or if there is no validation."""
    tag = metric_of(runs)
    label, number = parse_target(text, labels)
    if tag is None:
        return None
    if number is None:
        return 0.9 if tag == "val/acc" else 0.1
    if label is None:
        return number
    final = [run.curves[tag][-1][1] for run in runs if run.method == label and not run.diverged and tag in run.curves]
    return fmean(final) + number if final else None


def steps_to(target: float | None, tag: str | None, run: Finished) -> int | None:
    """The first validated step at which a run is at the target; None if never."""
    if target is None or tag is None:
        return None
    hits = [step for step, v in run.curves.get(tag, []) if (v >= target if tag == "val/acc" else v <= target)]
    return min(hits) if hits else None


def resolution(tag: str | None, runs: Sequence[Finished]) -> float | None:
    """The distance between two validations as a share of a run, the largest of all runs."""
    shares = [
        max(b - a for a, b in zip([0, *steps], steps, strict=False)) / run.results["steps"]
        for run in runs
        if not run.diverged and (steps := [step for step, _ in run.curves.get(tag or "", [])])
    ]
    return max(shares) if shares else None
