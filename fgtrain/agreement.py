"""Whether two results of the same computation agree."""

import torch
from torch import Tensor


def agree(found: Tensor, expected: Tensor, size: Tensor | None = None, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors are equal up to the rounding error of a long sum. A tensor with nan agrees only with itself.

    Args:
        found: a result.
        expected: another result.
        size: the sums of the absolute values of the terms, for sums whose terms may cancel; None for `expected`.
        dtype: the least precise dtype of the computation; None for that of `expected`.
    """
    if found is expected:
        return True
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= _tolerance(dtype or expected.dtype) * (expected if size is None else size).norm()
    )


def agree_but_for_ties(found: Tensor, expected: Tensor, before: Tensor, dtype: torch.dtype | None = None) -> bool:
    """As `agree`, for results of functions with comparisons, such as ReLU and max pooling, at nudged inputs.

    A rounding error may decide a comparison of two almost equal values and thereby change a derivative. Nudged, most
    such values are less equal. For the others, the results may differ by as much as the nudge changes them, but by no
    more than 1 percent.

    Args:
        found: a result for nudged inputs.
        expected: another result for them.
        before: the expected result for the inputs themselves.
        dtype: as of `agree`.
    """
    if agree(found, expected, dtype=dtype):
        return True
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= torch.minimum((before - expected).norm(), expected.norm() / 100)
    )


def nudge(x: Tensor) -> Tensor:
    """x with relative errors of up to the tolerance of `agree`, drawn without the global generator."""
    errors = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator(x.device).manual_seed(0))
    return x + x * errors * _tolerance(x.dtype)


def _tolerance(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** (2 / 3)
