"""Prometheus's text: well-formed, right figures, and every metric that the Grafana dashboard names is there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from orchestrator.metrics import FAMILIES, exposition
from orchestrator.panel import panel
from tests.unit.snapshots import MIB, snapshot

GRAFANA = Path(__file__).parents[2] / "docs/grafana/rackless.json"
_SAMPLE = re.compile(r'(rackless_[a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\\\|\\"|\\n)*",?)+)\} (-?[0-9.e+-]+)')


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Values by name and labels; fails on a line that is not as the format says, and on families in pieces."""
    values: dict[str, dict[str, float]] = {}
    assert text.endswith("\n")
    lines = text.splitlines()
    for line in lines:
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in values, "a family must be in one piece"
            values[name] = {}
        elif line.startswith("# TYPE "):
            assert line == f"# TYPE {name} {FAMILIES[name][0]}"
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] == name
            assert match[2] not in values[name], f"twice: {line}"
            values[name][match[2]] = float(match[3])
    return values


def test_figures() -> None:
    values = parsed(exposition(snapshot(3)))
    blade = 'rack="demo",blade="{}",kind="{}"'
    gm0, mb1, mb2 = (blade.format(*words) for words in (("gm0", "manager"), ("mb1", "memory"), ("mb2", "memory")))
    assert values["rackless_blade_running"][gm0] == values["rackless_blade_answers"][gm0] == 1
    assert (values["rackless_blade_running"][mb1], values["rackless_blade_answers"][mb1]) == (1, 0)
    assert (values["rackless_blade_running"][mb2], values["rackless_blade_faults"][mb2]) == (0, 1)
    links = {labels: value for labels, value in values["rackless_link_state"].items() if value}
    assert [labels.rpartition("=")[2] for labels in links] == [
        '"up"', '"shaped"', '"lossy"', '"up"', '"cut"', '"up"']  # fmt: skip
    assert values["rackless_qemu_resident_bytes"][gm0] == 300 * MIB
    assert values["rackless_tap_in_bytes_total"][f'{gm0},network="fabric"'] == 9 * MIB
    program = 'rack="demo",blade="pb0",program="pb0.812"'
    assert values["rackless_excache_faults_total"][program] == 1300
    assert values["rackless_excache_hits_total"][program] == 1300 - 315
    assert values["rackless_memory_lent_bytes"]['rack="demo",blade="mb0"'] == 48 * MIB
    assert values["rackless_lite_peer_in_bytes_total"]['rack="demo",blade="pb0",peer="gm0"'] == 60
    assert values["rackless_lite_peer_in_bytes_total"]['rack="demo",blade="pb0",peer="node 99"'] == 60
    assert values["rackless_managers_requests_total"]['rack="demo",blade="gm0",opcode="P2PM_REQUEST_VNODE"'] == 1


def test_every_family_is_exported_and_named_as_prometheus_wants() -> None:
    assert set(parsed(exposition(snapshot(1)))) == set(FAMILIES)
    for name, (kind, about) in FAMILIES.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert "\n" not in about


def test_labels_are_escaped_and_a_program_that_does_not_page_has_no_counters() -> None:
    seen = snapshot(1)
    program = seen.sample["pb0"]["stats"]["running"][0]
    program["id"] = 'a"b\\c\nd'
    program["counters"]["managed"] = 0
    values = parsed(exposition(seen))
    assert list(values["rackless_excache_limit_bytes"]) == [r'rack="demo",blade="pb0",program="a\"b\\c\nd"']
    assert "rackless_excache_faults_total" not in values


def test_a_rack_that_is_down_is_no_metrics() -> None:
    assert exposition(replace(snapshot(1), wires=(), host={}, sample={})) == "\n"


def test_grafana_names_only_what_is_exported_and_draws_all_of_it() -> None:
    dashboard = json.loads(GRAFANA.read_text())
    text = json.dumps(dashboard["panels"]) + json.dumps(dashboard["templating"])
    assert set(re.findall(r"rackless_\w+", text)) == set(FAMILIES)
    ids = [shown["id"] for shown in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for shown in dashboard["panels"]:
        assert shown["type"] == "row" or all(target["expr"] for target in shown["targets"])


def test_the_page_gets_rates_of_what_happened_in_between() -> None:
    shown = panel(snapshot(4), snapshot(6))
    blades = {blade["blade"]: blade for blade in shown["blades"]}
    assert list(blades) == ["gm0", "pb0", "mb0", "mb1", "mb2", "sb0"]
    assert (blades["gm0"]["cpu_percent"], blades["gm0"]["host_cpu_percent"]) == (30.0, 75.0)
    assert (blades["gm0"]["bytes_in"], blades["gm0"]["bytes_out"]) == (1.5 * MIB, 1000.0)
    assert blades["pb0"]["does"] == {"programs": 1, "hit_ratio": 0.95, "misses": 2.5, "flushes": 20.0}
    assert blades["mb0"]["does"] == {"bytes_total": 160 * MIB, "bytes_allocated": 48 * MIB, "bytes_of_others": 8 * MIB}
    assert blades["sb0"]["does"]["requests"] == 5.0
    assert (blades["mb1"]["answers"], blades["mb1"]["error"]) == (False, "no agent answers at 10.78.0.13:7070")
    assert (blades["mb2"]["answers"], blades["mb2"]["bytes_in"], blades["mb2"]["does"]) == (False, None, {})
    assert json.loads(json.dumps(shown))["programs"][0]["hit_ratio"] == 0.95


def test_the_first_look_has_no_rates_and_a_blade_made_anew_has_none_either() -> None:
    seen = snapshot(4)
    assert {blade["host_cpu_percent"] for blade in panel(seen, seen)["blades"]} == {None}
    assert panel(seen, seen)["programs"][0]["hit_ratio"] == round(1 - 320 / 1400, 4)
    again = panel(snapshot(6), replace(snapshot(4), monotonic=20.0))
    assert {blade["bytes_in"] for blade in again["blades"]} == {None}
