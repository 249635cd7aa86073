"""Persistent memory of a real blade loses what was not persisted when its power fails, and only that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rack.conftest import Bench, Rack

pytestmark = pytest.mark.rack


@pytest.fixture(scope="module")
def rack(bench: Bench) -> Iterator[Rack]:
    """A blade whose persistent memory nobody uses: where Hotpot has been, its mode is refused."""
    blades = {"gm0": {"kind": "manager", "memory": "256 MiB"},
              "mb1": {"kind": "memory", "memory": "256 MiB", "pmem": "128 MiB"}}  # fmt: skip
    with bench.up("d", "pair", blades=blades) as made:
        yield made


def pmem(rack: Rack, command: str, *words: str) -> dict[str, Any]:
    """What a command about mb1 tells."""
    told = rack.bench.rackless("pmem", command, "mb1", *words, "--rack", rack.name, "--json").stdout
    return dict(json.loads(told))


def device(rack: Rack) -> str:
    """What the blade's kernel calls its persistent memory now."""
    return str(pmem(rack, "stat")["mb1"]["device"])


def test_what_was_only_stored_is_gone_and_what_was_persisted_is_there(rack: Rack) -> None:
    found = pmem(rack, "test", "--force")
    assert (found["persisted_stayed"], found["other_stayed"], found["honest"]) == (True, False, True)
    # The same with certainty: were the other line gone for another reason than the crash image, it were so here too.
    found = pmem(rack, "test", "--force", "--survive", "100 %")
    assert (found["persisted_stayed"], found["other_stayed"], found["honest"]) == (True, True, True)


def test_a_file_system_for_programs_that_know_nothing_of_it(rack: Rack) -> None:
    try:
        pmem(rack, "mode", "fsdax")
        mount = "mkdir -p /mnt/pmem && mount -o dax {0} /mnt/pmem"
        rack.on("mb1", f"mkfs.ext4 -q -b 4096 {{0}} && {mount} && echo kept > /mnt/pmem/file".format(device(rack)))
        assert pmem(rack, "persist")["bytes"] > 0
        rack.on("mb1", "echo lost > /mnt/pmem/other && sync")
        rack.bench.rackless("fault", "reset", "mb1", "--rack", rack.name)
        assert ": clean" in rack.on("mb1", f"e2fsck -n {device(rack)} 2>&1")
        files = rack.on("mb1", f"{mount.format(device(rack))} && ls /mnt/pmem && cat /mnt/pmem/file")
        assert files.split() == ["file", "lost+found", "kept"]
    finally:
        rack.on("mb1", "umount /mnt/pmem 2>/dev/null; true")
        pmem(rack, "mode", "devdax")
        pmem(rack, "erase", "--yes")  # or Hotpot takes it for somebody's
