"""`rackless blade`, `fault`, `heal`, `scenario` and `status` as a user types them, on a rack without VMs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.image import build as image_build
from tests.unit.broken_racks import BrokenRack, broken_rack
from tests.unit.netns_racks import needs_root
from tests.unit.test_topology import DEFAULT, IDLE, TEXT

pytestmark = [pytest.mark.long, pytest.mark.netns, needs_root]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[BrokenRack]:
    monkeypatch.setattr(image_build, "image_key", lambda _recipe, _flavour: "0" * 64)
    with broken_rack(monkeypatch) as made:
        for name in ("cache", "state", "run"):
            monkeypatch.setenv(f"RACKLESS_{name.upper()}", str(getattr(made.paths.settings, f"{name}_dir")))
        made.replies.update({f"{name} memory.stats": IDLE for name in ("mb0", "mb1")})
        made.replies["gm0 vnode.list"] = {"vnodes": [DEFAULT]}
        made.replies.update({f"{name} agent.status": {"joined": True, "rdma": "ACTIVE"} for name in made.specs})
        (tmp_path / "racks").mkdir()
        (tmp_path / "racks/default.yml").write_text(TEXT.format(name=made.name))
        monkeypatch.chdir(tmp_path)
        yield made


@pytest.fixture
def run(rack: BrokenRack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command on the rack of racks/default.yml: exit code, standard output, standard error."""

    def rackless(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rackless", *words])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return rackless


def test_faults_come_are_listed_and_go(rack: BrokenRack, run: Run) -> None:
    assert run("fault", "link", "mb0", "--latency", "20 ms", "--loss", "1%")[1] == "mb0: latency 20 ms, loss 1 %\n"
    assert run("fault", "link", "mb0", "--latency", "20ms")[1] == "nothing to do\n"
    assert run("fault", "one-way", "pb0", "mb1")[1] == "mb1: deaf to pb0\n"
    assert run("fault", "pause", "pb0", "gm0")[1] == "gm0: paused\npb0: paused\n"
    assert run("fault", "clock", "mb1", "-1 h", "--json")[0] == 0
    assert run("heal", "mb1", "--only", "clock")[1] == "mb1: deaf to pb0\n"
    assert [told["clock"] for told in rack.updates["mb1"][-2:]] == [-3600, 0]
    assert run("fault", "resume", "gm0")[1] == "gm0: no faults\n"
    assert run("fault", "partition", "mb0,mb1")[0] == 0
    assert run("fault", "list")[1].splitlines() == [
        "gm0: side 0", "pb0: paused, side 0", "mb0: side 1, latency 20 ms, loss 1 %", "mb1: side 1, deaf to pb0",
    ]  # fmt: skip
    status = {blade["name"]: blade for blade in json.loads(run("status", "--json")[1])["blades"]}
    assert status["mb0"]["faults"] == ["side 1", "latency 20 ms", "loss 1 %"]
    assert (status["pb0"]["state"], status["pb0"]["faults"]) == ("paused", ["paused", "side 0"])
    assert "side 1, deaf to pb0" in run("status")[1]
    assert run("heal", "mb0", "--only", "loss")[1] == "mb0: side 1, latency 20 ms\n"
    healed = json.loads(run("heal", "--all", "--json")[1])
    assert healed == {"rack": rack.name, "changed": ["gm0", "pb0", "mb0", "mb1"], "faults": {}}
    assert run("fault", "list")[1] == f"nothing of {rack.name} is broken on purpose\n"
    assert rack.parts() == [{"gm0", "pb0", "mb0", "mb1"}]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("fault kill mb9", "no blade mb9 in rack"),
        ("fault kill", "no blade is named"),
        ("fault link mb0", "no fault is named"),
        ("fault link mb0 --latency 20", 'fault latency: "20" has no unit'),
        ("fault slow mb0 200%", "fault cpu"),
        ("fault disk mb0", "no fault is named"),
        ("fault disk mb0 --latency 5ms", "mb0 has no data disk"),
        ("fault disk mb0 --errors some", "fault disk_errors"),
        ("fault clock mb0 1", "has no unit"),
        ("fault partition gm0,mb9 mb0", "no blade mb9"),
        ("heal", "heal what?"),
        ("heal mb0 --all", "heal what?"),
        ("heal mb0 --only slow", "no fault is called slow"),
        ("scenario none.yml", "none.yml: No such file"),
        ("blade remove mb9", "no blade mb9"),
        ("blade remove gm0", "gm0 is the last manager"),
        ("blade add disk", "no kind of blade is called disk"),
        ("blade add memory mb0 --memory 1GiB", "mb0 is there already, with another memory"),
        ("blade resize mb0 --memory 10TiB", "too large"),
        ("blade resize mb0 --disk 1GiB", "a memory blade has no disk"),
        ("blade link mb0 --jitter 1ms", "more than the latency"),
        ("blade add memory --rack demo", "demo is the name of a rack"),
    ],
)
def test_errors_are_a_line_and_a_hint(rack: BrokenRack, run: Run, words: str, error: str) -> None:
    before = Path("racks/default.yml").read_text()
    code, out, err = run(*words.split())
    assert code == 1
    assert out == ""
    assert error in err
    assert "Traceback" not in err
    assert "hint:" in err
    assert Path("racks/default.yml").read_text() == before
    assert rack.ups == []
    assert all(rack.state(blade) == "running" for blade in rack.specs)


def test_blades_by_command(rack: BrokenRack, run: Run) -> None:
    file = Path("racks/default.yml")
    before = file.read_text()
    told = json.loads(run("blade", "add", "memory", "--dry-run", "--json")[1])
    assert (told["blade"], told["changed"], told["result"]) == ("mb2", True, None)
    assert file.read_text() == before
    assert run("blade", "add", "memory", "mb2")[1] == "mb2: added (not there yet)\n"
    assert run("blade", "resize", "mb0", "--cpu-quota", "50%")[1] == (
        "mb0: changed while it runs (cpu_quota none -> 50 %)\n"
    )
    assert run("blade", "resize", "mb0", "--cpu-quota", "none")[0] == 0
    assert run("blade", "link", "mb1", "--latency", "1ms", "--loss", "1%")[0] == 0
    assert run("blade", "link", "mb1", "--latency", "none", "--loss", "none")[0] == 0
    assert run("blade", "remove", "mb2")[0] == 0
    assert file.read_text() == before
    rack.replies["mb1 memory.stats"] = {**IDLE, "bytes_allocated": 5 << 20}
    code, _, err = run("blade", "remove", "mb1")
    assert code == 1
    assert "memory of programs (5 MiB" in err
    assert [only for _, only in rack.ups] == [{"mb2"}, {"mb0"}, {"mb1"}], "what is taken back was never done here"


def test_a_blade_is_replaced_if_it_is_not_well(rack: BrokenRack, run: Run) -> None:
    assert run("blade", "replace", "mb0")[1] == "mb0: nothing to do\n"
    told = run("blade", "replace", "mb0", "--anew", "--dry-run")[1]
    assert told == "mb0: made anew (it is ready, and to be replaced)\n"
    assert rack.state("mb0") == "running"
    assert run("blade", "replace", "mb0", "--anew")[0] == 0
    assert [only for _, only in rack.ups] == [{"mb0"}]
    assert rack.state("mb0") == "off", "until it is made anew"


def test_a_scenario(rack: BrokenRack, run: Run) -> None:
    Path("story.yml").write_text("seed: 3\nsteps:\n- at 0 s kill mb0\n- at 20 ms slow mb1 10 %\n")
    assert "0.02 s  slow mb1 10 %" in run("scenario", "story.yml", "--dry-run")[1]
    assert rack.state("mb0") == "running"
    told = json.loads(run("scenario", "story.yml", "--json")[1])
    assert [step["step"] for step in told["steps"]] == ["kill mb0", "slow mb1 10 %"]
    assert (told["seed"], told["played"]) == (3, True)
    assert rack.state("mb0") == "off"


def test_blades_are_restarted_one_after_the_other(rack: BrokenRack, run: Run) -> None:
    health = {"joined": True, "rdma": "ACTIVE", "uptime_seconds": 40}
    rack.replies.update({f"{name} agent.status": health for name in rack.specs})
    rack.replies["pb0 process.stats"] = {"programs": 0}
    assert run("blade", "restart", "--dry-run")[1] == f"{rack.name}: blades restarted: gm0, pb0, mb0, mb1\n"
    assert run("blade", "restart", "--older-than", "60")[1] == "nothing to do\n"
    assert "no blade mb9" in run("blade", "restart", "mb9")[2]
    assert rack.ups == []
    rack.replies["pb0 process.stats"] = {"programs": 1}
    assert "restarting pb0 would lose programs that run on it (1)" in run("blade", "restart", "mb0", "pb0")[2]
    assert rack.ups == [], "nor is mb0 restarted before"
