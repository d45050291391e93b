"""Random streams keyed by integers: the numbers of any step can be redrawn from its key."""

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
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
    """A CPU generator whose stream depends only on the non-negative integers `key`, such as (seed, step).

    >>> bool(torch.rand(1, generator=keyed_generator(7, 3)) == torch.rand(1, generator=keyed_generator(7, 3)))
    True
    """
    seed = 0
    for number in key:
        seed = fold_in(seed, number)
    return torch.Generator().manual_seed(seed)


def draw_seeds(generator: torch.Generator, num_seeds: int) -> list[int]:
    """`num_seeds` unrelated 64-bit seeds; the first ones do not depend on `num_seeds`."""
    base = torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator).item()
    return [fold_in(int(base), k) for k in range(num_seeds)]


def random_state() -> dict[str, Any]:
    """The state of the global generators, in types that torch.load reads with weights_only=True."""
    state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to a state from `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def states_of(x: Any) -> list[tuple[Callable[[Any], Any], Any]]:
    """[(what sets the state of a generator, its state)] if x is one, of PyTorch, NumPy or Python; else []."""
    if isinstance(x, torch.Generator):
        return [(x.set_state, x.get_state())]
    if isinstance(x, np.random.Generator):
        return [(partial(setattr, x.bit_generator, "state"), x.bit_generator.state)]
    if isinstance(x, np.random.RandomState):
        return [(x.set_state, x.get_state())]
    return [(x.setstate, x.getstate())] if isinstance(x, random.Random) else []


@contextmanager
def preserved_random_state() -> Generator[None]:
    """A context that restores the global generators at its end."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
