"""Settings for exact tests: double precision by default, one thread, no plotting window."""

import gc
import os
import random
import signal

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores these
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and so does nohup


collect_ignore = ["databases.py"]  # has no doctests; what it imports is large, and only long tests need it


def pytest_collection_finish():
    """What the libraries made on import lives to the end; looking through it for garbage takes half a second a run."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)  # after the fixtures of the file are gone
def pytest_runtest_teardown(item, nextitem):
    """So does what is left of a file of tests: libraries that it was the first to use."""
    if nextitem is not None and nextitem.path != item.path:
        pytest_collection_finish()


@pytest.fixture(scope="session", autouse=True)
def compilations(tmp_path_factory, worker_id):
    """A folder for what torch.compile makes, of all workers and processes: the first use of one takes 25 seconds."""
    own = tmp_path_factory.getbasetemp()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((own if worker_id == "master" else own.parent) / "inductor")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def float64():
    """Double precision for tensors made without a dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
