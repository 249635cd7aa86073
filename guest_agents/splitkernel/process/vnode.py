"""/vnode on a processor blade: the storage blades' files, as a FUSE file system over RDMA.

Consistency. Writes go to the storage blade before `write` returns (the kernel's page cache is write-through), so
errors such as ENOSPC reach the writer, a crash of this blade loses nothing that was written, and fsync means that the
storage blade has synced its disk. Reads use the page cache, kept across opens while size and mtime are unchanged.
Several processor blades see each other's changes at open, and otherwise within a second; locks are this blade's own.

All files are on the first storage blade for now; spreading them is a later issue.

It runs in threads of the agent, which itself must never touch /vnode: it would wait for itself.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from guest_agents.splitkernel.process import fuse
from guest_agents.splitkernel.process.fuse import Call, Opcode
from guest_agents.splitkernel.process.nodes import Nodes
from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.wire import Attributes, Op
from guest_agents.verbs.rpc import Client

log = logging.getLogger("rackless.vnode")

WORKERS = 3
"""Threads answering the kernel: while one waits for the network another fills or empties a buffer."""
HIDDEN = ".removed-while-open."
RENAME_EXCHANGE = 2
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _ATIME_NOW, _MTIME_NOW = (1 << n for n in (0, 1, 2, 3, 4, 5, 7, 8))

Answer = Callable[[Call], bytes | None]
"""Returns the reply's body, or None if it has replied, or must not."""


class Vnode:
    """Answers the kernel by asking the storage blade."""

    def __init__(self, storage: Client) -> None:
        self._storage = storage
        self._nodes = Nodes()
        self._fd = -1
        self.counts = {"requests": 0, "bytes_in": 0, "bytes_out": 0}
        answers: dict[Opcode, Answer] = {
            Opcode.INIT: lambda call: fuse.init_reply(call.body),
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: lambda call: self._rename(call, 8),
            Opcode.RENAME2: lambda call: self._rename(call, 16),
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.RELEASE: self._release,
            Opcode.STATFS: self._statfs,
            Opcode.FSYNC: self._fsync,
            Opcode.FSYNCDIR: self._fsync,
            Opcode.OPENDIR: lambda call: fuse.OPEN_OUT.pack(0, 0, 0),
            Opcode.READDIR: self._readdir,
            Opcode.RELEASEDIR: lambda call: b"",
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.INTERRUPT: lambda call: None,
            Opcode.DESTROY: lambda call: b"",
        }
        self._answers = {int(opcode): answer for opcode, answer in answers.items()}

    def serve(self, where: Path) -> None:
        """Mount at `where` and answer until it is unmounted."""
        self._fd = fuse.mount(where)
        threads = [threading.Thread(target=self._work, name=f"vnode {n}") for n in range(WORKERS)]
        for thread in threads:
            thread.start()
        fuse.set_read_ahead(where)
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        buffer = bytearray(fuse.MAX_DATA + (64 << 10))
        while (call := fuse.receive(self._fd, buffer)) is not None:
            self.counts["requests"] += 1
            answer = self._answers.get(call.opcode)
            try:
                if answer is None:
                    raise OSError(errno.ENOSYS, "")
                body = answer(call)
                if body is not None:
                    fuse.reply(self._fd, call.unique, body)
            except OSError as failure:
                fuse.reply_error(self._fd, call.unique, failure.errno or errno.EIO)
            except KeyError:
                fuse.reply_error(self._fd, call.unique, errno.ESTALE)
            except Exception:
                log.exception("request %d failed", call.opcode)
                fuse.reply_error(self._fd, call.unique, errno.EIO)

    # -- asking the storage blade --

    def _ask(self, op: Op, path: str, second: str = "", a: int = 0, b: int = 0, c: int = 0, flags: int = 0) -> bytes:
        request = wire.encode(path, second, a, b, c, flags)
        return bytes(self._storage.call(op, request, into=lambda first, data: bytes(first) + bytes(data)))

    def _attributes(
        self, op: Op, path: str, second: str = "", a: int = 0, b: int = 0, c: int = 0, flags: int = 0
    ) -> Attributes:
        return wire.unpack_attributes(self._ask(op, path, second, a, b, c, flags))

    def _entry(self, parent: int, name: str, found: Attributes) -> bytes:
        return fuse.entry(self._nodes.looked_up(parent, name), found)

    # -- names --

    def _lookup(self, call: Call) -> bytes:
        name = _name(call.body)
        return self._entry(call.node, name, self._attributes(Op.GETATTR, self._nodes.path(call.node, name)))

    def _forget(self, call: Call) -> None:
        self._nodes.forget(call.node, struct.unpack_from("<Q", call.body)[0])

    def _batch_forget(self, call: Call) -> None:
        for number, count in struct.iter_unpack("<QQ", call.body[8 : 8 + 16 * struct.unpack_from("<I", call.body)[0]]):
            self._nodes.forget(number, count)

    def _readlink(self, call: Call) -> bytes:
        return self._ask(Op.READLINK, self._nodes.path(call.node))

    def _symlink(self, call: Call) -> bytes:
        name, target = _names(call.body)
        path = self._nodes.path(call.node, name)
        return self._entry(call.node, name, self._attributes(Op.SYMLINK, path, target, 0, call.uid, call.gid))

    def _link(self, call: Call) -> bytes:
        (old,), name = struct.unpack_from("<Q", call.body), _name(call.body[8:])
        new = self._nodes.path(call.node, name)
        return self._entry(call.node, name, self._attributes(Op.LINK, self._nodes.path(old), new))

    def _mkdir(self, call: Call) -> bytes:
        mode, umask = struct.unpack_from("<II", call.body)
        name = _name(call.body[8:])
        path = self._nodes.path(call.node, name)
        found = self._attributes(Op.MKDIR, path, "", mode & ~umask, call.uid, call.gid)
        return self._entry(call.node, name, found)

    def _mknod(self, call: Call) -> bytes:
        mode, _, umask = struct.unpack_from("<III", call.body)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EPERM, "only regular files")
        return self._make(call, _name(call.body[16:]), mode & ~umask, os.O_EXCL)

    def _make(self, call: Call, name: str, mode: int, flags: int) -> bytes:
        path = self._nodes.path(call.node, name)
        found = self._attributes(Op.CREATE, path, "", mode & 0o7777, call.uid, call.gid, flags=flags)
        return self._entry(call.node, name, found)

    def _unlink(self, call: Call) -> bytes:
        name = _name(call.body)
        self._remove(call.node, name, lambda path: self._ask(Op.UNLINK, path))
        self._nodes.removed(call.node, name)
        return b""

    def _remove(self, parent: int, name: str, remove: Callable[[str], object]) -> None:
        """Remove a file; if it is open here, give it a name that goes away with the last close, as POSIX wants."""
        node = self._nodes.find(parent, name)
        path = self._nodes.path(parent, name)
        if node is None or not node.opens or node.hidden:
            remove(path)
            return
        hidden = f"{HIDDEN}{secrets.token_hex(8)}"
        self._ask(Op.RENAME, path, self._nodes.path(parent, hidden))
        self._nodes.moved(parent, name, parent, hidden)
        node.hidden = True

    def _rmdir(self, call: Call) -> bytes:
        name = _name(call.body)
        self._ask(Op.RMDIR, self._nodes.path(call.node, name))
        self._nodes.removed(call.node, name)
        return b""

    def _rename(self, call: Call, start: int) -> bytes:
        (target,) = struct.unpack_from("<Q", call.body)
        flags = struct.unpack_from("<I", call.body, 8)[0] if start == 16 else 0
        old, new = _names(call.body[start:])
        path, new_path = self._nodes.path(call.node, old), self._nodes.path(target, new)
        over = self._nodes.find(target, new)
        if over is not None and over.opens and not flags and path != new_path:
            self._remove(target, new, lambda path: None)
        self._ask(Op.RENAME, path, new_path, flags=flags)
        if flags & RENAME_EXCHANGE:
            self._nodes.exchanged(call.node, old, target, new)
        else:
            self._nodes.moved(call.node, old, target, new)
        return b""

    # -- attributes --

    def _getattr(self, call: Call) -> bytes:
        return fuse.attributes_reply(self._attributes(Op.GETATTR, self._nodes.path(call.node)))

    def _setattr(self, call: Call) -> bytes:
        valid, _, _, size, _, at, mt, _, atn, mtn, _, mode, _, uid, gid, _ = fuse.SETATTR_IN.unpack_from(call.body)
        path = self._nodes.path(call.node)
        found = None
        if valid & (_UID | _GID):
            keep = 0xFFFFFFFF
            found = self._attributes(
                Op.CHOWN, path, "", uid if valid & _UID else keep, gid if valid & _GID else keep
            )
        if valid & _MODE:
            found = self._attributes(Op.CHMOD, path, "", mode & 0o7777)
        if valid & _SIZE:
            found = self._attributes(Op.TRUNCATE, path, "", size)
        if valid & (_ATIME | _MTIME):
            now = self._attributes(Op.GETATTR, path)
            wall = time.time_ns()
            atime = wall if valid & _ATIME_NOW else at * 10**9 + atn if valid & _ATIME else now.atime
            mtime = wall if valid & _MTIME_NOW else mt * 10**9 + mtn if valid & _MTIME else now.mtime
            found = self._attributes(Op.UTIMENS, path, "", atime, mtime)
        return fuse.attributes_reply(found or self._attributes(Op.GETATTR, path))

    def _statfs(self, call: Call) -> bytes:
        size, blocks, free, available, files, free_files, longest = wire.STATFS.unpack(self._ask(Op.STATFS, ""))
        return fuse.STATFS_OUT.pack(blocks, free, available, files, free_files, size, longest, size, 0)

    # -- files --

    def _open(self, call: Call) -> bytes:
        (flags,) = struct.unpack_from("<I", call.body)
        if flags & os.O_TRUNC:
            self._ask(Op.OPEN, self._nodes.path(call.node), flags=os.O_TRUNC)
        self._nodes.opened(call.node)
        return fuse.OPEN_OUT.pack(0, fuse.KEEP_CACHE, 0)

    def _create(self, call: Call) -> bytes:
        flags, mode, umask, _ = struct.unpack_from("<IIII", call.body)
        name = _name(call.body[16:])
        made = self._make(call, name, mode & ~umask, flags & os.O_EXCL)
        (number,) = struct.unpack_from("<Q", made)
        if flags & os.O_TRUNC:
            self._ask(Op.OPEN, self._nodes.path(number), flags=os.O_TRUNC)
        self._nodes.opened(number)
        return made + fuse.OPEN_OUT.pack(0, fuse.KEEP_CACHE, 0)

    def _release(self, call: Call) -> bytes:
        removed = self._nodes.closed(call.node)
        if removed is not None:
            self._ask(Op.UNLINK, removed)
        return b""

    def _read(self, call: Call) -> None:
        _, offset, size, *_ = fuse.READ_IN.unpack_from(call.body)
        request = wire.encode(self._nodes.path(call.node), a=offset, b=size)

        def deliver(first: memoryview, data: memoryview) -> None:
            self.counts["bytes_in"] += len(data)
            fuse.reply(self._fd, call.unique, data)  # straight from the registered buffer

        self._storage.call(Op.READ, request, into=deliver)

    def _write(self, call: Call) -> bytes:
        _, offset, size, *_ = fuse.WRITE_IN.unpack_from(call.body)
        data = call.body[fuse.WRITE_IN.size : fuse.WRITE_IN.size + size]
        request = wire.encode(self._nodes.path(call.node), a=offset)
        reply = self._storage.call(Op.WRITE, request, data, into=lambda first, _: bytes(first))
        (done,) = wire.COUNT.unpack(reply)
        self.counts["bytes_out"] += done
        return fuse.WRITE_OUT.pack(done, 0)

    def _fsync(self, call: Call) -> bytes:
        _, flags, _ = struct.unpack_from("<QII", call.body)
        self._ask(Op.FSYNC, self._nodes.path(call.node), flags=flags & 1)
        return b""

    def _readdir(self, call: Call) -> bytes:
        _, offset, size, *_ = fuse.READ_IN.unpack_from(call.body)
        reply = self._ask(Op.READDIR, self._nodes.path(call.node), a=offset)
        packed = b""
        for number, (ino, kind, name) in enumerate(wire.unpack_entries(reply), offset + 1):
            one = fuse.directory_entry(ino, number, kind, name)
            if len(packed) + len(one) > size:
                break
            packed += b"" if name.startswith(HIDDEN.encode()) else one
        return packed


def _name(body: memoryview) -> str:
    return os.fsdecode(bytes(body).split(b"\0", 1)[0])


def _names(body: memoryview) -> tuple[str, str]:
    first, second, *_ = bytes(body).split(b"\0")
    return os.fsdecode(first), os.fsdecode(second)


