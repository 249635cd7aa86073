"""Where a rack's network is: in a namespace of its own, or among the host's interfaces.

A libvirtd of the rack's own lives in the rack's namespace. Any other one, such as qemu:///system, makes its taps
among the host's interfaces, so the bridges must be there too: under names that no other rack has, marked so that
exactly what is ours is removed, and only if the rack's addresses mean nothing else on this host.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import RacklessError
from orchestrator.network import namespace
from orchestrator.settings import PRIVATE_LIBVIRT, RackPaths
from orchestrator.spec import mac_address

T = TypeVar("T")
MANAGEMENT = "mgmt"
FABRIC = "fabric"
_MAIN_TABLE = 254  # RT_TABLE_MAIN: the table `ip route` shows
_MISSING = (errno.ENODEV, errno.ENOENT)


def port(bridge: str) -> str:
    """Name of a bridge's port to other hosts (see vxlan.py): at most 15 bytes, IFNAMSIZ, up to side 99."""
    return f"vx{bridge}"


@dataclass(frozen=True)
class Place(ABC):
    """Where a rack's network is, and what its parts are called there."""

    rack: str

    @property
    @abstractmethod
    def kind(self) -> str:
        """What `gc` calls it: "namespace" or "bridges"."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What `ip` calls it."""

    @abstractmethod
    def bridge(self, network: str) -> str:
        """Name of the bridge of a network, MANAGEMENT or FABRIC."""

    def side(self, number: int) -> str:
        """Name of the bridge for a side of a partition: 0 is the fabric itself."""
        return f"{self.bridge(FABRIC)}~{number}" if number else self.bridge(FABRIC)

    def sides(self, net: Any) -> dict[str, int]:
        """The bridges of sides other than 0 that are there: name and index."""
        begin = self.side(1)[:-1]
        names = [str(link.get_attr("IFLA_IFNAME")) for link in net.get_links()]
        found = {name: self.find(net, name) for name in names if name.startswith(begin)}
        return {name: index for name, index in found.items() if index is not None}

    @abstractmethod
    def tap(self, network: str, index: int) -> str:
        """Name of the tap with which the blade at ``index`` is in a network."""

    @abstractmethod
    def exists(self) -> bool:
        """Is the rack's network there, or a part of it?"""

    @abstractmethod
    def prepare(self, networks: dict[str, IPv4Network]) -> None:
        """Make ready for bridges. RacklessError when they cannot be here."""

    @abstractmethod
    def find(self, net: Any, name: str) -> int | None:
        """Index of the rack's bridge of this name. RacklessError when it is somebody else's."""

    @abstractmethod
    def add(self, net: Any, name: str) -> int:
        """Make a bridge; its index."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the rack's network, and nothing else; no error when there is none."""

    @abstractmethod
    def strangers(self, own: Callable[[int], bool]) -> bool:
        """Would a process that is not ``own`` (which is given its pid) lose its network if this were removed?"""

    @abstractmethod
    def target(self) -> dict[str, Any]:
        """What `ip link add` is told so that a device made among this process's own interfaces appears here."""

    @abstractmethod
    def entry(self) -> list[str]:
        """Words before a command that is to reach the blades' addresses (they need root); none when all do."""

    @abstractmethod
    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        """A TCP connection to a blade; OSError when ``timeout`` seconds pass without."""

    @abstractmethod
    def inside(self, action: Callable[[], T]) -> T:
        """What `action` returns, run where sockets are in the network; they stay there."""

    @abstractmethod
    def _open(self) -> Any:
        """A netlink socket in the network."""

    @contextmanager
    def netlink(self, what: str) -> Iterator[Any]:
        """A netlink socket for the block, whose errors become one line: "cannot ``what``: reason"."""
        from pyroute2 import NetlinkError  # takes a sixth of a second to import, here and below

        try:
            with self._open() as net:
                yield net
        except NetlinkError as error:
            raise _refused(what, error.code) from error
        except PermissionError as error:
            raise _refused(what, errno.EPERM) from error


def on(paths: RackPaths, host: str | None) -> Place:
    """Where the network of a rack is on a host (None: this one). From here only names can be told of another's."""
    return of(paths) if host is None else HostNetwork(paths.name, paths.settings.run_dir)


def of(paths: RackPaths) -> Place:
    """Where the network of a rack is on this host."""
    if paths.settings.libvirt_uri == PRIVATE_LIBVIRT:
        return OwnNamespace(paths.name)
    return HostNetwork(paths.name, paths.settings.run_dir)


class OwnNamespace(Place):
    """The namespace ``rackless-RACK``: plain names, and addresses that never meet others."""

    @property
    def kind(self) -> str:
        return "namespace"

    @property
    def name(self) -> str:
        return namespace.name_of(self.rack)

    def bridge(self, network: str) -> str:
        return network

    def tap(self, network: str, index: int) -> str:
        return f"{network}{index}"

    def exists(self) -> bool:
        return namespace.exists(self.rack)

    def prepare(self, networks: dict[str, IPv4Network]) -> None:
        from pyroute2 import netns

        if not self.exists():
            try:
                (namespace.NAMED / self.name).unlink(missing_ok=True)
                netns.create(self.name)
            except OSError as error:
                raise _refused(f"make the namespace {self.name}", error.errno or 0) from error
        with self.netlink("bring up the rack's own loopback") as net:
            net.link("set", index=net.link_lookup(ifname="lo")[0], state="up")

    def find(self, net: Any, name: str) -> int | None:
        return next(iter(net.link_lookup(ifname=name)), None)

    def add(self, net: Any, name: str) -> int:
        net.link("add", ifname=name, kind="bridge")
        return int(net.link_lookup(ifname=name)[0])

    def remove(self) -> None:
        from pyroute2 import netns

        try:
            if self.exists():
                netns.remove(self.name)
            (namespace.NAMED / self.name).unlink(missing_ok=True)
        except OSError as error:
            # Who may not unmount it cannot remove its file either, which is said to be busy.
            code = errno.EPERM if error.errno == errno.EBUSY else error.errno or 0
            raise _refused(f"remove the namespace {self.name}", code) from error

    def strangers(self, own: Callable[[int], bool]) -> bool:
        mark = (namespace.NAMED / self.name).stat().st_ino
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended
                if (entry / "ns/net").stat().st_ino == mark and not own(int(entry.name)):
                    return True
        return False

    def target(self) -> dict[str, Any]:
        return {"net_ns_fd": self.name}

    def entry(self) -> list[str]:
        return ["nsenter", f"--net={namespace.NAMED / self.name}"]

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        return namespace.connect(self.rack, address, port, timeout)

    def inside(self, action: Callable[[], T]) -> T:
        return namespace.inside(self.rack, action)

    def _open(self) -> Any:
        from pyroute2 import NetNS

        return NetNS(self.name, flags=os.O_RDONLY)  # or it would make one


@dataclass(frozen=True)
class HostNetwork(Place):
    """Among the host's interfaces: ``rlm-HASH`` and ``rlf-HASH``, whose alias is ``rackless:RACK:RUN-FOLDER``.

    Taps need no mark: they are ports of these bridges, and end with their blade.
    """

    run: Path
    """RACKLESS_RUN: a rack of the same name may be in another."""

    @property
    def kind(self) -> str:
        return "bridges"

    @property
    def name(self) -> str:
        return f"{self.bridge(MANAGEMENT)} {self.bridge(FABRIC)}"

    @property
    def mark(self) -> str:
        """The alias of the rack's bridges (`ip link` shows it)."""
        return f"rackless:{self.rack}:{self.run}"

    def bridge(self, network: str) -> str:
        return f"rl{network[0]}-{hashlib.sha256(self.rack.encode()).hexdigest()[:6]}"

    def tap(self, network: str, index: int) -> str:
        return f"{self.bridge(network)}-{index}"  # at most 15 bytes, IFNAMSIZ, up to blade 9999

    def exists(self) -> bool:
        with self.netlink("look for the rack's bridges") as net:
            return any(self._ours(net, self.bridge(network)) for network in (MANAGEMENT, FABRIC))

    def prepare(self, networks: dict[str, IPv4Network]) -> None:
        with self.netlink("read the host's addresses") as net:
            for network, subnet in networks.items():
                for theirs, interface in self._taken(net):
                    if subnet.overlaps(theirs):
                        key = "management" if network == MANAGEMENT else network
                        raise RacklessError(
                            f"the {key} subnet {subnet} of rack {self.rack} clashes with {theirs} of this host"
                            + (f" ({interface})" if interface else ""),
                            hint=f"write another range in the rack file, as in `{key}: {{subnet: 10.99.0.0/24}}`; or "
                            "unset RACKLESS_LIBVIRT_URI, and the rack's addresses are apart from the host's",
                        )

    def find(self, net: Any, name: str) -> int | None:
        index = self._ours(net, name)
        if index is None and net.link_lookup(ifname=name):
            raise RacklessError(f"the interface {name} of this host is not of rack {self.rack}",
                                hint="give the rack another name, or remove that interface")  # fmt: skip
        return index

    def add(self, net: Any, name: str) -> int:
        net.link("add", ifname=name, kind="bridge", address=self._mac(name))
        index = int(net.link_lookup(ifname=name)[0])
        net.link("set", index=index, ifalias=self.mark)  # the kernel does not take it from "add"
        return index

    def remove(self) -> None:
        with self.netlink(f"remove the bridges of rack {self.rack}") as net:
            bridges = {self.bridge(network): self._ours(net, self.bridge(network)) for network in (MANAGEMENT, FABRIC)}
            for name, index in {**bridges, **self.sides(net)}.items():
                if index is not None:
                    for each in (*net.link_lookup(ifname=port(name)), index):
                        net.link("del", index=each)

    def strangers(self, own: Callable[[int], bool]) -> bool:
        return False

    def target(self) -> dict[str, Any]:
        return {}

    def entry(self) -> list[str]:
        return []

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        try:
            socket.if_nametoindex(self.bridge(MANAGEMENT))
        except OSError:  # or the host would look for the address elsewhere, behind its default route
            raise namespace.no_network(self.rack) from None
        return socket.create_connection((address, port), timeout=timeout)

    def inside(self, action: Callable[[], T]) -> T:
        return action()

    def _open(self) -> Any:
        from pyroute2 import IPRoute

        return IPRoute()

    def _ours(self, net: Any, name: str) -> int | None:
        for index in net.link_lookup(ifname=name):
            (link,) = net.get_links(index)
            mark = link.get_attr("IFLA_IFALIAS")
            # An `up` that was killed between making and marking it left only its MAC, which nobody else has.
            if mark == self.mark or (mark is None and link.get_attr("IFLA_ADDRESS") == self._mac(name)):
                return int(index)
        return None

    def _mac(self, bridge: str) -> str:
        return mac_address(self.rack, str(self.run), bridge)

    def _taken(self, net: Any) -> Iterator[tuple[IPv4Network, str]]:
        """Addresses and routes of the host but the default one, each with its interface; the rack's own are not."""
        names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in net.get_links()}
        own = {index for network in (MANAGEMENT, FABRIC) if (index := self._ours(net, self.bridge(network)))}
        for address in net.get_addr(family=socket.AF_INET):
            if address["index"] not in own:
                network = IPv4Network((address.get_attr("IFA_ADDRESS"), address["prefixlen"]), strict=False)
                yield network, names.get(address["index"], "")
        for route in net.get_routes(family=socket.AF_INET, table=_MAIN_TABLE):
            interface = route.get_attr("RTA_OIF")
            if route["dst_len"] and interface not in own:
                yield IPv4Network((route.get_attr("RTA_DST"), route["dst_len"])), names.get(interface, "")


def _refused(what: str, code: int) -> RacklessError:
    hint = "run it as root, as with sudo" if code == errno.EPERM else "see `rackless doctor`"
    if code in _MISSING:
        hint = "this host's kernel may lack what it takes; see `rackless doctor`"
    return RacklessError(f"cannot {what}: {os.strerror(code)}", hint=hint)
