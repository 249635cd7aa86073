"""The crash matrix on real blades: transactions on all of them, one of which loses its power, or its network, at a
chosen step of a protocol; then everything that ran is judged.

    python -m tests.rack.hotpot_crash MODE FATE STEP COUNT SEED     runs one (docs/hotpot.md); as root
    python -m tests.rack.hotpot_crash 40 [FIRST [SECONDS]]          runs 40 of the matrix, from number FIRST on

The blade stands still at the step (guest_agents/hotpot/steps.py), so its power is cut, or its network parted, exactly
there. What it had stored and not persisted survives line by line, by lot. Seeds choose everything but how blades take
turns.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guest_agents.hotpot import steps
from guest_agents.hotpot.lease import Timing
from orchestrator import agents, engine, rackfile
from orchestrator.errors import RacklessError
from orchestrator.events import ignore
from orchestrator.faults import inject
from orchestrator.parallel import together
from orchestrator.settings import RackPaths, Settings
from orchestrator.spec import BladeSpec
from orchestrator.ssh import client
from tests.rack.hotpot_cases import BLADES, MANAGER, OWNERS, Case, chosen, parse
from tests.rack.hotpot_writer import CELLS, SIZE
from tests.unit.hotpot_history import CELL, STRIDE, Attempt, Cell, attempts_of, check

RACK = """\
name: {name}
blades:
  gm0: {{kind: manager, memory: 256 MiB}}
  mb0: {{kind: memory, memory: 256 MiB, pmem: 32 MiB}}
  mb1: {{kind: memory, memory: 256 MiB, pmem: 32 MiB}}
  mb2: {{kind: memory, memory: 256 MiB, pmem: 32 MiB}}
"""
PROJECT = Path(__file__).parents[2]
_PROGRAMS = ("tests/unit/hotpot_history.py", "tests/rack/hotpot_writer.py")
_AGENT = "/etc/rackless/services/agent/supervise/pid"
_AWAY_SECONDS = 20.0
"""More than it takes until others take over (Timing.promote)."""
_HIT_SECONDS = 15.0
_TOLD_SECONDS = 90.0
_REST_SECONDS = 90.0
_WARM_COMMITS = 6


class Program:
    """A writer on a blade, and what it has said."""

    def __init__(self, paths: RackPaths, spec: BladeSpec) -> None:
        self.blade = spec.name
        self._exits = ExitStack()
        connection = self._exits.enter_context(client.connect(paths, spec.name, spec.mgmt_address))
        self.connection = connection
        files = "".join(f"mkdir -p {Path(name).parent} && cat > {name} <<'END-OF-FILE'\n"
                        f"{(PROJECT / name).read_text()}END-OF-FILE\n" for name in _PROGRAMS)  # fmt: skip
        self._channel = connection.client.get_transport().open_session()
        self._channel.set_combine_stderr(True)
        self._channel.exec_command(f"cd /root\n{files}exec python3 -u -m tests.rack.hotpot_writer")
        self.lines: list[str] = []
        self.ended = False
        self._news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()
        self.wait_for("ok begin")

    def _listen(self) -> None:
        with suppress(OSError):
            for line in self._channel.makefile("r"):
                with self._news:
                    self.lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self.ended = True
            self._news.notify_all()

    def told(self, *words: object) -> int:
        """Tell it a line; the number of lines that it had said before."""
        said = len(self.lines)
        with suppress(OSError):
            self._channel.sendall(f"{' '.join(map(str, words))}\n".encode())
        return said

    def wait_for(self, start: str, since: int = 0, seconds: float = _TOLD_SECONDS) -> str:
        """The first line from number `since` on that starts so. RacklessError when there is none."""
        deadline = time.monotonic() + seconds
        with self._news:
            while True:
                for line in self.lines[since:]:
                    if line.startswith((start, "failed")):
                        return line
                left = deadline - time.monotonic()
                if self.ended or left <= 0:
                    end = "ended" if self.ended else f"is silent for {seconds:g} s"
                    raise RacklessError(f"the program on {self.blade} {end}", hint="; ".join(self.lines[-12:])[-900:])
                self._news.wait(left)

    def ask(self, *words: object, seconds: float = _TOLD_SECONDS) -> str:
        """Tell it a line, and wait until it is done: "ok ...", or "failed ...", or the data."""
        since = self.told(*words)
        return self.wait_for("data" if words[0] == "read" else f"ok {words[0]}", since, seconds)

    def count(self, word: str) -> int:
        """Lines that begin with a word."""
        return sum(line.startswith(f"{word} ") for line in list(self.lines))

    def close(self) -> None:
        """Forget it. Its process ends with its connection."""
        with suppress(Exception):
            self._exits.close()


@dataclass
class Verdict:
    """What came of a case."""

    case: Case
    hit: bool = False
    """Whether the step came; if not, it happened at no particular one."""
    acknowledged: int = 0
    doubtful: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        where = "at the step" if self.hit else "NOT at the step, which did not come"
        times = " ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        told = f"{self.acknowledged} acknowledged, {self.doubtful} in doubt"
        return "\n    ".join([f"{self.case.words}: {self.case.victim} {where}; {told}; seconds: {times}", *self.wrong])


class Stage:
    """A rack on which cases run, one after the other."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        self.name = name
        self.paths = RackPaths(settings.scaled("tcg"), name)
        self.specs = {blade: seen.spec for blade, seen in engine.observe(settings, name).items() if seen.spec}
        self.programs: dict[str, Program] = {}
        self.dataset = ""
        self._old: list[str] = []
        """What programs have said that are no more."""

    def close(self) -> None:
        """End the programs."""
        for program in self.programs.values():
            program.close()

    def agent(self, blade: str, op: str, **fields: Any) -> dict[str, Any]:
        """Ask the agent of a blade."""
        return agents.call(self.paths, blade, self.specs[blade].mgmt_address, op, 20.0, **fields)

    def begin(self, blade: str) -> None:
        """A new program on a blade; the last one's words are kept."""
        old = self.programs.pop(blade, None)
        if old is not None:
            self._old += old.lines
            old.close()
        self.programs[blade] = Program(self.paths, self.specs[blade])

    def commits(self) -> int:
        """Acknowledged by now."""
        return sum(program.count("done") for program in self.programs.values())

    # A case

    def run(self, case: Case) -> Verdict:
        """Everything, to the end."""
        verdict = Verdict(case)
        name = self.dataset = f"crash-{case.seed}"
        try:
            with _timed(verdict, "begin"):
                self._prepare(case, name)
            with _timed(verdict, "step"):
                verdict.hit = self._wait_for_step(case)
            with _timed(verdict, "fate"):
                {"partition": self._part}.get(case.fate, self._kill)(case)
            with _timed(verdict, "more"):
                self._go_on(case, name)
            with _timed(verdict, "rest"):
                self._rest(name)
            verdict.wrong = self._judge(name)
        except RacklessError as failure:
            verdict.wrong.append(str(failure))
        attempts = self._attempts()
        verdict.acknowledged = sum(attempt.acknowledged for attempt in attempts)
        verdict.doubtful = len(attempts) - verdict.acknowledged
        if not verdict.wrong:
            self._clear(name)
        return verdict

    def evidence(self, folder: Path) -> None:
        """What programs have said, and what agents have logged and tell."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "earlier.txt").write_text("\n".join(self._old))
        for blade, program in self.programs.items():
            (folder / f"{blade}.txt").write_text("\n".join(program.lines))
            with suppress(Exception), client.connect(self.paths, blade, self.specs[blade].mgmt_address) as connection:
                log = client.run(connection, "cat /var/log/rackless/agent/current", check=False).stdout
                (folder / f"{blade}.log").write_text(log)
            with suppress(Exception):
                told = self.agent(blade, "hotpot.audit", dataset=self.dataset), self.agent(blade, "hotpot.stat")
                (folder / f"{blade}.json").write_text(json.dumps(told, indent=1))

    def _prepare(self, case: Case, name: str) -> None:
        missing = [blade for blade in BLADES if blade not in self.programs or self.programs[blade].ended]
        together({blade: blade for blade in missing}, self.begin)
        self._old = []
        for program in self.programs.values():
            program.lines.clear()
        nodes = [self.specs[blade].index + 1 for blade in OWNERS]
        _must(self.programs[MANAGER].ask("create", name, SIZE, case.mode, *nodes))
        if case.early:
            self._arm(case)
        for blade, program in self.programs.items():
            program.told("run", name, f"{case.seed}-{blade}", *case.degrees)
        if not case.early:
            deadline = time.monotonic() + _TOLD_SECONDS
            while self.commits() < _WARM_COMMITS and time.monotonic() < deadline:
                time.sleep(0.05)
            self._arm(case)

    def _arm(self, case: Case) -> None:
        console = self.paths.blade(case.victim).console
        self._heard = console.stat().st_size
        self.agent(case.victim, "hotpot.trap", step=case.step, count=case.count)

    def _wait_for_step(self, case: Case) -> bool:
        console = self.paths.blade(case.victim).console
        deadline = time.monotonic() + _HIT_SECONDS
        while time.monotonic() < deadline:
            with console.open(errors="replace") as file:
                file.seek(self._heard)
                if f"{steps.SAID} {case.step}" in file.read():
                    return True
            time.sleep(0.02)
        return False

    def _kill(self, case: Case) -> None:
        how = {} if case.victim == MANAGER else {"survive": f"{case.survive * 100:g} %", "seed": case.seed}
        inject.inject(self.settings, self.name, {case.victim: {"killed": True, **how}})
        if case.fate == "lost":
            self.paths.blade(case.victim).pmem.unlink(missing_ok=True)
        if case.fate == "away" and case.victim != MANAGER:
            time.sleep(_AWAY_SECONDS)
        inject.heal(self.settings, self.name, [case.victim], ("killed",))

    def _part(self, case: Case) -> None:
        others = [blade for blade in OWNERS if blade != case.victim]
        small = {case.victim} if case.victim != MANAGER else {case.rand.choice(OWNERS)}
        if case.rand.random() < 0.4:
            small.add(case.rand.choice(others))
        inject.partition(self.settings, self.name, [sorted(small)])
        connection = self.programs[case.victim].connection
        client.run(connection, f"kill -CONT $(cat {_AGENT})")
        with suppress(RacklessError):
            self.agent(case.victim, "hotpot.trap", step=None)
        time.sleep(case.rand.choice([1.0, 8.0]))
        inject.heal(self.settings, self.name, [], ("side",))

    def _go_on(self, case: Case, name: str) -> None:
        """Programs that were lost begin anew, and everybody goes on for a moment."""
        for blade, program in list(self.programs.items()):
            if program.ended or (blade == case.victim and case.fate != "partition"):
                self.begin(blade)
                _must(self.programs[blade].ask("run", name, f"{case.seed}-{blade}-again", *case.degrees))
        time.sleep(2.0)
        for program in self.programs.values():
            program.told("stop")
        for program in self.programs.values():
            _must(program.wait_for("ok stop"))

    def _rest(self, name: str) -> None:
        """Until nobody has anything to do, and has not when the next beat has brought news."""
        deadline, quiet = time.monotonic() + _REST_SECONDS, 0
        while quiet < 2:
            busy = self._busy(name)
            quiet = 0 if busy else quiet + 1
            if time.monotonic() > deadline:
                raise RacklessError(f"it does not come to rest: {busy}")
            time.sleep(Timing.beat)

    def _busy(self, name: str) -> list[str]:
        found = []
        for blade in BLADES:
            told = self.agent(blade, "hotpot.audit", dataset=name)
            found += [f"{blade}: {text}" for text in told.get("busy", ["Hotpot has not started"])]
        return found

    def _judge(self, name: str) -> list[str]:
        """Everything that is wrong."""
        seen = {}
        wrong = []
        for blade, program in self.programs.items():
            answer = program.ask("read")
            if answer.startswith("data "):
                seen[blade] = bytes.fromhex(answer.split()[1])
            else:
                wrong.append(f"{blade} cannot read: {answer}")
        if len(set(seen.values())) != 1:
            return [*wrong, f"blades do not read the same: {differences(seen)}"]
        [data] = set(seen.values())
        final = {cell: Cell.unpack(data[cell * STRIDE : cell * STRIDE + CELL]) for cell in range(CELLS)}
        told = [self.agent(blade, "hotpot.audit", dataset=name) for blade in BLADES]
        return wrong + check(self._attempts(), final) + compare(told, data)

    def _attempts(self) -> list[Attempt]:
        said = [self._old, *(program.lines for program in self.programs.values())]
        return attempts_of(line for lines in said for line in lines if line.startswith(("try ", "done ", "not ")))

    def _clear(self, name: str) -> None:
        for program in self.programs.values():
            _must(program.ask("close"))
        _must(self.programs[MANAGER].ask("delete", name))


def differences(seen: dict[str, bytes]) -> str:
    """The pages of which blades read different bytes."""
    pages = [page for page in range(SIZE // 4096)
             if len({data[page * 4096 : (page + 1) * 4096] for data in seen.values()}) > 1]  # fmt: skip
    return f"pages {pages} on {sorted(seen)}"


def compare(told: list[dict[str, Any]], data: bytes) -> list[str]:
    """Home on media, home in registered memory, and copies, as `hotpot.audit` tells them; and what programs read."""
    wrong = []
    copies = {blade["node"]: {page: (version, crc) for page, version, crc in blade["copies"]} for blade in told}
    homes: dict[int, int] = {}
    for blade in told:
        for home in blade["homes"]:
            wrong += [f"page {page} in memory is not what is on media" for page in home["differing"]]
            for about in home["pages"]:
                page, version, crc = about["page"]
                if page in homes:
                    wrong.append(f"page {page} has its home on nodes {homes[page]} and {blade['node']}")
                homes[page] = blade["node"]
                if "wrong" in about:
                    wrong.append(about["wrong"])
                    continue
                if crc != zlib.crc32(data[page * 4096 : (page + 1) * 4096]):
                    wrong.append(f"page {page} is not what is read")
                if version and len(about["copies"]) + 1 < min(about["degree"], len(told)):
                    wrong.append(f"page {page} has copies on {about['copies']}, and should have {about['degree']}")
                for node, has in copies.items():
                    if node == blade["node"]:
                        continue
                    if page in has and has[page] != (version, crc):
                        wrong.append(f"the copy of page {page} on node {node} is {has[page]}, not {(version, crc)}")
                    if version and page not in has and node in about["copies"]:
                        wrong.append(f"node {node} should have a copy of page {page}")
    missing = set(range(SIZE // 4096)) - homes.keys()
    return [*wrong, *(f"page {page} has no home" for page in sorted(missing))]


def _must(answer: str) -> None:
    if answer.startswith("failed"):
        raise RacklessError(answer)


@contextmanager
def _timed(verdict: Verdict, name: str) -> Iterator[None]:
    begun = time.monotonic()
    try:
        yield
    finally:
        verdict.seconds[name] = time.monotonic() - begun


@contextmanager
def stage(settings: Settings, name: str) -> Iterator[Stage]:
    """A fresh rack for cases, taken down at the end."""
    engine.up(settings, rackfile.parse(RACK.format(name=name)), ignore)
    try:
        made = Stage(settings, name)
        try:
            yield made
        finally:
            made.close()
    finally:
        engine.down(settings, name, ignore)


def run_all(settings: Settings, cases: list[Case], seconds: float, name: str = "hotpot-crash",
            folder: Path = Path("out/hotpot-crash")) -> list[Verdict]:  # fmt: skip
    """Run cases until all are done, or so many seconds are over; after one that went wrong on a fresh rack."""
    deadline = time.monotonic() + seconds
    left, verdicts = list(cases), []
    while left and time.monotonic() < deadline:
        with stage(settings, name) as made:
            while left and time.monotonic() < deadline:
                verdict = made.run(left.pop(0))
                verdicts.append(verdict)
                print(verdict, flush=True)
                if verdict.wrong:
                    made.evidence(folder / verdict.case.words.replace(" ", "-"))
                    break
    return verdicts


def main() -> None:
    """Run what the command line says; the exit code tells whether a case went wrong."""
    words = sys.argv[1:]
    cases = [parse(words)] if len(words) == 5 else chosen(*map(int, words[:2]))
    verdicts = run_all(Settings.from_environment(), cases, float(words[2]) if len(words) == 3 else 1e6)
    failed = [verdict.case.words for verdict in verdicts if verdict.wrong]
    hits = sum(verdict.hit for verdict in verdicts)
    print(json.dumps({"cases": len(verdicts), "at the step": hits, "failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
