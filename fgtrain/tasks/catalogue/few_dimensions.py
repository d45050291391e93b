"""Functions of three, four and six variables, most of them fits of a curve.

Formulas and minima: More, Garbow and Hillstrom 1981 (Box, Brown and Dennis, Biggs, helical valley, Powell, Wood); Dixon
and Szego 1978 (Hartmann, Shekel); Jamil and Yang 2013, arXiv:1308.4008 (Miele and Cantrell).
"""

import math

import torch
from torch import Tensor

from fgtrain.tasks.catalogue.formula import in_dimension


def _times(x: Tensor, count: int, unit: float) -> Tensor:
    """The times unit, 2 unit, ... of `count` measurements, (count,)."""
    return unit * torch.arange(1, count + 1, dtype=x.dtype, device=x.device)


def _columns(x: Tensor) -> list[Tensor]:
    """The coordinates of points (..., n), each (..., 1), to be broadcast with the times."""
    return list(x[..., None].unbind(-2))


@in_dimension(3, (0, 10), [[1, 10, 1]])
def box3(x: Tensor) -> Tensor:
    """Box 1966: two rates of decay and a weight."""
    a, b, c = _columns(x)
    t = _times(x, 10, 0.1)
    return (((-t * a).exp() - (-t * b).exp() - c * ((-t).exp() - (-10 * t).exp())) ** 2).sum(-1)


@in_dimension(3, (0, 20), [[1, 10, 5]])
def biggs_exp3(x: Tensor) -> Tensor:
    """Biggs 1971, three parameters."""
    a, b, c = _columns(x)
    t = _times(x, 10, 0.1)
    return (((-t * a).exp() - c * (-t * b).exp() - (-t).exp() + 5 * (-10 * t).exp()) ** 2).sum(-1)


@in_dimension(6, (0, 10), [[1, 10, 1, 5, 4, 3]])
def biggs_exp6(x: Tensor) -> Tensor:
    """Biggs 1971, six parameters."""
    a, b, c, d, e, f = _columns(x)
    t = _times(x, 13, 0.1)
    measured = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return ((c * (-t * a).exp() - d * (-t * b).exp() + f * (-t * e).exp() - measured) ** 2).sum(-1)


@in_dimension(3, (-2, 2), [[1, 0, 0]])
def helical_valley(x: Tensor) -> Tensor:
    """Fletcher and Powell 1963: a valley that winds around an axis; discontinuous where the angle is."""
    a, b, c = x.unbind(-1)
    turns = torch.atan2(b, a) / (2 * math.pi)
    return 100 * ((c - 10 * turns) ** 2 + ((a**2 + b**2).sqrt() - 1) ** 2) + c**2


@in_dimension(4, (-10, 10), [[1, 1, 1, 1]])
def wood(x: Tensor) -> Tensor:
    """Colville 1968: two coupled bananas."""
    a, b, c, d = x.unbind(-1)
    bananas = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
    return bananas + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2) + 19.8 * (b - 1) * (d - 1)


@in_dimension(4, (-4, 5), [[0, 0, 0, 0]])
def powell_singular(x: Tensor) -> Tensor:
    """Powell 1962: the Hessian is singular at the minimum."""
    a, b, c, d = x.unbind(-1)
    return (a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4


@in_dimension(4, (-25, 25), [[-11.594439904762, 13.203630051207, -0.403439488140, 0.236778774456]], 85822.20162635628)
def brown_dennis(x: Tensor) -> Tensor:
    """Brown and Dennis 1971: a large residual."""
    a, b, c, d = _columns(x)
    t = _times(x, 20, 0.2)
    return (((a + t * b - t.exp()) ** 2 + (c + d * t.sin() - t.cos()) ** 2) ** 2).sum(-1)


@in_dimension(4, (-1, 1), [[0, 1, 1, 1]])
def miele_cantrell(x: Tensor) -> Tensor:
    """Flat around its minimum: degrees four, six, four and eight."""
    a, b, c, d = x.unbind(-1)
    return ((-a).exp() - b) ** 4 + 100 * (b - c) ** 6 + (c - d).tan() ** 4 + a**8


_HARTMANN_WEIGHTS = (1.0, 1.2, 3.0, 3.2)
_HARTMANN3 = (
    ((3, 10, 30), (0.1, 10, 35), (3, 10, 30), (0.1, 10, 35)),
    ((0.3689, 0.1170, 0.2673), (0.4699, 0.4387, 0.7470), (0.1091, 0.8732, 0.5547), (0.03815, 0.5743, 0.8828)),
)
_HARTMANN6 = (
    (
        (10, 3, 17, 3.5, 1.7, 8),
        (0.05, 10, 17, 0.1, 8, 14),
        (3, 3.5, 1.7, 10, 17, 8),
        (17, 8, 0.05, 10, 0.1, 14),
    ),
    (
        (0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886),
        (0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991),
        (0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.6650),
        (0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381),
    ),
)
_SHEKEL_CENTRES = (
    (4, 4, 4, 4),
    (1, 1, 1, 1),
    (8, 8, 8, 8),
    (6, 6, 6, 6),
    (3, 7, 3, 7),
    (2, 9, 2, 9),
    (5, 3, 5, 3),
    (8, 1, 8, 1),
    (6, 2, 6, 2),
    (7, 3.6, 7, 3.6),
)
_SHEKEL_WIDTHS = (0.1, 0.2, 0.2, 0.4, 0.4, 0.6, 0.3, 0.7, 0.5, 0.5)


def _hartmann(x: Tensor, table: tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]) -> Tensor:
    steepness, centres = (x.new_tensor(part) for part in table)
    wells = (-(steepness * (x[..., None, :] - centres) ** 2).sum(-1)).exp()
    return -(x.new_tensor(_HARTMANN_WEIGHTS) * wells).sum(-1)


@in_dimension(3, (0, 1), [[0.11461433859, 0.555648849972, 0.852546953521]], -3.862782147820755)
def hartmann3(x: Tensor) -> Tensor:
    """Four wells of different depth and shape."""
    return _hartmann(x, _HARTMANN3)


_HARTMANN6_MINIMUM = [[0.201689511007, 0.150010691823, 0.476873974222, 0.275332430494, 0.3116516166, 0.657300534066]]


@in_dimension(6, (0, 1), _HARTMANN6_MINIMUM, -3.322368011415515)
def hartmann6(x: Tensor) -> Tensor:
    """Four wells of different depth and shape."""
    return _hartmann(x, _HARTMANN6)


@in_dimension(4, (0, 10), [[4.000746868271, 3.999509480086, 4.000746868271, 3.999509480086]], -10.53644315348353)
def shekel(x: Tensor) -> Tensor:
    """Ten narrow wells in a plain."""
    distances = ((x[..., None, :] - x.new_tensor(_SHEKEL_CENTRES)) ** 2).sum(-1)
    return -(1 / (distances + x.new_tensor(_SHEKEL_WIDTHS))).sum(-1)
