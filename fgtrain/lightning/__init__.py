"""Everything that needs Lightning."""

from fgtrain.lightning.convert import convert
from fgtrain.lightning.module import EstimatorModule

__all__ = ["EstimatorModule", "convert"]
