"""Functions of any number n of variables.

Formulas and minima: Jamil and Yang 2013, arXiv:1308.4008; Surjanovic and Bingham, Virtual Library of Simulation
Experiments (sfu.ca/~ssurjano); More, Garbow and Hillstrom 1981 (trigonometric, variably dimensioned, Brown almost
linear); Hansen et al. 2009, RR-6829 (ellipsoid, bent cigar, discus); Nesterov 2004 (chain); Gurbuzbalaban and Overton
2012 (Chebyshev and Rosenbrock). Some have a kink at the minimum: their slope does not vanish there.
"""

import math

from torch import Tensor

from fgtrain.tasks.catalogue.formula import in_any_dimension, numbers

PI = math.pi


@in_any_dimension((-10, 10))
def sum_squares(x: Tensor) -> Tensor:
    """A bowl of condition number n."""
    return (numbers(x) * x**2).sum(-1)


@in_any_dimension((-5, 5))
def ellipsoid(x: Tensor) -> Tensor:
    """A bowl of condition number 10^6."""
    return (10 ** (6 * numbers(x, 0) / (x.shape[-1] - 1)) * x**2).sum(-1)


@in_any_dimension((-5, 5))
def bent_cigar(x: Tensor) -> Tensor:
    """A bowl, 10^6 times steeper in all directions but one."""
    return x[..., 0] ** 2 + 1e6 * (x[..., 1:] ** 2).sum(-1)


@in_any_dimension((-5, 5))
def discus(x: Tensor) -> Tensor:
    """A bowl, 10^6 times steeper in one direction."""
    return 1e6 * x[..., 0] ** 2 + (x[..., 1:] ** 2).sum(-1)


@in_any_dimension((-65.536, 65.536))
def schwefel_1_2(x: Tensor) -> Tensor:
    """The squares of the partial sums: a turned bowl, condition number of order n^2."""
    return (x.cumsum(-1) ** 2).sum(-1)


@in_any_dimension((-100, 100))
def sargan(x: Tensor) -> Tensor:
    """A bowl, steep along the diagonal."""
    return x.shape[-1] * (0.6 * (x**2).sum(-1) + 0.4 * x.sum(-1) ** 2)


@in_any_dimension(
    (-100, 100), lambda n: [i * (n + 1.0 - i) for i in range(1, n + 1)], lambda n: -n * (n + 4) * (n - 1) / 6
)
def trid(x: Tensor) -> Tensor:
    """A bowl with a tridiagonal Hessian."""
    return ((x - 1) ** 2).sum(-1) - (x[..., 1:] * x[..., :-1]).sum(-1)


@in_any_dimension((-2, 2), lambda n: [1 - i / (n + 1) for i in range(1, n + 1)], lambda n: -n / (2 * (n + 1)))
def nesterov_chain(x: Tensor) -> Tensor:
    """The quadratic on which first-order methods are slowest: information must travel from one end to the other."""
    ends = x[..., 0] ** 2 + x[..., -1] ** 2
    return (ends + ((x[..., 1:] - x[..., :-1]) ** 2).sum(-1)) / 2 - x[..., 0]


@in_any_dimension((-100, 100))
def chung_reynolds(x: Tensor) -> Tensor:
    """The square of the sphere."""
    return (x**2).sum(-1) ** 2


@in_any_dimension((-1.28, 1.28))
def quartic(x: Tensor) -> Tensor:
    """Flat around its minimum."""
    return (numbers(x) * x**4).sum(-1)


@in_any_dimension((-100, 100))
def schumer_steiglitz(x: Tensor) -> Tensor:
    """Flat around its minimum, equally in all directions."""
    return (x**4).sum(-1)


@in_any_dimension((-10, 10))
def schwefel_2_23(x: Tensor) -> Tensor:
    """Degree ten: very flat around its minimum."""
    return (x**10).sum(-1)


@in_any_dimension((-1, 1))
def sum_of_powers(x: Tensor) -> Tensor:
    """|x_i| to the power i + 1: every direction has its own degree."""
    return (x.abs() ** numbers(x, 2)).sum(-1)


@in_any_dimension((-5, 10))
def zakharov(x: Tensor) -> Tensor:
    """Steep in one direction."""
    s = (numbers(x) * x).sum(-1) / 2
    return (x**2).sum(-1) + s**2 + s**4


@in_any_dimension((-2, 2), 1.0)
def variably_dimensioned(x: Tensor) -> Tensor:
    """A bowl, and the fourth power of a plane."""
    s = (numbers(x) * (x - 1)).sum(-1)
    return ((x - 1) ** 2).sum(-1) + s**2 + s**4


@in_any_dimension((-2, 2), 1.0)
def brown_almost_linear(x: Tensor) -> Tensor:
    """Planes and one product."""
    planes = x[..., :-1] + x.sum(-1, keepdim=True) - (x.shape[-1] + 1)
    return (planes**2).sum(-1) + (x.prod(-1) - 1) ** 2


@in_any_dimension((-1, 4))
def brown(x: Tensor) -> Tensor:
    """Neighbours in each other's exponents."""
    a, b = x[..., :-1] ** 2, x[..., 1:] ** 2
    return (a ** (b + 1) + b ** (a + 1)).sum(-1)


def _dixon_price_minimum(n: int) -> list[float]:
    return [2.0 ** (2.0 ** (1 - i) - 1) for i in range(1, n + 1)]


@in_any_dimension((-10, 10), _dixon_price_minimum)
def dixon_price(x: Tensor) -> Tensor:
    """A banana in every pair of neighbours; the last coordinate has either sign at the minimum."""
    bananas = numbers(x[..., 1:], 2) * (2 * x[..., 1:] ** 2 - x[..., :-1]) ** 2
    return (x[..., 0] - 1) ** 2 + bananas.sum(-1)


@in_any_dimension((-2, 2), 1.0)
def chebyshev_rosenbrock(x: Tensor) -> Tensor:
    """A banana so bent that its floor is exponentially long in n."""
    return (x[..., 0] - 1) ** 2 / 4 + ((x[..., 1:] - 2 * x[..., :-1] ** 2 + 1) ** 2).sum(-1)


@in_any_dimension((-10, 10), lambda n: [i**0.5 for i in range(1, n + 1)])
def qing(x: Tensor) -> Tensor:
    """A minimum in every orthant."""
    return ((x**2 - numbers(x)) ** 2).sum(-1)


@in_any_dimension((-2, 2), lambda n: [1 / i for i in range(1, n + 1)])
def perm(x: Tensor) -> Tensor:
    """Power sums that must match: nearly singular."""
    i, j = numbers(x)[:, None], numbers(x)
    return ((((j + 10) * (x[..., None, :] ** i - j**-i)).sum(-1)) ** 2).sum(-1)


@in_any_dimension((-10.24, 10.24), 1.0)
def whitley(x: Tensor) -> Tensor:
    """A banana between every two coordinates, with ripples."""
    y = 100 * (x[..., :, None] ** 2 - x[..., None, :]) ** 2 + (1 - x[..., None, :]) ** 2
    return (y**2 / 4000 - y.cos() + 1).sum((-2, -1))


@in_any_dimension((-1, 1))
def trigonometric(x: Tensor) -> Tensor:
    """Sines and cosines of all coordinates in every residual."""
    cosines = x.cos()
    residuals = x.shape[-1] - cosines.sum(-1, keepdim=True) + numbers(x) * (1 - cosines) - x.sin()
    return (residuals**2).sum(-1)


@in_any_dimension((-1, 1), minimum=-1.0)
def exponential(x: Tensor) -> Tensor:
    """Flat far from its minimum."""
    return -(-(x**2).sum(-1) / 2).exp()


@in_any_dimension((-1, 1), minimum=lambda n: -0.1 * n)
def cosine_mixture(x: Tensor) -> Tensor:
    """A bowl with waves."""
    return (x**2 - 0.1 * (5 * PI * x).cos()).sum(-1)


@in_any_dimension((-5.12, 5.12))
def rastrigin(x: Tensor) -> Tensor:
    """A local minimum near every integer point."""
    return (10 + x**2 - 10 * (2 * PI * x).cos()).sum(-1)


@in_any_dimension((-600, 600))
def griewank(x: Tensor) -> Tensor:
    """Shallow waves on a bowl."""
    return 1 + (x**2).sum(-1) / 4000 - (x / numbers(x).sqrt()).cos().prod(-1)


@in_any_dimension((-10, 10), 1.0)
def levy(x: Tensor) -> Tensor:
    """A wavy bowl."""
    w = 1 + (x - 1) / 4
    head, last = w[..., :-1], w[..., -1]
    middle = ((head - 1) ** 2 * (1 + 10 * (PI * head + 1).sin() ** 2)).sum(-1)
    return (PI * w[..., 0]).sin() ** 2 + middle + (last - 1) ** 2 * (1 + (2 * PI * last).sin() ** 2)


@in_any_dimension((-PI, PI))
def wavy(x: Tensor) -> Tensor:
    """Waves that die out: flat far from its minimum."""
    return 1 - ((10 * x).cos() * (-(x**2) / 2).exp()).mean(-1)


@in_any_dimension((-20, 20), minimum=-1.0)
def xin_she_yang3(x: Tensor) -> Tensor:
    """A narrow hole in a wide plateau."""
    return (-((x / 15) ** 10).sum(-1)).exp() - 2 * (-(x**2).sum(-1)).exp() * (x.cos() ** 2).prod(-1)


@in_any_dimension((-32.768, 32.768))
def ackley(x: Tensor) -> Tensor:
    """A funnel with waves; a kink at the minimum."""
    return 20 * (1 - (-0.2 * (x**2).mean(-1).sqrt()).exp()) + math.e - (2 * PI * x).cos().mean(-1).exp()


@in_any_dimension((-100, 100))
def salomon(x: Tensor) -> Tensor:
    """Rings around the minimum, where it has a kink."""
    r = (x**2).sum(-1).sqrt()
    return 1 - (2 * PI * r).cos() + 0.1 * r


@in_any_dimension((-10, 10))
def alpine(x: Tensor) -> Tensor:
    """Kinks along many lines, the minimum among them."""
    return (x * x.sin() + 0.1 * x).abs().sum(-1)


@in_any_dimension((-10, 10))
def schwefel_2_22(x: Tensor) -> Tensor:
    """Sum and product of the lengths; a kink at the minimum."""
    return x.abs().sum(-1) + x.abs().prod(-1)


@in_any_dimension((-100, 100))
def schwefel_2_21(x: Tensor) -> Tensor:
    """The largest coordinate: the gradient has one entry; a kink at the minimum."""
    return x.abs().amax(-1)


@in_any_dimension((-10, 10), 2.0)
def quintic(x: Tensor) -> Tensor:
    """Every coordinate has two roots, -1 and 2, with kinks."""
    return (x**5 - 3 * x**4 + 4 * x**3 + 2 * x**2 - 10 * x - 4).abs().sum(-1)


@in_any_dimension((-2 * PI, 2 * PI))
def xin_she_yang2(x: Tensor) -> Tensor:
    """Valleys that get deeper outwards, beside a minimum with a kink."""
    return x.abs().sum(-1) * (-((x**2).sin()).sum(-1)).exp()
