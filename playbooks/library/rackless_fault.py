"""Ansible module: faults of blades and links, made and healed."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rackless_fault
short_description: Faults of a Rackless rack
description: Breaks blades or links on purpose, or heals them. What is broken shows in C(rackless status).
options:
  state: {description: C(absent) heals., choices: [present, absent], default: present, type: str}
  blades: {description: Names of blades; C(absent) without any heals all., type: list, elements: str}
  faults:
    description: >-
      C(present) - a mapping such as C({latency: 20 ms, loss: 1 %, down: true}). Known are killed, paused, down,
      latency, jitter, loss, corruption, duplication, bandwidth, deaf_to, cpu, memory, disk_latency, disk_errors (reads,
      writes or all), disk_full and clock; with killed also survive and seed, for persistent memory.
    type: dict
  only: {description: C(absent) - heal only faults of these names., type: list, elements: str}
  partition: {description: "C(present) - groups of blades that hear each other, each such as gm0,pb0.", type: list,
              elements: str}
  rack: {description: Rack file or name of a rack; without it racks/default.yml., type: str}
"""


def main() -> None:
    """Run the module."""
    names = {"type": "list", "elements": "str"}
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "default": "present", "choices": ["present", "absent"]},
            **dict.fromkeys(("blades", "only", "partition"), names),
            "faults": {"type": "dict"},
            "rack": {"type": "str"},
        },
        required_if=[("state", "present", ("faults", "partition"), True)],
        required_by={"faults": ("blades",)},
        mutually_exclusive=[("faults", "partition")],
        supports_check_mode=True,
    )
    from orchestrator import tasks
    from orchestrator.faults import inject

    def change(settings: Any) -> dict[str, Any]:
        rack, dry, blades = tasks.name(module), module.check_mode, module.params["blades"] or []
        if module.params["state"] == "absent":
            done = inject.heal(settings, rack, blades, tuple(module.params["only"] or ()), dry)
        elif module.params["partition"]:
            groups = [[name.strip() for name in group.split(",")] for group in module.params["partition"]]
            done = inject.partition(settings, rack, groups, dry)
        else:
            done = inject.inject(settings, rack, dict.fromkeys(blades, module.params["faults"]), dry)
        return tasks.of_faults(done)

    tasks.run(module, change)


if __name__ == "__main__":
    main()
