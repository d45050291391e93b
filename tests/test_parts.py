"""Parts of a study: an interrupted command keeps them, and the same command does only the others."""

import argparse
from typing import NamedTuple

import pytest

from fgtrain.errors import Interrupted
from fgtrain.studies.parts import Parts


class Measured(NamedTuple):
    value: float


def test_the_same_command_goes_on(tmp_path):
    def study(seed, *names, stop=False):
        made = []

        def measure(name):
            made.append(name)
            return Measured(float("inf"))

        with Parts(argparse.Namespace(out=tmp_path, seed=seed)) as parts:
            found = [parts(Measured, name, lambda name=name: measure(name)) for name in names]
            if stop:
                raise KeyboardInterrupt
        assert found == [Measured(float("inf"))] * len(names)
        return made

    with pytest.raises(Interrupted, match=f"2 finished parts are kept in {tmp_path}") as stopped:
        study(0, "a", "b", stop=True)
    assert stopped.value.exit_status == 130
    assert study(1, "a") == ["a"]  # another command
    assert study(0, "a", "b", "c") == ["c"]
    assert not [*tmp_path.iterdir()]
    assert study(0, "a") == ["a"]  # a whole study is measured anew
