"""What is done on a blade's own host: its files, its provisioning channel, and the host's part of the network.

One table of plain functions. On this machine `Hosts.do` (hypervisor/hosts.py) calls them; on another host the same
table is served by `rackless on-host`, which the orchestrator starts there, through lines of JSON on its standard input
and output. So a deed is written once, and knows nothing of where it runs. Arguments and results are plain data.

Every path is the same on all hosts: a rack has its folders (RACKLESS_CACHE, _STATE, _RUN of the machine that `rackless`
was called on) at the same place everywhere.
"""

from __future__ import annotations

import json
import platform
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from orchestrator import __version__, blade_files, guests, pmem
from orchestrator.channel import open_channel
from orchestrator.errors import RacklessError
from orchestrator.network import bridge, place, shaping, sides, vxlan
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec

HERE_LIBVIRT = "qemu:///system"
"""On another host bridges are among its own interfaces, where its libvirt makes taps."""


def hello(_paths: RackPaths) -> dict[str, Any]:
    """What must be the same on all hosts: Rackless, QEMU; and the processor, where blades run on it directly."""
    from orchestrator.hypervisor.probe import QEMU
    from orchestrator.hypervisor.template import emulator_version

    emulator = shutil.which(QEMU)
    return {"rackless": __version__, "emulator": emulator and f"{emulator} ({emulator_version(emulator)})",
            "processor": _processor()}  # fmt: skip


def vacant(_paths: RackPaths) -> None:
    """Nothing: whether another host has files of somebody else's rack of this name is asked before, see _CLAIMING."""


def routes(_paths: RackPaths, address: str, peers: list[str]) -> dict[str, Any]:
    """How this host reaches its peers; see vxlan.routes."""
    return {peer: asdict(route) for peer, route in vxlan.routes(address, peers).items()}


def extend(paths: RackPaths, mtu: int, tunnel: dict[str, Any]) -> None:
    """Bring the rack's networks to this host; see bridge.extend."""
    bridge.require_taps()
    ends = vxlan.Tunnel(tunnel["number"], tunnel["address"], tuple(tunnel["peers"]))
    bridge.extend(place.of(paths), mtu, ends)


def part(paths: RackPaths, sides_by_index: dict[str, int]) -> None:
    """Part the fabric; see sides.part."""
    sides.part(place.of(paths), {int(index): side for index, side in sides_by_index.items()})


def limit(paths: RackPaths, index: int, bandwidth: int | None) -> None:
    """Limit a blade's bandwidth; see shaping.limit."""
    shaping.limit(place.of(paths), index, bandwidth)


def leave(paths: RackPaths, end: bool) -> None:
    """Remove the rack's networks from this host; at the rack's `end` with all in its run folder.

    Else the rack goes on elsewhere, and a host that is a namespace of this machine has that folder in common with it.
    """
    place.of(paths).remove()
    run = paths.settings.run_dir / paths.name
    if end:
        shutil.rmtree(run, ignore_errors=True)
    else:
        with suppress(OSError):  # it is in use, or was never there
            run.rmdir()


def forget(paths: RackPaths) -> None:
    """Remove all files of the rack from this host."""
    shutil.rmtree(paths.root, ignore_errors=True)


def missing(_paths: RackPaths, files: dict[str, int]) -> list[str]:
    """Those of the files (their sizes by path) that this host does not have whole."""
    return [path for path, size in files.items() if not (Path(path).is_file() and Path(path).stat().st_size == size)]


def kept(paths: RackPaths) -> list[str]:
    """Blades whose disk or persistent memory is on this host, whether they run or not."""
    return sorted({file.parent.name for name in ("disk", "pmem") for file in paths.blades.glob(f"*/{name}.raw")})


def make_files(paths: RackPaths, spec: dict[str, Any]) -> None:
    """A blade's disk and persistent memory; see blade_files.make."""
    blade_files.make(paths, BladeSpec.from_json(spec))


def remove_files(paths: RackPaths, name: str) -> None:
    """All files of a blade; see blade_files.remove."""
    blade_files.remove(paths, name)


def make_folder(paths: RackPaths, name: str) -> None:
    """Where the blade's files are to be, and its sockets."""
    paths.blade(name).root.mkdir(parents=True, exist_ok=True)
    (paths.settings.run_dir / paths.name).mkdir(parents=True, exist_ok=True)


def cache_mode(_paths: RackPaths, file: str) -> str:
    """How QEMU may cache a disk here; see domain.cache_mode."""
    from orchestrator.hypervisor import domain

    return domain.cache_mode(Path(file))


def clone(_paths: RackPaths, state: str, target: str, guest: dict[str, Any]) -> None:
    """Write a save image with another identity; see template.clone."""
    from orchestrator.hypervisor import template
    from orchestrator.hypervisor.domain import Guest

    template.clone(Path(state), Path(target), Guest.from_json(guest))


def discard(_paths: RackPaths, file: str) -> None:
    """Remove a file, if it is there."""
    Path(file).unlink(missing_ok=True)


def request(_paths: RackPaths, socket: str, blade: str, message: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A request over a blade's provisioning channel, and its reply; RacklessError after `seconds`."""
    deadline = time.monotonic() + seconds
    with open_channel(Path(socket), blade, deadline) as channel:
        return channel.request(message, deadline)


def shut_down(paths: RackPaths, name: str) -> None:
    """A blade has ended in order; see pmem.shut_down."""
    pmem.shut_down(paths.blade(name))


def pull_power(paths: RackPaths, name: str, survive: float, seed: int) -> dict[str, int]:
    """A blade's power is gone; see pmem.pull_power."""
    return asdict(pmem.pull_power(paths.blade(name), survive, seed))


def console(paths: RackPaths, name: str) -> str:
    """What a blade's console has shown; nothing when there is no log of it."""
    with suppress(OSError):
        return paths.blade(name).console.read_bytes().decode(errors="replace")
    return ""


DEEDS: Mapping[str, Callable[..., Any]] = {
    deed.__name__: deed
    for deed in (hello, vacant, routes, extend, part, limit, leave, forget, missing, kept, make_files, remove_files,
                 make_folder, cache_mode, clone, discard, request, shut_down, pull_power, console)
}  # fmt: skip

_CLAIMING = {"extend", "make_folder", "make_files"}
_INSISTING = {"vacant", "kept", "leave", "forget", "remove_files", "discard", "clone", "shut_down", "pull_power"}
"""Deeds that touch files: those must be this rack's, and not of somebody else's with its name; see guests.py."""


def serve(reader: IO[str], writer: IO[str]) -> None:
    """Do what the lines of `reader` ask for, several at once, until it ends. The first line says for which rack.

    RacklessError when it does not: somebody has typed this.
    """
    try:
        first = json.loads(reader.readline())
        cache, state, run = (Path(first[name]) for name in ("cache_dir", "state_dir", "run_dir"))
        paths = RackPaths(Settings(cache, state, run, HERE_LIBVIRT), first["rack"])
        home: str | None = first["home"]  # None where this host has the home's folders
    except (ValueError, KeyError, TypeError) as error:
        raise RacklessError("on-host is for another host's rackless, which says first what rack it is about",
                            hint="see docs/hosts.md") from error  # fmt: skip
    writing = threading.Lock()

    def answer(asked: dict[str, Any]) -> None:
        try:
            if home and asked["deed"] in _CLAIMING:
                guests.claim(paths, home)
            if home and asked["deed"] in _INSISTING:
                guests.insist(paths, home)
            reply = {"result": DEEDS[asked["deed"]](paths, **asked["fields"])}
        except RacklessError as error:
            reply = {"error": error.message, "hint": error.hint}
        except Exception as error:  # it must be told, or somebody waits for ever
            reply = {"error": f"{type(error).__name__}: {error}", "hint": None}
        with writing, suppress(BrokenPipeError):
            print(json.dumps({"id": asked["id"], **reply}), file=writer, flush=True)

    with ThreadPoolExecutor(paths.settings.max_workers) as pool:
        for line in reader:
            pool.submit(answer, json.loads(line))
        pool.shutdown(cancel_futures=True)  # nobody waits for what is not begun


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.machine()
