"""Random directions: the laws they are drawn from, and sums of them.

`laws` says how a direction is drawn, `directions` holds K of them over all parameters, `chunks` draws many in parts,
`combine` turns K directional derivatives into weights, and `factored` keeps a low-rank gradient as a product.
"""

from fgtrain.tangents.laws import Coordinate, LowRank, Normal, Rademacher, Sphere, Tangents, law_or

__all__ = ["Coordinate", "LowRank", "Normal", "Rademacher", "Sphere", "Tangents", "law_or"]
