"""Ansible module: a rolling restart."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rackless_restart
short_description: Restart agents or blades of a Rackless rack one after the other
description:
  - Before each restart, and after the last, all blades of the rack must be well; else it stops.
  - Refused, with nothing touched, when memory or programs would be lost, unless C(force) is given.
options:
  what: {description: What is restarted., choices: [agents, blades], default: agents, type: str}
  blades: {description: Names of blades; all without., type: list, elements: str}
  older_than: {description: Only what has run longer than this many seconds., type: float, default: 300}
  force: {description: Even if memory or programs are lost., type: bool, default: false}
  rack: {description: Rack file or name of a rack; without it racks/default.yml., type: str}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "what": {"type": "str", "default": "agents", "choices": ["agents", "blades"]},
            "blades": {"type": "list", "elements": "str"},
            "older_than": {"type": "float", "default": 300.0},
            "force": {"type": "bool", "default": False},
            "rack": {"type": "str"},
        },
        supports_check_mode=True,
    )
    from orchestrator import restart, tasks

    def change(settings: Any) -> dict[str, Any]:
        said = module.params
        done = restart.rolling(settings, tasks.name(module), said["what"], said["blades"] or (), said["older_than"],
                               said["force"], module.check_mode)  # fmt: skip
        diff = "".join(f"restart {said['what']} of {name}\n" for name in done)
        return {"changed": bool(done), "restarted": done, "diff": {"prepared": diff}}

    tasks.run(module, change)


if __name__ == "__main__":
    main()
