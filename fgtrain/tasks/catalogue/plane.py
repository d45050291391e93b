"""Functions of two variables.

Formulas and minima: Jamil and Yang 2013, arXiv:1308.4008; Surjanovic and Bingham, Virtual Library of Simulation
Experiments (sfu.ca/~ssurjano); More, Garbow and Hillstrom 1981 for Freudenstein and Roth, and Jennrich and Sampson.
"""

import math

import torch
from torch import Tensor

from fgtrain.tasks.catalogue.formula import in_plane

PI = math.pi


@in_plane((-10, 10), [[1, 3]])
def booth(x: Tensor, y: Tensor) -> Tensor:
    """A bowl, condition number 9."""
    return (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2


@in_plane((-5, 5), [[0, 0]])
def three_hump_camel(x: Tensor, y: Tensor) -> Tensor:
    """Two local minima beside the global one."""
    return 2 * x**2 - 1.05 * x**4 + x**6 / 6 + x * y + y**2


@in_plane((-3, 3), [[0.08984201, -0.71265640], [-0.08984201, 0.71265640]], -1.031628453489877)
def six_hump_camel(x: Tensor, y: Tensor) -> Tensor:
    """Six minima, two of them global."""
    return (4 - 2.1 * x**2 + x**4 / 3) * x**2 + x * y + (4 * y**2 - 4) * y**2


@in_plane((-5, 15), [[-PI, 12.275], [PI, 2.275], [3 * PI, 2.475]], 10 / (8 * PI))
def branin(x: Tensor, y: Tensor) -> Tensor:
    """Three global minima in a curved valley."""
    return (y - 5.1 / (4 * PI**2) * x**2 + 5 / PI * x - 6) ** 2 + 10 * (1 - 1 / (8 * PI)) * x.cos() + 10


@in_plane((-2, 2), [[0, -1]], 3.0)
def goldstein_price(x: Tensor, y: Tensor) -> Tensor:
    """Values from 3 to 10^6."""
    first = 1 + (x + y + 1) ** 2 * (19 - 14 * x + 3 * x**2 - 14 * y + 6 * x * y + 3 * y**2)
    second = 30 + (2 * x - 3 * y) ** 2 * (18 - 32 * x + 12 * x**2 + 48 * y - 36 * x * y + 27 * y**2)
    return first * second


@in_plane((0, 6), [[PI, PI]], -1.0)
def easom(x: Tensor, y: Tensor) -> Tensor:
    """A hole in a plain."""
    return -x.cos() * y.cos() * (-((x - PI) ** 2) - (y - PI) ** 2).exp()


@in_plane((-1.2, 1.2), [[1, 1]])
def leon(x: Tensor, y: Tensor) -> Tensor:
    """A cubic banana."""
    return 100 * (y - x**3) ** 2 + (1 - x) ** 2


@in_plane((-100, 100), [[0, 0]])
def bohachevsky1(x: Tensor, y: Tensor) -> Tensor:
    """A bowl with ripples along both axes."""
    return x**2 + 2 * y**2 - 0.3 * (3 * PI * x).cos() - 0.4 * (4 * PI * y).cos() + 0.7


@in_plane((-100, 100), [[0, 0]])
def bohachevsky2(x: Tensor, y: Tensor) -> Tensor:
    """A bowl with an egg box on it."""
    return x**2 + 2 * y**2 - 0.3 * (3 * PI * x).cos() * (4 * PI * y).cos() + 0.3


@in_plane((-100, 100), [[0, 0]])
def bohachevsky3(x: Tensor, y: Tensor) -> Tensor:
    """A bowl with slanted ripples."""
    return x**2 + 2 * y**2 - 0.3 * (3 * PI * x + 4 * PI * y).cos() + 0.3


@in_plane((-15, 10), [[-10, -10]])
def brent(x: Tensor, y: Tensor) -> Tensor:
    """A bowl with a bump beside its minimum."""
    return (x + 10) ** 2 + (y + 10) ** 2 + (-(x**2) - y**2).exp()


@in_plane((-10, 10), [[5, 4]])
def freudenstein_roth(x: Tensor, y: Tensor) -> Tensor:
    """A local minimum of 49 catches half of the starts."""
    return (-13 + x + ((5 - y) * y - 2) * y) ** 2 + (-29 + x + ((y + 1) * y - 14) * y) ** 2


@in_plane((-1, 1), [[0.25782521367, 0.25782521367]], 124.36218235561478)
def jennrich_sampson(x: Tensor, y: Tensor) -> Tensor:
    """Exponentials that do not fit: a large residual."""
    i = torch.arange(1, 11, dtype=x.dtype, device=x.device)
    return ((2 + 2 * i - (i * x[..., None]).exp() - (i * y[..., None]).exp()) ** 2).sum(-1)


@in_plane((0, 20), [[1, 10]])
def biggs_exp2(x: Tensor, y: Tensor) -> Tensor:
    """Two rates of decay, flat far away."""
    t = torch.arange(1, 11, dtype=x.dtype, device=x.device) / 10
    fit = (-t * x[..., None]).exp() - 5 * (-t * y[..., None]).exp()
    return ((fit - (-t).exp() + 5 * (-10 * t).exp()) ** 2).sum(-1)


@in_plane((-5, 5), [[0, 0], [2, 4]])
def price4(x: Tensor, y: Tensor) -> Tensor:
    """Three global minima, degree ten."""
    return (2 * x**3 * y - y**3) ** 2 + (6 * x - y**2 + y) ** 2


@in_plane((-10, 10), [[-1.0466805318046, 0]], -0.3523860738000362)
def aluffi_pentini(x: Tensor, y: Tensor) -> Tensor:
    """A double well, slightly tilted."""
    return 0.25 * x**4 - 0.5 * x**2 + 0.1 * x + 0.5 * y**2


@in_plane((-30, 30), [[6.189866586965680, 0.5]], -42.94438701899098)
def chichinadze(x: Tensor, y: Tensor) -> Tensor:
    """Waves in one variable, nearly flat in the other."""
    waves = 10 * (PI * x / 2).cos() + 8 * (5 * PI * x / 2).sin()
    return x**2 - 12 * x + 11 + waves - 0.2**0.5 * (-0.5 * (y - 0.5) ** 2).exp()


@in_plane((-20, 20), [[0, 14.945112151891959], [0, -14.945112151891959]], -24776.518342317686)
def deckkers_aarts(x: Tensor, y: Tensor) -> Tensor:
    """Two deep wells behind a ridge; condition number 10^3 at them."""
    square = x**2 + y**2
    return 1e5 * x**2 + y**2 - square**2 + 1e-5 * square**4


@in_plane((-5, 5), [[0, 0]])
def egg_crate(x: Tensor, y: Tensor) -> Tensor:
    """A bowl with an egg box on it."""
    return x**2 + y**2 + 25 * (x.sin() ** 2 + y.sin() ** 2)


@in_plane((-5, 5), [[3.4091868222, -2.1714330361]], 1.712780354862198)
def el_attar(x: Tensor, y: Tensor) -> Tensor:
    """Three equations that have no common root."""
    return (x**2 + y - 10) ** 2 + (x + y**2 - 7) ** 2 + (x**2 + y**3 - 1) ** 2


@in_plane((-1, 1), [[0.46732002530945826] * 2], 0.06447042053690566)
def giunta(x: Tensor, y: Tensor) -> Tensor:
    """Shallow waves."""

    def one(z: Tensor) -> Tensor:
        u = 16 / 15 * z - 1
        return u.sin() + u.sin() ** 2 + (4 * u).sin() / 50

    return 0.6 + one(x) + one(y)


@in_plane((-5, 5), [[i * PI / 2, j * PI] for i in (-3, -1, 1, 3) for j in (-1, 0, 1)])
def parsopoulos(x: Tensor, y: Tensor) -> Tensor:
    """Twelve global minima in the box."""
    return x.cos() ** 2 + y.sin() ** 2


@in_plane((-10, 10), [[0, 0]], 0.9)
def periodic(x: Tensor, y: Tensor) -> Tensor:
    """Forty-nine minima of value 1 around the one of 0.9."""
    return 1 + x.sin() ** 2 + y.sin() ** 2 - 0.1 * (-(x**2) - y**2).exp()


@in_plane((-500, 500), [[0, 0]])
def rotated_ellipse(x: Tensor, y: Tensor) -> Tensor:
    """A bowl of condition number 4, turned by 30 degrees."""
    return 7 * x**2 - 6 * 3**0.5 * x * y + 13 * y**2


@in_plane((-100, 100), [[0, 0]])
def schaffer2(x: Tensor, y: Tensor) -> Tensor:
    """Waves that get finer away from the minimum."""
    return 0.5 + ((x**2 - y**2).sin() ** 2 - 0.5) / (1 + 0.001 * (x**2 + y**2)) ** 2


@in_plane((-1, 1), [[-0.024403079743, 0.210612427155]], -3.306868647475237)
def trefethen(x: Tensor, y: Tensor) -> Tensor:
    """Waves of five lengths; a problem of the Hundred-Dollar, Hundred-Digit Challenge."""
    waves = (50 * x).sin().exp() + (60 * y.exp()).sin() + (70 * x.sin()).sin() + (80 * y).sin().sin()
    return waves - (10 * (x + y)).sin() + (x**2 + y**2) / 4


@in_plane((-50, 50), [[0, 0]], -400.0)
def venter_sobieski(x: Tensor, y: Tensor) -> Tensor:
    """A bowl with waves of two lengths."""
    return sum((z**2 - 100 * z.cos() ** 2 - 100 * (z**2 / 30).cos() for z in (x, y)), torch.zeros_like(x))


@in_plane((-5, 5), [[1, 2], [1.596804153876933, 0.806391692246134]])
def wayburn_seader(x: Tensor, y: Tensor) -> Tensor:
    """Degree twelve: slopes from 1 to 10^8."""
    return (x**6 + y**4 - 17) ** 2 + (2 * x + y - 4) ** 2


@in_plane((-5, 10), [[-0.029895980033, 0]], -0.003791237220468656)
def zettl(x: Tensor, y: Tensor) -> Tensor:
    """A ring with a slight tilt."""
    return (x**2 + y**2 - 2 * x) ** 2 + x / 4


@in_plane((-2 * PI, 2 * PI), [[4.701043130196, 3.152938503721], [-1.582142177, -3.130246803]], -106.76453674926478)
def bird(x: Tensor, y: Tensor) -> Tensor:
    """Deep holes in a plane of waves."""
    return x.sin() * ((1 - y.cos()) ** 2).exp() + y.cos() * ((1 - x.sin()) ** 2).exp() + (x - y) ** 2


@in_plane((-10, 10), [[1, 0]])
def engvall(x: Tensor, y: Tensor) -> Tensor:
    """A bowl of degree four."""
    return x**4 + y**4 + 2 * x**2 * y**2 - 4 * x + 3


@in_plane((-10, 10), [[1, 1]])
def levy13(x: Tensor, y: Tensor) -> Tensor:
    """A bowl with fine waves."""
    first, second = (3 * PI * y).sin() ** 2, (2 * PI * y).sin() ** 2
    return (3 * PI * x).sin() ** 2 + (x - 1) ** 2 * (1 + first) + (y - 1) ** 2 * (1 + second)


@in_plane((-5, 5), [[-2, 0], [0, 0]])
def treccani(x: Tensor, y: Tensor) -> Tensor:
    """Two equal wells."""
    return x**4 + 4 * x**3 + 4 * x**2 + y**2


_SHUBERT = (
    (-7.0835064076515595, -0.8003211004719731, 5.482864206708),
    (-7.708313735499348, -1.4251284283198, 4.858056878),
)


@in_plane((-10, 10), [p for a in _SHUBERT[0] for b in _SHUBERT[1] for p in ([a, b], [b, a])], -186.73090883102392)
def shubert(x: Tensor, y: Tensor) -> Tensor:
    """Eighteen global minima in the box among hundreds of local ones."""
    i = torch.arange(1, 6, dtype=x.dtype, device=x.device)
    first, second = ((i * ((i + 1) * z[..., None] + i).cos()).sum(-1) for z in (x, y))
    return first * second


@in_plane((-10, 10), [[2, 1]])
def bazaraa_shetty(x: Tensor, y: Tensor) -> Tensor:
    """Quartic in one direction, flat at the minimum."""
    return (x - 2) ** 4 + (x - 2 * y) ** 2
