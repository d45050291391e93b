"""Several hosts, made of network namespaces on this machine, at a switch with ports of limited rate."""

import re
import subprocess
import time
from functools import partial

import pytest

from fgtrain.studies.hosts import DEVICE, FIRST_ADDRESS, NoNamespaces, connected, ip
from tests.commands import results_under
from tests.kills import PATIENCE, Started, enter_network


@pytest.fixture
def hosts(request):
    """Network namespaces at a switch, 100 Mbit/s each way; two, or as many as the parameter."""
    try:
        with connected(getattr(request, "param", 2), mbit=100) as names:
            yield names
    except NoNamespaces as error:
        pytest.skip(str(error))


def start(hosts, folder, *overrides):
    """The command line on every host: torchrun, with one rank."""
    torchrun = (f"--nnodes={len(hosts)}", "--nproc_per_node=1", f"--master_addr={FIRST_ADDRESS}", "--master_port=29517")
    command = ("trainer=ddp", "trainer.accelerator=cpu", "distributed.timeout_seconds=10", *overrides)
    return [
        Started(
            folder,
            *command,
            torchrun=(*torchrun, f"--node_rank={i}"),
            disturb=partial(enter_network, host=host),
        )
        for i, host in enumerate(hosts)
    ]


def sent_bytes(host):
    counter = ["ip", "netns", "exec", host, "cat", f"/sys/class/net/{DEVICE}/statistics/tx_bytes"]
    return int(subprocess.run(counter, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [("method=fwdgrad",), ("method=backprop", "distributed.gradients=power_sgd")],
    ids=["derivatives", "compressed gradients"],
)
def test_a_cut_link_ends_both_hosts_and_the_run_can_be_resumed(hosts, tmp_path, method):
    ranks = start(hosts, tmp_path, *method, "trainer.max_steps=1000000", "trainer.val_check_interval=20")
    deadline = time.monotonic() + PATIENCE
    while not (checkpoints := list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt"))):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert [rank.process.exitcode for rank in ranks] == [None, None], ranks[0].err
        time.sleep(0.02)
    time.sleep(1)
    ip("-n", hosts[0], "link", "set", DEVICE, "down")
    for rank in ranks:
        assert rank.wait() not in (0, None), rank.err
    told = re.findall(r"fgtrain: rank ([01]) lost another rank in the middle of the run", ranks[0].err)
    assert set(told) == {"0", "1"}, ranks[0].err
    ip("-n", hosts[0], "link", "set", DEVICE, "up")
    assert len(list(tmp_path.glob("runs/*/*"))) == 1
    (checkpoint,) = checkpoints
    longer = ("trainer.max_steps=1000000", "trainer.max_time=00:00:00:02")
    again = start(hosts, tmp_path, *method, f"resume={checkpoint}", *longer)
    for rank in again:
        assert rank.wait() == 0, rank.err
    (results,) = results_under(tmp_path)
    assert results["world_size"] == 2
    assert results["steps"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 3], indirect=True, ids=["two", "three"])
def test_the_link_carries_what_is_counted(hosts, tmp_path):
    """A model of 1.1 million parameters: packets and start-up cost more than forward gradients, a gradient does not."""
    sent, steps = {}, 10
    for method in ("fwdgrad", "backprop"):
        before = sent_bytes(hosts[1])
        options = ("model.hidden=[1024,1024]", "callbacks=none", f"trainer.max_steps={steps}", "data.batch_size=16")
        for rank in start(hosts, tmp_path, f"method={method}", *options):
            assert rank.wait() == 0, rank.err
        sent[method] = sent_bytes(hosts[1]) - before
    gradient, ranks = 4 * 1_126_410, len(hosts)
    of_a_ring = 2 * (ranks - 1) / ranks * gradient  # what one rank sends, as in fgtrain.studies.benchmarks.scaling
    assert sent["backprop"] - sent["fwdgrad"] == pytest.approx(steps * of_a_ring, rel=0.1)
