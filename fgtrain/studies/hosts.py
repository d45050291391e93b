"""Hosts made of network namespaces on this machine, at a switch with ports of limited rate."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

from fgtrain.errors import UserError

DEVICE = "fg0"
"""The network device of every host."""
FIRST_ADDRESS = "10.77.0.1"
"""The address of the first host."""
_CLONE_NEWNET = 0x40000000


class NoNamespaces(UserError):
    """This machine, or this user, cannot make network namespaces."""


def ip(*arguments: str) -> None:
    """Run `ip` of iproute2; raises CalledProcessError with its stderr."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def connected(count: int, mbit: float) -> Generator[list[str]]:
    """Names of `count` namespaces with addresses 10.77.0.1, .2, ..., which disappear at the end.

    A queue (`tc` with tbf) limits each direction of every link. It lets at most 1 ms pass at once, or 4 kB.

    Args:
        count: the number of hosts.
        mbit: the rate of each link in Mbit/s, each way.

    Raises:
        NoNamespaces: iproute2 is missing, or the user may not make namespaces.
    """
    if not (shutil.which("ip") and shutil.which("tc")):
        raise NoNamespaces("hosts on this machine need network namespaces: install ip and tc (iproute2, Linux)")
    switch, *names = (f"fgtrain-{os.getpid()}-{part}" for part in ("switch", *range(count)))
    limit = f"tbf rate {mbit}mbit burst {max(4000, round(125 * mbit))}b latency 400ms"
    with contextlib.ExitStack() as undo:
        try:
            for namespace in (switch, *names):
                ip("netns", "add", namespace)
                undo.callback(ip, "netns", "del", namespace)
            ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", switch, "link", "set", "bridge", "up")
            for i, host in enumerate(names):
                port = f"port{i}"
                ip("link", "add", DEVICE, "netns", host, "type", "veth", "peer", "name", port, "netns", switch)
                ip("-n", switch, "link", "set", port, "master", "bridge", "up")
                ip("-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", DEVICE)
                ip("-n", host, "link", "set", "lo", "up")
                ip("-n", host, "link", "set", DEVICE, "up")
                for namespace, device in ((host, DEVICE), (switch, port)):
                    ip("netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root", *limit.split())
        except subprocess.CalledProcessError as error:
            raise NoNamespaces(
                f"cannot make network namespaces ({' '.join(error.stderr.split())}); run as root, on a machine that "
                "allows them"
            ) from error
        yield names


def enter(host: str) -> None:
    """Move the process into the namespace of a host, whose device Gloo takes."""
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    with Path("/run/netns", host).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot enter the network namespace", host)


def sent_bytes() -> int:
    """Bytes that the host of this process has sent, with all headers, as the kernel's counter of the device has them.

    Under /sys/class/net, a process that has entered a namespace still sees the devices of its old one.
    """
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (counters,) = (line.partition(":")[2].split() for line in lines if line.strip().startswith(f"{DEVICE}:"))
    return int(counters[8])
