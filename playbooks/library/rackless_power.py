"""Ansible module: the power of a blade."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rackless_power
short_description: The power of a blade of a Rackless rack
options:
  name: {description: Name of the blade., type: str, required: true}
  state:
    description: >-
      C(killed) cuts the power, C(paused) stops the CPUs, C(running) undoes both, C(reset) cuts the power and starts
      the blade again, each time it is asked for. Disks are kept.
    choices: [killed, paused, running, reset]
    required: true
    type: str
  rack: {description: Rack file or name of a rack; without it racks/default.yml., type: str}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "required": True, "choices": ["killed", "paused", "running", "reset"]},
            "rack": {"type": "str"},
        },
        supports_check_mode=True,
    )
    from orchestrator import tasks
    from orchestrator.faults import inject

    def change(settings: Any) -> dict[str, Any]:
        rack, name, state, dry = tasks.name(module), module.params["name"], module.params["state"], module.check_mode
        if state == "running":
            return tasks.of_faults(inject.heal(settings, rack, [name], ("killed", "paused"), dry))
        if state == "reset":
            checked = inject.inject(settings, rack, {name: {"killed": True}}, dry=True)
            done = checked if dry else inject.reset(settings, rack, name)
            return {**tasks.of_faults(done), "changed": True}
        return tasks.of_faults(inject.inject(settings, rack, {name: {state: True}}, dry))

    tasks.run(module, change)


if __name__ == "__main__":
    main()
