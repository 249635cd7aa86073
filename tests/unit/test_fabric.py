"""What a blade's agent has `tc` do to its fabric. `tc` is a stand-in here: host kernels may lack netem."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from guest_agents import control, fabric, pressure

TC = """#!/bin/sh
[ "$1 $2" = "qdisc show" ] && { cat "$0.state"; exit; }
[ "$1" = -batch ] && exec cat >> "$0.log"
echo "$*" >> "$0.log"
"""


@pytest.fixture
def tc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Shapes the link over a `tc` that says what is there; gives what it was told."""
    program = tmp_path / "tc"
    program.write_text(TC)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def shape(present: str, **link: object) -> list[str]:
        Path(f"{program}.state").write_text(present)
        log = Path(f"{program}.log")
        log.write_text("")
        fabric.shape(link)
        return log.read_text().splitlines()

    return shape


def test_all_of_a_link_is_one_netem(tc: Callable[..., list[str]]) -> None:
    told = tc("", latency=0.02, jitter=0.001, loss=0.1, corruption=0.01, duplication=0.02, bandwidth=10**7)
    assert told == [
        "qdisc replace dev fabric root netem limit 10000 delay 20000us 1000us loss 10.0000% corrupt 1.0000%"
        " duplicate 2.0000% rate 10000000bit"
    ]


def test_nothing_is_done_to_a_link_that_is_well(tc: Callable[..., list[str]]) -> None:
    assert tc("qdisc pfifo_fast 0: root") == []
    assert tc("qdisc netem 8001: root", latency=0, deaf_to=[]) == ["qdisc del dev fabric root"]


def test_packets_of_others_are_dropped_as_they_come_in(tc: Callable[..., list[str]]) -> None:
    rule = "filter add dev fabric parent ffff: protocol ip prio 1 u32 match ip src {}/32 action drop"
    assert tc("", deaf_to=["10.77.0.11", "10.77.0.12"]) == [
        "qdisc add dev fabric ingress", rule.format("10.77.0.11"), rule.format("10.77.0.12")
    ]  # fmt: skip
    assert tc("qdisc ingress ffff: dev fabric", deaf_to=["10.77.0.11"]) == [
        "qdisc del dev fabric ingress", "qdisc add dev fabric ingress", rule.format("10.77.0.11")
    ]  # fmt: skip
    assert tc("qdisc ingress ffff: dev fabric") == ["qdisc del dev fabric ingress"]


def test_memory_is_taken_and_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    pressure.take(64 << 20)
    try:
        assert resident() - before > 60 << 20
        with pytest.raises(control.ControlError, match="MiB that can be taken"):
            pressure.take(1 << 50)
    finally:
        pressure.take(0)
    assert resident() - before < 4 << 20
