"""Tasks: classification, language modelling, calibration, and test functions of optimization."""

from fgtrain.tasks.base import Task
from fgtrain.tasks.calibration import Calibration, Guess
from fgtrain.tasks.catalogue import CataloguedFunction
from fgtrain.tasks.classification import Classification
from fgtrain.tasks.functions import Beale, Function, Himmelblau, Matyas, Points, Rosenbrock, Sphere, StyblinskiTang
from fgtrain.tasks.language_modeling import LanguageModeling
from fgtrain.tasks.recall import Recall

__all__ = [
    "Beale",
    "Calibration",
    "CataloguedFunction",
    "Classification",
    "Function",
    "Guess",
    "Himmelblau",
    "LanguageModeling",
    "Matyas",
    "Points",
    "Recall",
    "Rosenbrock",
    "Sphere",
    "StyblinskiTang",
    "Task",
]
