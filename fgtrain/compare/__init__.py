"""Fair comparison of methods: same data order, initialisation and budget, each method with its own learning rate."""

from fgtrain.compare.plan import Comparison, parse
from fgtrain.compare.report import write_report
from fgtrain.compare.runs import compare

__all__ = ["Comparison", "compare", "parse", "write_report"]
