"""/vnode on a processor blade: a storage blade's files, as a FUSE file system over RDMA.

Consistency. Writes go to the storage blade before `write` returns (the kernel's page cache is write-through), so
errors such as ENOSPC reach the writer, a crash of this blade loses nothing that was written, and fsync means that the
storage blade has synced its disk. Reads use the page cache, kept across opens while size and mtime are unchanged.
Several processor blades see each other's changes at open, and otherwise within a second; what is appended (O_APPEND)
goes to the end that the file has at the storage blade, whoever else appends. Locks are this blade's own.

It runs in threads of the agent, which itself must never touch /vnode: it would wait for itself.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from guest_agents.splitkernel.opcodes import Tally, storage_name
from guest_agents.splitkernel.process import attic, fuse
from guest_agents.splitkernel.process.attic import Attic
from guest_agents.splitkernel.process.fuse import Call, Opcode
from guest_agents.splitkernel.process.listings import UNKNOWN_INODE, Listings
from guest_agents.splitkernel.process.nodes import Nodes
from guest_agents.splitkernel.process.patience import Patient
from guest_agents.splitkernel.storage import wire
from guest_agents.splitkernel.storage.wire import Attributes, Op

log = logging.getLogger("rackless.vnode")

WORKERS = 4
"""Threads answering the kernel, as many as an RPC connection has slots."""
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _ATIME_NOW, _MTIME_NOW = (1 << n for n in (0, 1, 2, 3, 4, 5, 7, 8))
_AT_ONCE = 4096
"""Most entries of a directory looked at for one READDIR."""
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE}
T = TypeVar("T")

Answer = Callable[[Call], bytes | None]
"""Returns the reply's body, or None if it has replied, or must not."""


class Vnode:
    """Answers the kernel by asking a storage blade.

    storage -- asks that blade's file service
    client -- whose open files these are: no two mounts of a subtree have the same
    top -- the subtree that is mounted, "" for all of it
    """

    def __init__(self, storage: Patient, client: str, top: str = "") -> None:
        self._storage = storage
        self._top = top
        self._nodes = Nodes(top)
        self._attic = Attic(self._ask, top, client)
        self._listings = Listings()
        self._moving = threading.Lock()
        self._moves = 0
        """Odd while a name that files are reached by moves or goes."""
        self._distrusted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._fd = -1
        self.counts = {"requests": 0, "bytes_in": 0, "bytes_out": 0}
        self.tally = Tally()
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
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._seek,
            Opcode.RELEASE: self._release,
            Opcode.STATFS: self._statfs,
            Opcode.FSYNC: self._fsync,
            Opcode.FSYNCDIR: self._fsync,
            Opcode.OPENDIR: lambda call: fuse.OPEN_OUT.pack(self._listings.open(), 0, 0),
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._releasedir,
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
        threading.Thread(target=self._distrust, name="vnode distrusts", daemon=True).start()
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

    def _distrust(self) -> None:
        while True:
            fuse.distrust(self._fd, self._distrusted.get(), data=True)

    # -- asking the storage blade --

    def _ask(
        self, op: Op, path: str, second: str = "", a: int = 0, b: int = 0, c: int = 0, flags: int = 0,
        identity: int = 0, data: bytes | memoryview = b"",
    ) -> bytes:  # fmt: skip
        request = wire.encode(path, second, a, b, c, flags, identity)
        if op is not Op.WRITE:  # data is counted where its way is chosen (buffers.py)
            self.tally.add(storage_name(op))
        reply = self._storage.call(op, request, data, lambda first, data: bytes(first) + bytes(data), flags)
        return reply or b""

    def _of_file(self, node: int, ask: Callable[[str, int], T]) -> T:
        """`ask` with path and identity of a file, which are checked there; once more if the path has changed
        meanwhile. OSError(ESTALE) if nothing leads to that file any more."""
        before = self._moves
        try:
            return ask(*self._nodes.file(node))
        except (OSError, KeyError) as failure:
            if isinstance(failure, OSError) and failure.errno not in _GONE:
                raise
            if before % 2 or self._moves != before:
                with self._moving:
                    return ask(*self._nodes.file(node))
            if node == fuse.ROOT:
                raise
            raise OSError(errno.ESTALE, "not there any more") from failure

    def _file(
        self, op: Op, node: int, a: int = 0, b: int = 0, flags: int = 0, data: bytes | memoryview = b"",
        second: str = "",
    ) -> bytes:  # fmt: skip
        return self._of_file(
            node,
            lambda path, identity: self._ask(op, path, second, a, b, flags=flags, identity=identity, data=data),
        )

    def _entry(self, parent: int, name: str, found: Attributes) -> bytes:
        number = self._nodes.looked_up(parent, name, found.identity, stat.S_ISDIR(found.mode))
        return fuse.entry(number, self._tell(number, found))

    def _tell(self, node: int, found: Attributes) -> Attributes:
        """What the kernel is told of a file: one that has been removed has one name less than it seems."""
        self._nodes.tell(node, found)
        return found._replace(nlink=found.nlink - 1) if self._nodes.hidden(node) else found

    def _tell_reply(self, node: int, attributes: bytes) -> bytes:
        return fuse.attributes_reply(self._tell(node, wire.unpack_attributes(attributes)))

    # -- names --

    def _path(self, parent: int, name: str) -> str:
        if parent == fuse.ROOT and name == attic.NAME:
            raise OSError(errno.EPERM, "the attic's name")
        return self._nodes.path(parent, name)

    def _lookup(self, call: Call) -> bytes:
        name = _name(call.body)
        if call.node == fuse.ROOT and name == attic.NAME:
            raise OSError(errno.ENOENT, "not for programs")
        before = self._moves
        try:
            found = self._entry_there(call.node, name)
        except (OSError, KeyError):
            if before % 2 == 0 and self._moves == before:
                raise
        else:
            if before % 2 == 0 and self._moves == before:
                return found
        with self._moving:  # a folder above it has moved meanwhile: was that the file that is meant?
            return self._entry_there(call.node, name)

    def _entry_there(self, parent: int, name: str) -> bytes:
        reply = self._ask(Op.GETATTR, self._nodes.path(parent, name))
        return self._entry(parent, name, wire.unpack_attributes(reply))

    def _forget(self, call: Call) -> None:
        self._nodes.forget(call.node, struct.unpack_from("<Q", call.body)[0])

    def _batch_forget(self, call: Call) -> None:
        for number, count in struct.iter_unpack("<QQ", call.body[8 : 8 + 16 * struct.unpack_from("<I", call.body)[0]]):
            self._nodes.forget(number, count)

    def _readlink(self, call: Call) -> bytes:
        return self._file(Op.READLINK, call.node)

    def _made(self, call: Call, op: Op, name: str, second: str = "", mode: int = 0) -> bytes:
        with self._moving:
            made = self._ask(op, self._path(call.node, name), second, mode, call.uid, call.gid)
            return self._entry(call.node, name, wire.unpack_attributes(made))

    def _symlink(self, call: Call) -> bytes:
        name, target = _names(call.body)
        return self._made(call, Op.SYMLINK, name, target)

    def _mkdir(self, call: Call) -> bytes:
        mode, umask = struct.unpack_from("<II", call.body)
        return self._made(call, Op.MKDIR, _name(call.body[8:]), "", mode & ~umask)

    def _mknod(self, call: Call) -> bytes:
        mode, _, umask = struct.unpack_from("<III", call.body)
        return self._made(call, Op.CREATE, _name(call.body[16:]), "", mode & ~umask)

    def _link(self, call: Call) -> bytes:
        (old,), name = struct.unpack_from("<Q", call.body), _name(call.body[8:])
        with self._moving:
            linked = self._file(Op.LINK, old, second=self._path(call.node, name))
            return self._entry(call.node, name, wire.unpack_attributes(linked))

    def _unlink(self, call: Call) -> bytes:
        name = _name(call.body)
        with self._moving, self._names_change():
            path, node = self._path(call.node, name), self._nodes.find(call.node, name)
            if node is not None and node.opens and len(node.names) == 1:
                self._nodes.hide(node, self._attic.move(path))
            else:
                self._ask(Op.UNLINK, path)
                self._nodes.removed(call.node, name)
        return b""

    def _rmdir(self, call: Call) -> bytes:
        name = _name(call.body)
        with self._moving:
            self._ask(Op.RMDIR, self._path(call.node, name))
            self._nodes.removed(call.node, name)
        return b""

    def _rename(self, call: Call, start: int) -> bytes:
        (target,) = struct.unpack_from("<Q", call.body)
        flags = struct.unpack_from("<I", call.body, 8)[0] if start == 16 else 0
        old, new = _names(call.body[start:])
        with self._moving, self._names_change():
            path, new_path = self._path(call.node, old), self._path(target, new)
            over, saved = self._nodes.find(target, new), None
            if over is not None and over.opens and len(over.names) == 1 and not flags and path != new_path:
                saved = self._attic.link(new_path, over.identity)
            try:
                self._ask(Op.RENAME, path, new_path, flags=flags)
            except OSError:
                if saved is not None:
                    self._attic.remove(saved)
                raise
            if flags & wire.RENAME_EXCHANGE:
                self._nodes.exchanged(call.node, old, target, new)
            else:
                self._nodes.moved(call.node, old, target, new)
                if over is not None and saved is not None:
                    self._nodes.hide(over, saved)
        return b""

    @contextmanager
    def _names_change(self) -> Iterator[None]:
        self._moves += 1
        try:
            yield
        finally:
            self._moves += 1

    # -- attributes --

    def _getattr(self, call: Call) -> bytes:
        try:
            return self._tell_reply(call.node, self._file(Op.GETATTR, call.node))
        except OSError as failure:
            last = self._nodes.last(call.node) if failure.errno == errno.ESTALE else None
            if last is None:
                raise
            # Somebody's working directory, or a FIFO that is open, which we are not told: it can still be looked at.
            return fuse.attributes_reply(last._replace(nlink=0))

    def _setattr(self, call: Call) -> bytes:
        valid, _, _, size, _, at, mt, _, atn, mtn, _, mode, _, uid, gid, _ = fuse.SETATTR_IN.unpack_from(call.body)
        found = b""
        if valid & (_UID | _GID):
            keep = 0xFFFFFFFF
            found = self._file(Op.CHOWN, call.node, uid if valid & _UID else keep, gid if valid & _GID else keep)
        if valid & _MODE:
            found = self._file(Op.CHMOD, call.node, stat.S_IMODE(mode))
        if valid & _SIZE:
            found = self._file(Op.TRUNCATE, call.node, size)
        if valid & (_ATIME | _MTIME):
            pairs = ((_ATIME, wire.SET_ATIME), (_MTIME, wire.SET_MTIME), (_ATIME_NOW, wire.SET_ATIME_NOW),
                     (_MTIME_NOW, wire.SET_MTIME_NOW))  # fmt: skip
            flags = sum(flag for bit, flag in pairs if valid & bit)
            found = self._file(Op.UTIMENS, call.node, at * 10**9 + atn, mt * 10**9 + mtn, flags)
        return self._tell_reply(call.node, found or self._file(Op.GETATTR, call.node))

    def _statfs(self, call: Call) -> bytes:
        del call
        size, blocks, free, available, files, free_files, longest = wire.STATFS.unpack(self._ask(Op.STATFS, ""))
        return fuse.STATFS_OUT.pack(blocks, free, available, files, free_files, size, longest, size, 0)

    # -- files --

    def _open(self, call: Call) -> bytes:
        (flags,) = struct.unpack_from("<I", call.body)
        self._nodes.opened(call.node)  # before asking: who removes it meanwhile must know
        try:
            found = wire.unpack_attributes(self._file(Op.OPEN, call.node, flags=flags & os.O_TRUNC))
        except BaseException:
            self._close(call.node)
            raise
        self._nodes.know(call.node, wire.version_of(found))
        told = self._nodes.told(call.node)
        if told is None or (told.size, told.mtime) != (found.size, found.mtime):  # changed elsewhere: close-to-open
            fuse.distrust(self._fd, call.node, data=False)
        return _opened(flags)

    def _create(self, call: Call) -> bytes:
        flags, mode, umask, _ = struct.unpack_from("<IIII", call.body)
        try:
            made = self._made(call, Op.CREATE, _name(call.body[16:]), "", stat.S_IFREG | stat.S_IMODE(mode & ~umask))
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            # Another blade was first. On ESTALE the kernel looks again, and then checks whether this user may open it.
            raise OSError(errno.ESTALE, "made elsewhere") from None
        (number,) = struct.unpack_from("<Q", made)
        self._nodes.opened(number)
        return made + _opened(flags)

    def _release(self, call: Call) -> bytes:
        self._close(call.node)
        return b""

    def _close(self, node: int) -> None:
        removed = self._nodes.closed(node)
        if removed is not None:
            self._attic.remove(removed)

    def _read(self, call: Call) -> None:
        _, offset, size, _, _, flags, _ = fuse.READ_IN.unpack_from(call.body)
        known = b"" if flags & (os.O_APPEND | os.O_DIRECT) else self._version(call.node)

        def deliver(first: memoryview, data: memoryview) -> None:
            self.counts["bytes_in"] += len(data)
            fuse.reply(self._fd, call.unique, data)  # straight from the registered buffer
            if first:
                self._nodes.know(call.node, wire.unpack_version(first))

        def ask(path: str, identity: int) -> None:
            request = wire.encode(path, a=offset, b=size, identity=identity)
            self._storage.call(Op.READ, request, known, into=deliver)

        self._of_file(call.node, ask)

    def _version(self, node: int) -> bytes:
        """The version of a file's contents: as heard within a second, or as the storage blade says now.

        The kernel asks for attributes as often when it reads, but not for pages of mapped files.
        """
        version = self._nodes.version(node)
        if version is None:
            version = wire.version_of(wire.unpack_attributes(self._file(Op.GETATTR, node)))
            self._nodes.know(node, version)
        return version.pack()

    def _write(self, call: Call) -> None:
        _, offset, size, how, _, flags, _ = fuse.WRITE_IN.unpack_from(call.body)
        data = call.body[fuse.WRITE_IN.size : fuse.WRITE_IN.size + size]
        how_there = 0
        if not how & fuse.WRITE_CACHE:
            how_there = flags & os.O_APPEND | (wire.DROP_SUID if call.uid else 0)
        reply = self._file(Op.WRITE, call.node, offset, flags=how_there, data=data)
        done, at, dropped = wire.WRITTEN.unpack_from(reply)
        self._nodes.know(call.node, wire.unpack_version(reply, wire.WRITTEN.size + wire.VERSION_BYTES))
        self.counts["bytes_out"] += done
        if dropped:  # the kernel does not do that itself for what bypasses its page cache
            fuse.distrust(self._fd, call.node, data=False)
        fuse.reply(self._fd, call.unique, fuse.WRITE_OUT.pack(done, 0))
        if at != offset:  # others have appended: the kernel has size and perhaps data in the wrong place
            self._distrusted.put(call.node)

    def _fallocate(self, call: Call) -> bytes:
        _, offset, length, mode, _ = fuse.FALLOCATE_IN.unpack_from(call.body)
        self._file(Op.FALLOCATE, call.node, offset, length, mode)
        return b""

    def _seek(self, call: Call) -> bytes:
        _, offset, whence, _ = fuse.LSEEK_IN.unpack_from(call.body)
        return self._file(Op.SEEK, call.node, offset, flags=whence)

    def _fsync(self, call: Call) -> bytes:
        _, flags, _ = struct.unpack_from("<QII", call.body)
        return self._file(Op.FSYNC, call.node, flags=flags & 1)

    # -- directories --

    def _listing(self, call: Call) -> list[tuple[int, bytes, bytes]]:
        """What comes next in an open directory: type, name, and the entry for the kernel."""
        handle, offset, *_ = fuse.READ_IN.unpack_from(call.body)
        entries = self._listings.entries(handle, offset, lambda after: self._file(Op.READDIR, call.node, second=after))
        secret = attic.NAME.encode() if call.node == fuse.ROOT else b""
        return [
            (ino, name, fuse.directory_entry(ino, number, kind, name))
            for number, (ino, kind, name) in enumerate(entries[offset : offset + _AT_ONCE], offset + 1)
            if name != secret
        ]

    def _readdir(self, call: Call) -> bytes:
        size = fuse.READ_IN.unpack_from(call.body)[2]
        return b"".join(_fitting([packed for *_, packed in self._listing(call)], size))

    def _readdirplus(self, call: Call) -> bytes:
        """As READDIR, and each file with the attributes it has now: a LOOKUP less for each."""
        size = fuse.READ_IN.unpack_from(call.body)[2]
        coming = self._listing(call)
        coming = coming[: len(_fitting([fuse.NO_ENTRY + packed for *_, packed in coming], size))]
        real = [name for ino, name, _ in coming if ino != UNKNOWN_INODE]
        found = self._file(Op.LOOK, call.node, data=b"".join(name + b"\0" for name in real))
        packed = b""
        places = iter(range(0, len(found), wire.ATTRIBUTES_BYTES))
        for ino, name, entry in coming:
            known = fuse.NO_ENTRY
            if ino != UNKNOWN_INODE:
                attributes = wire.unpack_attributes(found, next(places))
                if attributes.mode:
                    known = self._entry(call.node, os.fsdecode(name), attributes)
            packed += known + entry
        return packed

    def _releasedir(self, call: Call) -> bytes:
        self._listings.close(struct.unpack_from("<Q", call.body)[0])
        return b""


def _fitting(entries: list[bytes], size: int) -> list[bytes]:
    fitting = []
    for entry in entries:
        size -= len(entry)
        if size < 0:
            break
        fitting.append(entry)
    return fitting


def _opened(flags: int) -> bytes:
    """Files to append to bypass the page cache: the kernel would put there what it appends at the wrong place."""
    return fuse.OPEN_OUT.pack(0, fuse.KEEP_CACHE | (fuse.DIRECT_IO if flags & os.O_APPEND else 0), 0)


def _name(body: memoryview) -> str:
    return os.fsdecode(bytes(body).split(b"\0", 1)[0])


def _names(body: memoryview) -> tuple[str, str]:
    first, second, *_ = bytes(body).split(b"\0")
    return os.fsdecode(first), os.fsdecode(second)
