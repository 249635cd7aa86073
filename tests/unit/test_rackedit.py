"""Edits of rack files: what was asked is changed, and no other character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import rackedit, yamltext
from orchestrator.errors import RacklessError
from orchestrator.model import Rack
from tests.unit.rack_strategies import racks

DEFAULT = (Path(__file__).parents[2] / "racks/default.yml").read_text()
BLOCK = """\
# a rack
name: demo   # its name
blades:
  gm0:
    kind: manager
    memory: 256 MiB  # small
  # the only one
  mb0:
    kind: memory
    memory: 512 MiB

links:
# nothing yet
"""


def changed_lines(before: str, after: str) -> list[str]:
    diff = rackedit.diff(before, after, "x").splitlines()
    return [line for line in diff if line[0] in "+-" and line[:3] not in ("+++", "---")]


def test_a_blade_is_a_line_below_the_last() -> None:
    after = rackedit.put(DEFAULT, ("blades", "mb2"), {"kind": "memory", "cpus": 1, "memory": "512 MiB"})
    assert changed_lines(DEFAULT, after) == ["+  mb2: {kind: memory, cpus: 1, memory: 512 MiB}"]
    assert rackedit.drop(after, ("blades", "mb2")) == DEFAULT


def test_one_value_is_replaced_where_it_stands() -> None:
    after = rackedit.put(DEFAULT, ("blades", "mb0", "cpu_quota"), "20 %")
    assert after == DEFAULT.replace("cpu_quota: 50 %", "cpu_quota: 20 %")
    after = rackedit.put(DEFAULT, ("blades", "sb0", "disk", "iops"), 10)
    assert after == DEFAULT.replace("iops: 2000", "iops: 10")
    assert rackedit.put(DEFAULT, ("blades", "sb0", "disk", "iops"), 2000) == DEFAULT


def test_in_blocks_comments_stay() -> None:
    after = rackedit.put(BLOCK, ("blades", "gm0", "cpus"), 2)
    assert changed_lines(BLOCK, after) == ["+    cpus: 2"]
    after = rackedit.put(BLOCK, ("blades", "gm0", "memory"), "300 MiB")
    assert after == BLOCK.replace("256 MiB  # small", "300 MiB  # small")
    after = rackedit.put(BLOCK, ("blades", "mb1"), {"kind": "memory", "memory": "1 GiB"})
    assert changed_lines(BLOCK, after) == ["+  mb1: {kind: memory, memory: 1 GiB}"]
    after = rackedit.drop(BLOCK, ("blades", "mb0"))
    assert changed_lines(BLOCK, after) == ["-  mb0:", "-    kind: memory", "-    memory: 512 MiB"]


def test_a_part_that_is_not_there_is_made_and_goes_again() -> None:
    after = rackedit.put(BLOCK, ("links", "mb0", "latency"), "1 ms")
    assert after == BLOCK.replace("links:", "links: {mb0: {latency: 1 ms}}")
    pair = "name: a\nblades:\n  gm0: {kind: manager, memory: 256 MiB}"
    after = rackedit.put(pair, ("links", "gm0", "loss"), "1 %")
    assert after == f"{pair}\nlinks:\n  gm0: {{loss: 1 %}}"
    assert rackedit.drop(after, ("links", "gm0", "loss")) == f"{pair}\n"
    assert rackedit.drop(DEFAULT, ("links", "mb1", "jitter")) == DEFAULT, "it is not there"


def test_what_cannot_be_edited_in_place_is_refused() -> None:
    shared = "name: a\nblades:\n  gm0: {kind: manager, memory: 256 MiB}\n  mb0: &mb {memory: 1 GiB}\n  mb1: *mb\n"
    with pytest.raises(RacklessError, match=r"blades\.mb1\.memory cannot be edited in place"):
        rackedit.put(shared, ("blades", "mb1", "memory"), "2 GiB")
    with pytest.raises(RacklessError, match="no rack file"):
        rackedit.put("- 1", ("blades", "mb1"), {})


@pytest.mark.long
@given(racks(), st.booleans(), st.data())
def test_any_edit_of_any_rack_can_be_taken_back(rack: Rack, flow: bool, data: Any) -> None:
    text = yaml.safe_dump(rack.model_dump(mode="json", exclude_none=True), sort_keys=False,
                          default_flow_style=flow, width=1000)  # fmt: skip
    name = data.draw(st.sampled_from(list(rack.blades)))
    edited = rackedit.put(text, ("blades", name, "memory"), "777 MiB")
    edited = rackedit.put(edited, ("blades", "zz9"), {"kind": "memory", "memory": "333 MiB"})
    edited = rackedit.put(edited, ("links", "zz9", "latency"), "1 ms")
    read: Any = yamltext.read(edited).data
    assert read["blades"][name]["memory"] == "777 MiB"
    assert read["links"]["zz9"] == {"latency": "1 ms"}
    back = rackedit.drop(rackedit.drop(edited, ("links", "zz9")), ("blades", "zz9"))
    back = rackedit.put(back, ("blades", name, "memory"), yamltext.read(text).data["blades"][name]["memory"])  # type: ignore[index]
    before: Any = yamltext.read(text).data
    assert yamltext.read(back).data == {key: value for key, value in before.items() if key != "links" or value}


@pytest.mark.parametrize("value", ["no", "12", "a: b", "x #y", "{a}", "10.77.0.0/24", "50 %", "", "*a", "1 Gbit/s"])
def test_text_stays_text(value: str) -> None:
    after = rackedit.put("name: a\nb: {c: 1}\n", ("b", "d"), value)
    assert yamltext.read(after).data == {"name": "a", "b": {"c": 1, "d": value}}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file, link = tmp_path / "real.yml", tmp_path / "link.yml"
    file.write_text("a")
    file.chmod(0o640)
    link.symlink_to(file)
    rackedit.write(link, "b")
    assert link.is_symlink()
    assert file.read_text() == "b"
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yml", "real.yml"]
