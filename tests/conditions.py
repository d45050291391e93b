"""What a test needs of the machine."""

import shutil

import pytest

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
