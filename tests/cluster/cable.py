"""A bad cable between a node and the others: `cable.py NODE DELAY_S LOSS`, inside the cluster's namespaces.

The node's eth0 becomes a TAP device, and so does its end at the bridge; this process carries the packets between them, each
DELAY_S seconds late in each direction, and drops a share LOSS of them, drawn at random. When it ends, both devices are gone.
The kernel's own netem would do the same, where it is built in.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000


def tap(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TAP | IFF_NO_PI))
    return handle


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def lay(node: str) -> tuple[int, int]:
    """The two ends: at the bridge, and in the node, with the address that its eth0 had."""
    address = subprocess.run(
        ["ip", "-n", node, "-br", "-4", "address", "show", "eth0"], check=True, capture_output=True, text=True
    ).stdout.split()[2]
    mac = subprocess.run(
        ["ip", "-n", node, "-br", "link", "show", "eth0"], check=True, capture_output=True, text=True
    ).stdout.split()[2]
    ends = [tap(f"cable-{node}")]
    ip("link", "set", f"cable-{node}", "master", "br0", "up")
    ip("-n", node, "link", "set", "eth0", "down")
    ip("-n", node, "link", "set", "eth0", "name", "eth1")
    with open(f"/run/netns/{node}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network of {node}")
    ends.append(tap("eth0"))
    ip("address", "flush", "dev", "eth1")
    ip("link", "set", "eth0", "address", mac)  # or the others would ask for it first
    ip("address", "add", address, "dev", "eth0")
    ip("link", "set", "eth0", "up")
    return ends[0], ends[1]


def carry(ends: tuple[int, int], delay_s: float, loss: float) -> None:
    drawn, under_way, number = random.Random(0), [], 0
    print("up", flush=True)
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], wait)[0]:
            packet = os.read(end, 65_536)
            number += 1
            if drawn.random() >= loss:
                heapq.heappush(under_way, (time.monotonic() + delay_s, number, ends[end == ends[0]], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            *_, end, packet = heapq.heappop(under_way)
            os.write(end, packet)


if __name__ == "__main__":
    carry(lay(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
