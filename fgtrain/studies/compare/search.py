"""The search for a learning rate, which is the same for every method."""

from collections.abc import Callable, Mapping

WIDENINGS = 2


def search(centre: float, points: int, loss_of: Callable[[float], float]) -> dict[float, float]:
    """{learning rate: loss} of rates a factor of sqrt(10) apart, in ascending order.

    While the best rate is the smallest or the largest, points // 2 more rates are tried on that side, at most twice.

    Args:
        centre: the rate in the middle.
        points: odd number of rates in the beginning.
        loss_of: the loss after training with a rate; inf if the run diverged.

    >>> list(search(1.0, 3, lambda lr: abs(lr - 5)))
    [0.316, 1.0, 3.16, 10.0]
    """
    low = -(points // 2)
    high = -low
    losses = {k: loss_of(rate(centre, k)) for k in range(low, high + 1)}
    for _ in range(WIDENINGS):
        best = min(losses, key=lambda k: losses[k])
        if best not in (low, high):
            break
        more = range(low - points // 2, low) if best == low else range(high + 1, high + 1 + points // 2)
        losses |= {k: loss_of(rate(centre, k)) for k in more}
        low, high = min(losses), max(losses)
    return {rate(centre, k): losses[k] for k in sorted(losses)}


def rate(centre: float, k: int) -> float:
    """The rate k factors of sqrt(10) above the middle."""
    return float(f"{centre * 10 ** (k / 2):.3g}")


def best_of(losses: Mapping[float, float]) -> float:
    """The learning rate of the smallest loss."""
    return min(losses, key=lambda lr: losses[lr])


def is_at_edge(lr: float, losses: Mapping[float, float]) -> bool:
    """Whether a rate is the smallest or the largest of those tried."""
    return lr in (min(losses), max(losses))
