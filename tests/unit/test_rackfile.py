"""Rack files: what loads, and what every mistake is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator import rackfile, reference
from orchestrator.fields import GIB, MIB
from orchestrator.model import Rack, warnings
from orchestrator.rackfile import RackFileError, load, parse
from tests.unit.rack_strategies import ANYTHING, nearly_racks, racks

TREE = Path(__file__).parent.parent.parent
ERRORS = sorted((Path(__file__).parent / "data/errors").glob("*.yml"))
MINIMAL = "name: demo\nblades:\n  gm0: {kind: manager, memory: 256 MiB}\n"


def test_the_default_rack() -> None:
    rack = load(TREE / "racks/default.yml")
    assert list(rack.blades) == ["gm0", "pb0", "mb0", "mb1", "sb0"]
    assert rack.blades["mb0"].cpu_quota == 0.5
    assert rack.blades["pb0"].excache == 64 * MIB
    disk = rack.blades["sb0"].disk
    assert disk is not None
    assert (disk.size, disk.iops, disk.bandwidth) == (2 * GIB, 2000, 100 * MIB)
    assert (rack.link("mb1").latency, rack.link("mb1").bandwidth) == (50e-6, 10**9)
    assert rack.link("gm0").latency == 0.0
    assert warnings(rack) == ()


@pytest.mark.parametrize("path", sorted((TREE / "racks").glob("*.yml")), ids=lambda path: path.name)
def test_every_rack_of_the_tree_loads(path: Path) -> None:
    assert load(path).name
    assert path.read_text().startswith("# yaml-language-server: $schema=rack.schema.json\n")


@pytest.mark.parametrize("path", ERRORS, ids=lambda path: path.stem)
def test_error(path: Path) -> None:
    """Every data/errors/NAME.yml is told exactly what NAME.txt says (RACKLESS_GOLDEN=write writes them)."""
    with pytest.raises(RackFileError) as caught:
        parse(path.read_bytes().decode(), "rack.yml")
    golden = path.with_suffix(".txt")
    if os.environ.get("RACKLESS_GOLDEN") == "write":
        golden.write_text(caught.value.message + "\n")
    assert caught.value.message + "\n" == golden.read_text()


def test_there_are_errors_to_compare() -> None:
    assert len(ERRORS) >= 15


def test_a_missing_file_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "good.yml").write_text(MINIMAL)
    with pytest.raises(RackFileError) as caught:
        load(tmp_path / "god.yml")
    assert caught.value.message == f"{tmp_path}/god.yml: there is no such file"
    assert caught.value.hint == f"rack files here: {tmp_path}/good.yml"
    with pytest.raises(RackFileError, match="this is a folder"):
        load(tmp_path)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rack.yml"
    path.write_bytes(b"name: demo\nimage: \xff\n")
    with pytest.raises(RackFileError, match=r"rack\.yml:2: this is not UTF-8 text"):
        load(path)
    path.write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(RackFileError, match="more than 1 MiB"):
        load(path)


def test_words_that_yaml_gives_a_meaning() -> None:
    """Norway's blade is called "no", and 1:30 is not ninety."""
    assert "no" in parse("name: on\nblades: {no: {kind: manager, memory: 256 MiB}}").blades
    with pytest.raises(RackFileError, match='"1:30" is not a number of CPUs'):
        parse(MINIMAL.replace("kind", "cpus: 1:30, kind"))


def test_a_low_mtu_is_only_a_warning() -> None:
    rack = parse(MINIMAL + "fabric: {mtu: 1500}\n")
    assert "4096" in warnings(rack)[0]


@pytest.mark.long
@given(racks())
def test_a_rack_written_out_is_the_same_rack(rack: Rack) -> None:
    assert rackfile.validate(rack.model_dump(mode="json")) == rack
    assert parse(yaml.safe_dump(rack.model_dump(mode="json", exclude_none=True), sort_keys=False)) == rack


@pytest.mark.long
@given(nearly_racks() | ANYTHING)
def test_data_is_a_rack_or_a_rack_file_error(data: object) -> None:
    _loads_or_explains(json.dumps(data))
    _loads_or_explains(yaml.safe_dump(data, allow_unicode=True))


@pytest.mark.long
@given(st.text() | st.text(alphabet="ab:{}[],&*!|>'\"%@`#-?<\t \n\\ux0F=~"))
@example('"\\UFFFFFFFF"')
@example('"\\ud800": "\\ud800\\udc00"')
@example("[" * 5000)
@example("{a: " * 5000)
@example("a: &a {b: *a}")
@example("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + "".join(f"d{n}: [*c, *c]\n" for n in range(9)))
@example("%YAML 9.9\n---\n")
@example("\x00")
@example("!!python/object:os.system x")
@example("!!int x")
@example("\ufeffname: x")
def test_text_is_a_rack_or_a_rack_file_error(text: str) -> None:
    _loads_or_explains(text)


@given(st.data())
def test_a_broken_default_rack_is_explained(data: st.DataObject) -> None:
    """Whatever is cut from, or put into, a good file."""
    text = (TREE / "racks/default.yml").read_text()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 20, len(text))))
    _loads_or_explains(text[:start] + data.draw(st.text(max_size=6)) + text[end:])


def test_aliases_cannot_multiply_without_end() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(RackFileError, match="repeat too much"):
        parse("\n".join(lines))


def _loads_or_explains(text: str) -> None:
    try:
        parse(text, "rack.yml")
    except RackFileError as error:
        for line in error.message.split("\n"):
            where, _, what = line.partition(": ")
            assert where.startswith("rack.yml:")
            assert 1 <= int(where.removeprefix("rack.yml:")) <= text.count("\n") + text.count("\r") + 5
            assert what
            assert line.isprintable()


def test_the_schema_and_the_reference_are_current() -> None:
    """`python -m orchestrator.reference` writes both."""
    default_rack = (TREE / "racks/default.yml").read_text()
    assert (TREE / "racks/rack.schema.json").read_text() == reference.schema_text()
    assert (TREE / "docs/rackfile.md").read_text() == reference.reference_markdown(default_rack)
