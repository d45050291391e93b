"""Forward-mode automatic differentiation of a whole loss: one pass returns its value and its derivative along v."""

from fgtrain.forward_ad.native import directional_derivatives, jvp

__all__ = ["directional_derivatives", "jvp"]
