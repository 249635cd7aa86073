"""Programs that outlive the agent which started them: what a job's folder says of its program to the next agent.

Such a program has had no remote memory (that went with the agent), or it would have ended.
"""

from __future__ import annotations

import json
import select
import shutil
import threading
from pathlib import Path

from guest_agents.control import ControlError
from guest_agents.splitkernel.process.programs import Program, Programs

_NOTE = "program.json"
_START_FIELD = 19
"""Of /proc/PID/stat, after the name in brackets: the start in clock ticks since boot."""


def note(job: Path, program: Program) -> None:
    """Keep in a job's folder which program is its."""
    about = {"pid": program.pid, "ticks": _ticks(program.pid), "vnode": program.vnode, "command": program.command,
             "started": program.started, "excache": program.excache}  # fmt: skip
    (job / _NOTE).write_text(json.dumps(about))


def adopt(job: Path, programs: Programs, vnodes: dict[str, str]) -> None:
    """Take over the program of an earlier agent's job if it still runs, and remove the job when it has ended."""
    try:
        about = json.loads((job / _NOTE).read_text())
        if _ticks(about["pid"]) != about["ticks"]:
            raise ProcessLookupError
        program = programs.begin(about["pid"], about["vnode"], about["command"], about["started"], job,
                                 about.get("excache"))  # fmt: skip
    except (OSError, ValueError, ControlError):
        shutil.rmtree(job, ignore_errors=True)
        return
    vnodes[str(job)] = program.vnode
    threading.Thread(target=_await, args=(job, program, programs, vnodes), name="adopted", daemon=True).start()


def _await(job: Path, program: Program, programs: Programs, vnodes: dict[str, str]) -> None:
    end = select.poll()
    end.register(program.handle, select.POLLIN)
    end.poll()
    programs.end(program, None)
    vnodes.pop(str(job), None)
    shutil.rmtree(job, ignore_errors=True)


def _ticks(pid: int) -> int | None:
    """When a process began; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[_START_FIELD]) if fields[0] != "Z" else None
