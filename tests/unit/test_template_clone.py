"""Clones of saved blades: the header of a libvirt save image is made anew, QEMU's stream is untouched."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from orchestrator.errors import RacklessError
from orchestrator.hypervisor import domain, template
from tests.unit.test_domain_xml import guest, image

MAGIC = b"LibvirtQemudSave"
HEADER = struct.Struct("<16s5I14I")
STREAM = b"QEVM" + bytes(range(256)) * 500
KIND = template.Kind(image="0123456789abcdef", accelerator="tcg", memory=512 << 20, cpus=1)
COOKIE = "<cookie><cpu mode='custom'/><slirpHelper/></cookie>"


def saved_xml() -> str:
    """What libvirt saves: our XML, with a console of its own making beside the serial port."""
    xml = domain.domain_xml(guest("template-1"), image(), "tcg", "/usr/bin/qemu")
    root = ElementTree.fromstring(xml)
    devices, serial = root.find("devices"), root.find("devices/serial")
    assert devices is not None
    assert serial is not None
    console = ElementTree.SubElement(devices, "console", serial.attrib)
    console.extend(list(serial))
    return ElementTree.tostring(root, encoding="unicode")


def save_image(cookie: str | None, room: int, xml: str | None = None) -> bytes:
    """A save image as libvirt's qemuSaveImageCreate writes it: header, XML, cookie, room for longer ones, stream."""
    text = (saved_xml() if xml is None else xml).encode() + b"\0"
    offset = len(text) if cookie else 0
    data = text + (cookie.encode() + b"\0" if cookie else b"")
    data += b"\0" * room
    return HEADER.pack(MAGIC, 2, len(data), 1, 0, offset, *[0] * 14) + data + STREAM


def take_apart(saved: bytes) -> tuple[ElementTree.Element, str | None, bytes, int]:
    """XML, cookie, stream and length of the data of a save image, read as libvirt's qemuSaveImageOpen does."""
    magic, version, length, was_running, compressed, offset, *unused = HEADER.unpack_from(saved)
    assert (magic, version, was_running, compressed, set(unused)) == (MAGIC, 2, 1, 0, {0})
    data, stream = saved[HEADER.size : HEADER.size + length], saved[HEADER.size + length :]
    xml = data[: offset or length]
    cookie = data[offset:].rstrip(b"\0").decode() if offset else None
    assert xml.endswith(b"\0")
    return ElementTree.fromstring(xml.rstrip(b"\0").decode()), cookie, stream, length


@pytest.mark.parametrize("cookie", [COOKIE, None], ids=["cookie", "no cookie"])
@pytest.mark.parametrize("room", [64 << 10, 1, 0])
def test_a_clone_has_its_own_identity_and_the_same_stream(tmp_path: Path, cookie: str | None, room: int) -> None:
    state, target = tmp_path / "state.save", tmp_path / "clone.save"
    state.write_bytes(save_image(cookie, room))
    mine = guest("a-blade-with-a-long-name", run="/run/rackless/" + "long/" * 40)
    template.clone(state, target, mine)
    root, found_cookie, stream, length = take_apart(target.read_bytes())

    assert stream == STREAM
    assert found_cookie == cookie
    assert root.findtext("name") == mine.name
    assert json.loads(root.findtext(f"metadata/{{{domain.NAMESPACE}}}blade") or "") == mine.metadata
    for kind in ("serial", "console"):
        device = root.find(f"devices/{kind}")
        assert device is not None
        assert device[0].get("path") == str(mine.console_socket)
        assert device[1].get("file") == str(mine.console_log)
    channel = root.find("devices/channel/source")
    assert channel is not None
    assert channel.get("path") == str(mine.agent_socket)
    if room > 1:  # the clone's XML fits: nothing moves
        assert length == take_apart(state.read_bytes())[3]


def test_nothing_else_of_the_domain_changes(tmp_path: Path) -> None:
    state, target = tmp_path / "state.save", tmp_path / "clone.save"
    state.write_bytes(save_image(COOKIE, 4096))
    template.clone(state, target, guest("template-1"))
    before, after = (take_apart(file.read_bytes())[0] for file in (state, target))
    for root in (before, after):
        uuid = root.find("uuid")
        assert uuid is not None
        uuid.text = None
    assert ElementTree.tostring(before) == ElementTree.tostring(after)


def test_clones_have_uuids_of_their_own(tmp_path: Path) -> None:
    state = tmp_path / "state.save"
    state.write_bytes(save_image(COOKIE, 4096))
    uuids = {take_apart(state.read_bytes())[0].findtext("uuid")}
    for number in range(3):
        template.clone(state, tmp_path / "clone", guest(f"mb{number}"))
        uuids.add(take_apart((tmp_path / "clone").read_bytes())[0].findtext("uuid"))
    assert len(uuids) == 4


def test_a_clone_can_be_cloned(tmp_path: Path) -> None:
    state, first, second = tmp_path / "state", tmp_path / "first", tmp_path / "second"
    state.write_bytes(save_image(COOKIE, 0))
    template.clone(state, first, guest("mb0", run="/run/rackless/" + "long/" * 40))
    template.clone(first, second, guest("mb1"))
    root, cookie, stream, _ = take_apart(second.read_bytes())
    assert (root.findtext("name"), cookie, stream) == ("t1.mb1", COOKIE, STREAM)


def test_an_old_longer_clone_does_not_shine_through(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "clone"
    state.write_bytes(save_image(COOKIE, 0))
    target.write_bytes(b"old" * 200_000)
    template.clone(state, target, guest("mb0"))
    assert take_apart(target.read_bytes())[2] == STREAM


@pytest.mark.parametrize(
    "content",
    [
        b"",
        MAGIC,
        b"LibvirtQemudPart" + save_image(COOKIE, 0)[16:],  # a save that was interrupted keeps this magic
        save_image(COOKIE, 0)[:16] + b"\3" + save_image(COOKIE, 0)[17:],
        b"\x7fELF" * 100,
    ],
    ids=["empty", "magic alone", "interrupted", "version 3", "something else"],
)
def test_what_is_no_save_image(tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "state"
    state.write_bytes(content)
    with pytest.raises(RacklessError, match="not a libvirt save image"):
        template.clone(state, tmp_path / "clone", guest())


@pytest.mark.parametrize("missing", ["uuid", "metadata", "devices"])
def test_a_domain_of_another_make(tmp_path: Path, missing: str) -> None:
    root = ElementTree.fromstring(saved_xml())
    part = root.find(missing)
    assert part is not None
    root.remove(part)
    state = tmp_path / "state"
    state.write_bytes(save_image(None, 0, ElementTree.tostring(root, encoding="unicode")))
    with pytest.raises(RacklessError, match="has no"):
        template.clone(state, tmp_path / "clone", guest())


def test_a_template_belongs_to_all_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"qemu": "QEMU emulator version 7.2", "other": "QEMU emulator version 9.0"}
    monkeypatch.setattr(template, "emulator_version", versions.__getitem__)

    kinds = [
        KIND,
        replace(KIND, image="f" * 16),
        replace(KIND, accelerator="kvm"),
        replace(KIND, memory=256 << 20),
        replace(KIND, cpus=2),
    ]
    keys = {template.template_key(kind, "qemu") for kind in kinds} | {template.template_key(KIND, "other")}
    assert len(keys) == 6
    assert template.template_key(replace(KIND), "qemu") in keys


def test_an_emulator_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_text("#!/bin/sh\necho no library >&2; exit 127\n")
    broken.chmod(0o755)
    with pytest.raises(RacklessError, match="does not tell its version: no library"):
        template.emulator_version(str(broken))


def test_a_template_is_kept_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    saved = save_image(COOKIE, 0)
    made = []

    def boot_and_save(file: Path) -> None:
        made.append(file)
        file.write_bytes(saved)

    state = template.obtain(tmp_path, KIND, "k1", boot_and_save)
    assert template.obtain(tmp_path, KIND, "k1", boot_and_save) == state
    assert len(made) == 1
    assert template.kind_of(state.parent) == KIND
    assert template.kind_of(tmp_path) is None
    state.write_bytes(state.read_bytes()[:-1])
    template.obtain(tmp_path, KIND, "k1", boot_and_save)
    assert len(made) == 2
    assert state.read_bytes() == saved


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def boot_and_save(_file: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RacklessError, match=r"cannot keep a template in .*: No space left") as caught:
        template.obtain(tmp_path, KIND, "k1", boot_and_save)
    assert caught.value.hint is not None
