"""Whether two results of the same computation agree."""

import torch
from torch import Tensor


def agree(found: Tensor, expected: Tensor, size: Tensor | None = None) -> bool:
    """Whether two tensors are equal up to the rounding error of a long sum. A tensor with nan agrees only with itself.

    Args:
        found: a result.
        expected: another result.
        size: the sums of the absolute values of the terms, for sums whose terms may cancel; None for `expected`.
    """
    if found is expected:
        return True
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= _tolerance(expected.dtype) * (expected if size is None else size).norm()
    )


def agree_but_for_ties(found: Tensor, expected: Tensor, nudged: Tensor) -> bool:
    """As `agree`, for results of functions with comparisons, such as ReLU and max pooling.

    A rounding error may decide a comparison of two almost equal values and thereby change a derivative. So the results
    may also differ by as much as larger rounding errors of the inputs change them, but by no more than 1 percent.

    Args:
        found: a result.
        expected: another result.
        nudged: the result for inputs that `nudge` has changed.
    """
    if agree(found, expected):
        return True
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= torch.minimum((nudged - expected).norm(), expected.norm() / 100)
    )


def nudge(x: Tensor) -> Tensor:
    """x with random relative errors of at most the tolerance of `agree`, which is larger than rounding errors."""
    return x * (1 + _tolerance(x.dtype) * (2 * torch.rand_like(x) - 1))


def _tolerance(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** (2 / 3)
