"""Network namespaces, one per rack, so that a rack's addresses never meet the host's (or another rack's)."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import RacklessError

T = TypeVar("T")
NAMED = Path("/run/netns")  # where iproute2 keeps named namespaces
_CLONE_NEWNET = 0x40000000


def name_of(rack: str) -> str:
    """The namespace of a rack, as ``ip netns`` shows it."""
    return f"rackless-{rack}"


def exists(rack: str) -> bool:
    """Is there a namespace for this rack?"""
    # A file that is no mount was left by a command that was killed between making the two.
    return os.path.ismount(NAMED / name_of(rack))


def inside(rack: str, action: Callable[[], T]) -> T:
    """Run ``action`` in a thread that has entered the rack's namespace, and return its result.

    Sockets made there stay in the namespace when used from other threads. Raises RacklessError when the rack
    has no namespace, and whatever ``action`` raises.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            enter(rack)
            outcome.append(action())
        except BaseException as error:  # handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=body, name=f"netns-{rack}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def enter(rack: str) -> None:
    """Move the calling thread into the rack's namespace, for good."""
    try:
        fd = os.open(NAMED / name_of(rack), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise no_network(rack) from None
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):  # os.setns is there from Python 3.12 on
            error = ctypes.get_errno()
            raise RacklessError(f"cannot enter the network of rack {rack}: {os.strerror(error)}", hint="run as root")
    finally:
        os.close(fd)


def no_network(rack: str) -> RacklessError:
    """What is wrong when blades are sought that have no network."""
    return RacklessError(f"rack {rack} has no network", hint="run `rackless up`")


def connect(rack: str, address: str, port: int, timeout: float) -> socket.socket:
    """A TCP connection to ``address:port`` inside the rack; OSError when ``timeout`` seconds pass without."""
    return inside(rack, lambda: socket.create_connection((address, port), timeout=timeout))
