"""Every method of conf/method, built small."""

from functools import cache

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.cases import CASES
from tests.commands import composed, options

METHODS = options("method")


OF_ANY_NETWORK = [method for method in METHODS if method != "forward_in_time"]
"""The methods that are not for one kind of layer."""


EVERY_METHOD = pytest.mark.parametrize("method", OF_ANY_NETWORK)


RESIDUAL = "residual block"
SCALAR, TIED, POINTS = "regression, scalar loss, inner function of the model", "tied weights", "a bare parameter"


REFUSED = {  # by name of the case; POINTS stands for the test functions too
    "activity": {TIED, POINTS},
    "activity_head": {TIED, POINTS},
    "fdfa": {TIED, POINTS},
    "forward_in_time": {case.name for case in CASES} | {POINTS},
    "highway": {case.name for case in CASES} - {RESIDUAL} | {POINTS},
    "highway_forward": {case.name for case in CASES} - {RESIDUAL} | {POINTS},
    "local": {SCALAR, TIED, POINTS},
    "local_guess": {SCALAR, TIED, POINTS},
}


@cache
def configuration(method):
    """The arguments in its file, and the `_target_` they are for."""
    return OmegaConf.to_container(composed(f"method={method}").method, resolve=True)


def make(method, **changed):
    """The estimator as its file configures it, but for those of its arguments that are given here."""
    node = configuration(method)
    return instantiate(node | {key: value for key, value in changed.items() if key in node})


def refuses(method, case):
    return case in REFUSED.get(method, ())


def table(methods=METHODS, refused=False):
    """Every method x every problem that it takes, or every one that it refuses."""
    pairs = [(method, case) for method in methods for case in CASES if refuses(method, case.name) == refused]
    ids = [f"{method}, {case.name}" for method, case in pairs]
    return pytest.mark.parametrize(("method", "case"), pairs, ids=ids)
