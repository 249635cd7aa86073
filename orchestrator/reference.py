"""The reference of rack files, written from their schema.

`python -m orchestrator.reference` in the source tree writes docs/rackfile.md for people and
racks/rack.schema.json for editors; a test checks that they are current.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.fields import MTU_FOR_4096
from orchestrator.rackfile import json_schema
from orchestrator.units import BANDWIDTH, BYTE_RATE, DURATION, PERCENT, SIZE, Quantity

_INTRODUCTION = """\
# Rack files

*Written by `python -m orchestrator.reference`; the descriptions are in `orchestrator/model.py`.*

A rack file says which blades a rack has and how they are connected. `rackless plan` shows what a changed file
would do to a running rack; `rackless up` does it. Without a file, `racks/default.yml` is meant:

```yaml
{default}```

Editors that know JSON Schema complete and check rack files that begin with the first line above.

What is not written takes its default. A key that is not listed here is an error, and so is a number without
its unit; `rackless` names every problem of a file at once, with its line and what to write instead.

## Units

| quantity | units | example |
|---|---|---|
{units}

Units are binary for bytes (1 KiB is 1024 bytes) and decimal for bits (1 kbit/s is 1000 bit/s). "MB" and
"Gbps" mean different things to different people and are refused.
"""

_HEADINGS = {
    "The rack": None,
    "`fabric`": "Fabric",
    "`management`": "Management",
    "`membership`": "Membership",
    "Each of `hosts`": "Host",
    "Each of `blades`": "Blade",
    "`disk`": "Disk",
    "Each of `links`": "Link",
}

_RULES = f"""\
## Rules between keys

- A rack has at least one `manager`; a `storage` blade has a `disk`, and no other kind has.
- Only a `processor` has an `excache`, and it is smaller than the blade's `memory`.
- Only a `memory` blade has `pmem`, a multiple of 16 MiB, up to 30 GiB.
- `memory` is a multiple of 1 MiB, from 192 MiB; `jitter` is at most the `latency`.
- Both subnets are private, from /16 to /28, do not overlap, and have an address for every blade.
- `dead_after` is at least three times the `heartbeat`.
- `links` name blades of the same file.
- Exactly one of `hosts` has no `uri`; a blade's `host` is one of them. See [hosts.md](hosts.md).
- An `mtu` below {MTU_FOR_4096} is allowed with a warning: RDMA's own MTU of 4096 bytes does not fit.

## What a change does to a running blade

| change | effect |
|---|---|
| `cpu_quota`, `excache`, `membership`, the blade's link, the disk's `iops` and `bandwidth` | applied while it runs |
| `memory`, up to what the blade was started with, if it has no `pmem` | applied while it runs |
| anything else | the blade is made anew |
| the disk's `size`, the size of `pmem` | made anew, and what was on it is lost |
| its `host`, or none: a blade stays where it is | made anew on the other host; its disk and pmem are lost |
| the order of blades | nothing: a blade keeps its addresses while it lives |
"""


def reference_markdown(default_rack: str) -> str:
    """The text of docs/rackfile.md; `default_rack` is the text of racks/default.yml."""
    schema = json_schema()
    quantities = (SIZE, DURATION, BANDWIDTH, BYTE_RATE, PERCENT)
    names = ("size", "duration", "bandwidth of a link", "bandwidth of a disk", "share")
    units = "\n".join(_unit_row(name, quantity) for name, quantity in zip(names, quantities, strict=True))
    sections = [_INTRODUCTION.format(default=default_rack, units=units)]
    for heading, model in _HEADINGS.items():
        sections.append(_section(heading, schema["$defs"][model] if model else schema))
    return "\n".join([*sections, _RULES])


def _section(heading: str, part: dict[str, Any]) -> str:
    required = part.get("required", [])
    rows = [_row(name, key, name in required) for name, key in part["properties"].items()]
    table = "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
    return f"## {heading}\n\n{part['description']}\n\n{table}\n"


def _row(name: str, key: dict[str, Any], required: bool) -> str:
    default = key.get("default")
    if required:
        shown = "**required**"
    elif isinstance(default, (str, int, float)):
        shown = f"`{default}`"
    else:
        shown = "none" if default is None and "$ref" not in key else "see below"
    return f"| `{name}` | {_value(name, key)} | {shown} | {key.get('description', '')} |"


def _value(name: str, key: dict[str, Any]) -> str:
    if "enum" in key:
        return ", ".join(f"`{word}`" for word in key["enum"])
    if "$ref" in key or key.get("type") == "object":
        return "mapping, see below"
    examples = key.get("examples", [key["default"]] if "default" in key else [])
    limits = f"{key['minimum']} to {key['maximum']}" if "minimum" in key else ""
    example = f"such as `{examples[0]}`" if examples and examples[0] != key.get("default") else ""
    return ", ".join(part for part in (limits, example) if part) or "text"


def _unit_row(name: str, quantity: Quantity) -> str:
    return f"| {name} | {', '.join(f'`{unit}`' for unit in quantity.units)} | `{quantity.example}` |"


def schema_text() -> str:
    """The text of racks/rack.schema.json."""
    return json.dumps(json_schema(), indent=2) + "\n"


def main() -> None:
    """Write both files into the source tree this module is part of."""
    tree = Path(__file__).parent.parent
    default_rack = (tree / "racks/default.yml").read_text()
    (tree / "docs").mkdir(exist_ok=True)
    (tree / "docs/rackfile.md").write_text(reference_markdown(default_rack))
    (tree / "racks/rack.schema.json").write_text(schema_text())


if __name__ == "__main__":
    main()
