"""The two persistent-memory devices of a blade, as its kernel has them: which is which, and what vol is used as.

The host plugs in two of the same size. The kernel finds them in any order and gives them any numbers, so they are told
apart by their addresses, which the host knows. *media* is taken from all drivers, and mapped by its address alone.
*vol* is in one of the kernel's modes (Documentation/driver-api/nvdimm): devdax, which programs map and register for
RDMA; or fsdax, a block device for file systems. A mode is written to the first 2 MiB of the device itself.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from guest_agents import pmem
from guest_agents.control import ControlError, Handler, Message
from guest_agents.pmem import LINE, Device, Places, PmemError

MODES = ("devdax", "fsdax")
_DEVICES = Path("/sys/bus/nd/devices")
_DRIVER = Path("/sys/bus/nd/drivers/nd_region")
_DAX = Path("/sys/bus/dax/devices")
_PHYSICAL = "/dev/mem"
_HEAD = 2 << 20  # what the kernel keeps at the beginning for the mode, at most
_SUPERBLOCKS = 8 << 10  # where in it all known ones are
_NAMES = {"dax": "devdax", "memory": "fsdax"}
_PLUG_SECONDS = 60.0
_POLL_SECONDS = 0.02
_COPY = 1 << 20


def setup(config: dict[str, int], file: Path = pmem.FILE) -> Places:
    """Find the devices, make a new one devdax, and write down in `file` where they are. Safe to repeat.

    config -- size, and the physical addresses `vol` and `media`
    TimeoutError when one does not appear. One that holds something else than a mode is left alone (mode raw): racks of
    before had a single device without any.
    """
    deadline = time.monotonic() + _PLUG_SECONDS
    vol = _wait(lambda: _region(config["vol"]), "persistent memory (vol)", deadline)
    media = _wait(lambda: _region(config["media"]), "persistent memory (media)", deadline)
    _bind(media, False)
    subprocess.run(["modprobe", "dax_pmem"], check=True)  # the driver of devdax; nobody loads it by himself
    (vol.parent / "wait_probe").read_text()
    _wait(lambda: next(vol.glob("namespace*/mode"), None), "its namespace", deadline)
    if _mode(vol) == "raw" and not any(_physical(config["media"], _SUPERBLOCKS)):
        _change_mode(vol, config, "devdax")
    places = _places(vol, config, deadline)
    places.save(file)
    return places


def handlers(
    config: dict[str, int] | None, hotpot: Callable[[], str], file: Path = pmem.FILE
) -> dict[str, Handler]:
    """What the host may ask of a blade's persistent memory; see control.py.

    hotpot -- tells what Hotpot has its media on
    """

    def need(_request: Message) -> dict[str, int]:
        if config is None:
            raise ControlError("this blade has no persistent memory", "give it `pmem` in the rack file")
        return config

    def stat(_request: Message) -> Message:
        if config is None:
            return {}
        places = Places.load(file)
        return {"size": config["size"], "usable": places.size, "mode": places.mode, "device": places.vol,
                "in_use": pmem.in_use(file), "hotpot": hotpot()}  # fmt: skip

    def mode(request: Message) -> Message:
        if request["mode"] not in MODES:
            raise ControlError(f"there is no mode {request['mode']}", f"there are {' and '.join(MODES)}")
        mine, vol = need(request), _region(need(request)["vol"])
        assert vol is not None
        if _mode(vol) == "raw" and not request.get("force"):
            raise ControlError("it holds something that would be damaged", "save it, then --force")
        with pmem.lock(file):
            if _mode(vol) != request["mode"]:
                _change_mode(vol, mine, request["mode"])
            _places(vol, mine, time.monotonic() + _PLUG_SECONDS).save(file)
        return stat(request)

    def persist(request: Message) -> Message:
        need(request)
        with pmem.lock(file):  # else a page read before a program's persist could be written after it
            return {"bytes": persist_all(Places.load(file))}

    def erase(request: Message) -> Message:
        need(request)
        with Device(file) as device:
            for start in range(0, device.size, _COPY):
                length = min(_COPY, device.size - start)
                device.memory[start : start + length] = bytes(length)
                device.persist(start, length)
        return {}

    def mark(request: Message) -> Message:
        """Two lines in the scratch page, of which only the first is persisted."""
        need(request)
        with Device(file, exclusive=False) as device:
            device.scratch[: 2 * LINE] = bytes(2 * LINE)
            device.persist(device.size, 2 * LINE)
            for number in range(2):
                device.scratch[number * LINE : (number + 1) * LINE] = bytes.fromhex(request["line"])
            device.persist(device.size, LINE)
        return {}

    def look(request: Message) -> Message:
        """The same lines."""
        need(request)
        with Device(file, exclusive=False) as device:
            return {"lines": [bytes(device.scratch[n * LINE : (n + 1) * LINE]).hex() for n in range(2)]}

    found = {"pmem.stat": stat, "pmem.mode": mode, "pmem.persist": persist, "pmem.erase": erase,
             "pmem.mark": mark, "pmem.look": look}  # fmt: skip
    return {op: _answering(handler) for op, handler in found.items()}


def persist_all(places: Places) -> int:
    """Make the whole device durable, whatever its mode; bytes that were not. A file system stands still meanwhile.

    For programs that know nothing of `persist`. Not atomic: power that fails in the middle leaves some of it.
    """
    changed = 0
    with (
        _frozen(places.vol),
        _mapped(places.media, places.media_offset, places.size) as media,
        _reader(places) as read,
    ):
        for start in range(0, places.size, _COPY):
            now = read(start, min(_COPY, places.size - start))
            if now == media[start : start + len(now)]:
                continue
            for at in range(0, len(now), mmap.PAGESIZE):
                page = now[at : at + mmap.PAGESIZE]
                if page != media[start + at : start + at + len(page)]:
                    media[start + at : start + at + len(page)] = page
                    changed += len(page)
    return changed


@contextmanager
def _reader(places: Places) -> Iterator[Callable[[int, int], bytes]]:
    """What reads vol: from a place, so many bytes."""
    if places.mode == "devdax":
        with _mapped(places.vol, places.vol_offset, places.size) as vol:
            yield lambda start, length: vol[start : start + length]
        return
    device = os.open(places.vol, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)  # not what the cache has of it
    buffer = mmap.mmap(-1, _COPY)  # aligned, as that demands

    def read(start: int, length: int) -> bytes:
        if os.preadv(device, [memoryview(buffer)[:length]], start) != length:
            raise PmemError(f"{places.vol} ends at {start}")
        return buffer[:length]

    try:
        yield read
    finally:
        os.close(device)


def _answering(handler: Handler) -> Handler:
    def answer(request: Message) -> Message:
        try:
            return handler(request)
        except PmemError as failure:
            raise ControlError(failure.message, failure.hint) from None

    return answer


def _region(address: int) -> Path | None:
    """The kernel's device at a physical address."""
    for region in _DEVICES.glob("region*"):
        if int((region / "resource").read_text(), 16) == address:
            return region.resolve()
    return None


def _bind(region: Path, bound: bool) -> None:
    """Give a region to its driver, or take it away: then there are no devices for programs in it."""
    if (region / "driver").exists() != bound:
        (_DRIVER / ("bind" if bound else "unbind")).write_text(region.name)


def _mode(region: Path) -> str:
    """devdax, fsdax, or raw."""
    text = next(region.glob("namespace*/mode")).read_text().strip()
    return _NAMES.get(text, text)


def _change_mode(vol: Path, config: dict[str, int], mode: str) -> None:
    """Another mode; what is stored stays. It is durable at once."""
    namespace = next(vol.glob("namespace*/mode")).parent.name
    done = subprocess.run(["ndctl", "create-namespace", "-f", "-e", namespace, "-m", mode, "-M", "mem", "-a", "4096"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise PmemError(f"ndctl cannot make it {mode}: {lines[-1].strip()}", "is a file system on it mounted?")
    _bind(vol, False)  # else its driver keeps the head from others
    try:
        head = _physical(config["vol"], _HEAD)
        with _mapped(_PHYSICAL, config["media"], _HEAD) as media:
            media[:] = head
    finally:
        _bind(vol, True)
        (vol.parent / "wait_probe").read_text()


def _places(vol: Path, config: dict[str, int], deadline: float) -> Places:
    mode = _mode(vol)
    if mode == "devdax":
        device = _wait(lambda: _dax(config), "the devdax device", deadline)
        resource, size = int((device / "resource").read_text(), 16), int((device / "size").read_text())
        path = _dev(device.name)
    else:
        block = _wait(lambda: next(vol.glob("*/block/pmem*"), None), "the pmem device", deadline)
        holder = block.parent.parent
        resource, size = int((holder / "resource").read_text(), 16), int((block / "size").read_text()) * 512
        path = _dev(block.name)
    head = resource - config["vol"]
    _wait(lambda: path if path.exists() else None, str(path), deadline)
    return Places(mode, size, str(path), 0, _PHYSICAL, config["media"] + head)


def _dev(name: str) -> Path:
    return Path("/dev") / name


def _dax(config: dict[str, int]) -> Path | None:
    for device in _DAX.glob("dax*"):
        if 0 <= int((device / "resource").read_text(), 16) - config["vol"] < config["size"]:
            return device
    return None


def _physical(address: int, length: int) -> bytes:
    """What is at a physical address. Only for regions that no driver has."""
    with _mapped(_PHYSICAL, address, length) as mapped:
        return mapped[:]


@contextmanager
def _mapped(path: str, offset: int, size: int) -> Iterator[mmap.mmap]:
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapped = mmap.mmap(opened, size, offset=offset)
    finally:
        os.close(opened)
    with mapped:
        yield mapped


@contextmanager
def _frozen(device: str) -> Iterator[None]:
    """No file system on a device changes it during the block."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[0] == device]
    for mount in mounts[:1]:
        subprocess.run(["fsfreeze", "--freeze", mount], check=True)
    try:
        yield
    finally:
        for mount in mounts[:1]:
            subprocess.run(["fsfreeze", "--unfreeze", mount], check=True)


def _wait(find: Callable[[], Path | None], what: str, deadline: float) -> Path:
    while (found := find()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not appear")
        time.sleep(_POLL_SECONDS)
    return found
