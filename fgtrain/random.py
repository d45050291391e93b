"""Random streams keyed by integers: what was drawn at any step can be drawn again from its key."""

import numpy as np
import torch


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the non-negative integers `key`, such as (seed, step).

    >>> torch.rand(1, generator=keyed_generator(7, 3)) == torch.rand(1, generator=keyed_generator(7, 3))
    tensor([True])
    """
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))
