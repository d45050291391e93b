"""Conditions on the machine that tests need."""

import shutil

import pytest

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
