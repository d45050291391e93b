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
    tolerance = torch.finfo(expected.dtype).eps ** (2 / 3)
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= tolerance * (expected if size is None else size).norm()
    )
