"""The parts of fgtrain that need Lightning."""

from fgtrain.lightning.convert import convert
from fgtrain.lightning.module import EstimatorModule

__all__ = ["EstimatorModule", "convert"]
