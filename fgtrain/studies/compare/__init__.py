"""Fair comparison of methods: same data order, initialisation and budget, each method with its own learning rate."""

from fgtrain.studies.compare.plan import Comparison, parse
from fgtrain.studies.compare.report import write_report
from fgtrain.studies.compare.runs import compare

__all__ = ["Comparison", "compare", "parse", "write_report"]
