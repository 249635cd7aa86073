"""Ansible module: a whole rack."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rackless_rack
short_description: A Rackless rack
description: Makes a rack as its file says (C(up)), or removes it (C(down)); the same as C(rackless up) and C(down).
options:
  state: {description: What the rack shall be., choices: [up, down], default: up, type: str}
  keep_data: {description: C(down) keeps disks and persistent memory and keys., type: bool, default: false}
  rack: {description: Rack file; without it racks/default.yml., type: str}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "default": "up", "choices": ["up", "down"]},
            "keep_data": {"type": "bool", "default": False},
            "rack": {"type": "str"},
        },
        supports_check_mode=True,
    )
    from orchestrator import engine, rackfile, tasks
    from orchestrator.events import ignore

    def change(settings: Any) -> dict[str, Any]:
        if module.params["state"] == "down":
            name = tasks.name(module)
            there = sorted(engine.observe(settings, name))
            if there and not module.check_mode:
                engine.down(settings, name, ignore, module.params["keep_data"])
            return {"changed": bool(there), "rack": name, "removed": there}
        rack = rackfile.load(tasks.read_file(module))
        engine.check_room(rack)
        todo = engine.plan(settings, rack)
        pending = [line for line in todo.render() if line[0] not in "=0123456789n"]
        told = {"changed": todo.pending, "plan": todo.to_json()["actions"],
                "diff": {"prepared": "\n".join(pending) + "\n" if pending else ""}}  # fmt: skip
        if todo.pending and not module.check_mode:
            told["result"] = engine.up(settings, rack, ignore).to_json()
        return told

    tasks.run(module, change)


if __name__ == "__main__":
    main()
