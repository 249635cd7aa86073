"""QEMU's gdbserver on a blade that runs: its kernel, stopped and stepped from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import RacklessError
from orchestrator.hypervisor import domain, hosts
from orchestrator.settings import RackPaths

if TYPE_CHECKING:
    import libvirt


@contextmanager
def gdbserver(paths: RackPaths, blade: str) -> Iterator[Path]:
    """The Unix socket, of root alone, at which QEMU waits for gdb during the block.

    A blade stands still while gdb is attached; after the block it runs, unless it was paused before.
    RacklessError when the blade does not run, or QEMU refuses.
    """
    socket = paths.settings.run_dir / paths.name / f"{blade}.gdb"
    with hosts.opened(paths) as machines:
        found = machines.owned().get(blade)
        if found and found.host:
            raise RacklessError(f"blade {blade} is on host {found.host}: gdb needs its socket", hint="call it there")
        if found is None or found.state not in ("running", "paused"):
            raise RacklessError(f"blade {blade} does not run", hint="see `rackless status`")
        try:
            told = _monitor(found.domain, f"gdbserver unix:{socket},server=on,wait=off")
            if not socket.exists():
                raise RacklessError(f"QEMU of {blade} has no gdbserver: {told.strip() or 'no reason given'}")
            socket.chmod(0o600)
            yield socket
        finally:
            with suppress(RacklessError):  # it may have ended meanwhile
                _off(found)
            socket.unlink(missing_ok=True)


def _off(found: domain.Owned) -> None:
    _monitor(found.domain, "gdbserver none")
    state = domain.explain("look at it", found.domain.state)[0]
    if domain.STATES.get(state) == "paused" and found.state == "running":
        domain.explain("resume it", found.domain.resume)


def _monitor(running: libvirt.virDomain, command: str) -> str:
    import libvirt_qemu

    text = domain.explain(f"tell QEMU {command.split()[0]}", lambda: libvirt_qemu.qemuMonitorCommand(
        running, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP))  # fmt: skip
    return str(text)
