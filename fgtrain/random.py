"""Random streams keyed by integers: what was drawn at any step can be drawn again from its key."""

import torch

_MASK = 2**64 - 1


def fold_in(seed: int, number: int) -> int:
    """A new 64-bit seed from a seed and a number; different numbers give unrelated seeds.

    The output function of SplitMix64 on a Weyl sequence. Source: Steele, Lea, Flood 2014, OOPSLA, figure 17.

    >>> fold_in(0, 0)
    16294208416658607535
    """
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the non-negative integers `key`, such as (seed, step).

    >>> bool(torch.rand(1, generator=keyed_generator(7, 3)) == torch.rand(1, generator=keyed_generator(7, 3)))
    True
    """
    seed = 0
    for number in key:
        seed = fold_in(seed, number)
    return torch.Generator().manual_seed(seed)


def draw_seeds(generator: torch.Generator, num_seeds: int) -> list[int]:
    """`num_seeds` unrelated 64-bit seeds; the first ones do not depend on how many are drawn."""
    base = torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator).item()
    return [fold_in(int(base), k) for k in range(num_seeds)]
