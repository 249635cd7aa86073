"""Ansible module: an unmodified program on a processor blade."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rackless_run
short_description: Run a program on a Rackless rack
description: The same as C(rackless run). A program that ends with another exit code than 0 fails the task.
options:
  command: {description: Program and arguments., type: str, required: true}
  output: {description: File for what it prints; if it is there the program is not run again., type: path}
  "on": {description: Processor blade to run on., type: str}
  vnode: {description: vNode to run in., type: str}
  replicas: {description: Memory blades that keep each page., type: int}
  rack: {description: Rack file or name of a rack; without it racks/default.yml., type: str}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "command": {"type": "str", "required": True},
            "output": {"type": "path"},
            **{name: {"type": "str"} for name in ("on", "vnode", "rack")},
            "replicas": {"type": "int"},
        },
        supports_check_mode=True,
    )
    from orchestrator import tasks

    def run(_settings: Any) -> dict[str, Any]:
        output = Path(module.params["output"]) if module.params["output"] else None
        if output and output.exists():
            return {"changed": False, "stdout": output.read_text()}
        if module.check_mode:
            return {"changed": True, "stdout": ""}
        options = [f"--{name}={module.params[name]}" for name in ("on", "vnode", "replicas") if module.params[name]]
        command = [sys.executable, "-m", "orchestrator.cli.main", "run", "--rack", tasks.name(module), *options, "--",
                   *shlex.split(module.params["command"])]  # fmt: skip
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode == 0 and output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(done.stdout)
        return {"changed": True, "failed": done.returncode != 0, "rc": done.returncode, "stdout": done.stdout,
                "stderr": done.stderr, "msg": (done.stderr.strip() or "done").splitlines()[-1]}  # fmt: skip

    tasks.run(module, run)


if __name__ == "__main__":
    main()
