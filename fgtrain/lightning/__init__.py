"""Everything that needs Lightning."""

from fgtrain.lightning.module import EstimatorModule

__all__ = ["EstimatorModule"]
