"""Hypothesis strategies for racks: valid ones, and data that is nearly one."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from orchestrator.model import Rack

NAMES = st.from_regex(r"[a-z]b[0-9]{1,2}", fullmatch=True)
_MEMORY = st.integers(192, 2048).map(lambda mib: f"{mib} MiB")
_QUOTA = st.none() | st.integers(1, 100).map(lambda percent: f"{percent} %")


@st.composite
def blades(draw: st.DrawFn) -> dict[str, Any]:
    """A valid blade, as in a rack file."""
    kind = draw(st.sampled_from(["processor", "memory", "storage", "manager"]))
    blade: dict[str, Any] = {"kind": kind, "memory": draw(_MEMORY), "cpus": draw(st.integers(1, 4))}
    blade["cpu_quota"] = draw(_QUOTA)
    if kind == "processor":
        blade["excache"] = draw(st.none() | st.integers(1, 191).map(lambda mib: f"{mib} MiB"))
    if kind == "memory":
        blade["pmem"] = draw(st.none() | st.integers(1, 16).map(lambda steps: f"{steps * 16} MiB"))
    if kind == "storage":
        iops = draw(st.none() | st.integers(1, 5000))
        blade["disk"] = {"size": draw(st.sampled_from(["64 MiB", "1 GiB", "2 GiB"])), "iops": iops}
    return blade


@st.composite
def racks(draw: st.DrawFn, most_blades: int = 8) -> Rack:
    """A valid rack named demo."""
    all_blades = draw(st.dictionaries(NAMES, blades(), max_size=most_blades - 1))
    all_blades["gm0"] = {"kind": "manager", "memory": draw(_MEMORY)}
    order = draw(st.permutations(list(all_blades)))
    linked = draw(st.sets(st.sampled_from(order), max_size=3))
    latency = st.integers(0, 1000).map(lambda micros: f"{micros} us")
    return Rack.model_validate(
        {
            "name": "demo",
            "fabric": {"subnet": draw(st.sampled_from(["10.77.0.0/24", "10.77.0.0/28", "10.64.0.0/16"]))},
            "blades": {name: all_blades[name] for name in order},
            "links": {name: {"latency": draw(latency)} for name in sorted(linked)},
        }
    )


_SCALARS = (
    st.none()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(
        ["memory", "storage", "manager", "512 MiB", "64 MiB", "50 us", "50 %", "10.77.0.0/24", "gm0"]
    )
)
_KEYS = st.text(max_size=4) | st.sampled_from(
    [
        *(
            "name",
            "image",
            "fabric",
            "management",
            "blades",
            "links",
            "subnet",
            "mtu",
            "kind",
            "cpus",
            "cpu_quota",
        ),
        *(
            "memory",
            "excache",
            "pmem",
            "disk",
            "size",
            "iops",
            "bandwidth",
            "latency",
            "jitter",
            "loss",
            "gm0",
        ),
    ]
)
ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=6),
    max_leaves=25,
)
"""Any JSON-like value, made of words that rack files know more often than not."""


@st.composite
def nearly_racks(draw: st.DrawFn) -> object:
    """A valid rack's data with one part of it replaced by anything, renamed or removed."""
    data: Any = draw(racks()).model_dump(mode="json", exclude_none=True)
    spot, key = data, draw(st.sampled_from(sorted(data)))
    while isinstance(spot[key], dict) and spot[key] and draw(st.booleans()):
        spot = spot[key]
        key = draw(st.sampled_from(sorted(spot)))
    change = draw(st.sampled_from(["replace", "rename", "remove"]))
    value = spot.pop(key)
    if change == "replace":
        spot[key] = draw(ANYTHING)
    elif change == "rename":
        spot[draw(_KEYS)] = value
    return data
