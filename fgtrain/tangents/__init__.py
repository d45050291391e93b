"""Random directions: their laws, and weighted sums of them.

`laws` draws directions, `directions` holds K of them over all parameters, and `chunks` draws many in parts. `combine`
turns K directional derivatives into weights, and `factored` keeps a low-rank gradient as a product.
"""

from fgtrain.tangents.laws import Coordinate, LowRank, Normal, Rademacher, Sphere, Tangents, law_or

__all__ = ["Coordinate", "LowRank", "Normal", "Rademacher", "Sphere", "Tangents", "law_or"]
