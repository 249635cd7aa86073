"""4 KiB requests per second to files of the storage blade: `/vnode` beside NFS, both from the processor blade.

Random and sequential reads, and writes that each end with fsync; the same program (files.c) on both. Reads begin with
empty page caches on both blades, and of a version of the file that no memory blade has buffers of, and are random over
a file that neither has read ahead.
"""

from __future__ import annotations

from pathlib import Path

from experiments.bed import Bed
from orchestrator.bench import Sample
from orchestrator.errors import RacklessError
from orchestrator.ssh import client

WORK = (("read", "random"), ("read", "sequential"), ("write", "random"), ("write", "sequential"))
FILE_MIB = 16
COUNT = {"read": 400, "write": 60}
_SOURCE = Path(__file__).with_name("files.c")
_PROGRAM = "/root/file_requests"
_SERVED, _MOUNT = "/srv/vnode/bench-nfs", "/mnt/nfs"


def prepare(bed: Bed) -> None:
    """Compile the program on the blade."""
    bed.near.put(str(_SOURCE), "/root/")
    client.run(bed.near, f"gcc -O2 -o {_PROGRAM} /root/{_SOURCE.name}")


def ours(bed: Bed) -> Sample:
    """Requests per second below /vnode."""
    try:
        return _requests(bed, "/vnode", "/srv/vnode")
    finally:
        client.run(bed.near, "rm -f /vnode/requests", check=False)


def nfs(bed: Bed) -> Sample:
    """The same through NFS 4.2 over TCP, from the same disk; or why there is none."""
    try:
        client.run(bed.disk, f"""set -e; mkdir -p {_SERVED}; modprobe nfsd
            mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
            mkdir -p /run/rpc_pipefs /var/lib/nfs/v4recovery; pidof rpcbind > /dev/null || rpcbind -w
            exportfs -i -o rw,sync,no_root_squash,no_subtree_check,fsid=0,insecure '*:{_SERVED}'
            pidof rpc.mountd > /dev/null || rpc.mountd; rpc.nfsd -G 10 -L 10 -N 3 2""")
        client.run(bed.near, f"mkdir -p {_MOUNT}; mount -t nfs4 -o vers=4.2,proto=tcp {bed.disk_address}:/ {_MOUNT}",
                   timeout=60)  # fmt: skip
        try:
            return _requests(bed, _MOUNT, _SERVED)
        finally:
            client.run(bed.near, f"umount -f {_MOUNT}", check=False)
    except RacklessError as error:
        return {f"{what}_{order}": str(error) for what, order in WORK}
    finally:
        client.run(bed.disk, f"rpc.nfsd 0; exportfs -ua; rm -rf {_SERVED}", check=False)


def _requests(bed: Bed, folder: str, served: str) -> Sample:
    result: Sample = {}
    for what, order in WORK:
        for blade in (bed.near, bed.disk):
            client.run(blade, "sync; echo 3 > /proc/sys/vm/drop_caches")
        client.run(bed.disk, f"touch -c {served}/requests")
        command = f"{_PROGRAM} {folder}/requests {FILE_MIB} {what} {order} {COUNT[what]}"
        result[f"{what}_{order}"] = float(client.run(bed.near, command, timeout=300).stdout)
    return result


def summary(files: dict[str, float], peer: dict[str, float]) -> dict[str, object]:
    """Requests per second by kind of work; null where there are none."""
    names = [f"{what}_{order}" for what, order in WORK]
    return {name: {"vnode": files.get(name), "nfs": peer.get(name)} for name in names} if files else {}
