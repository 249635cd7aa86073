"""Ansible module: a blade's link to the fabric, in the rack file and while it runs."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rackless_link
short_description: The link of a blade of a Rackless rack
description: Changes how good a blade's link to the fabric is, for good. For a time there is rackless_fault.
options:
  name: {description: Name of the blade., type: str, required: true}
  latency: {description: "Added to every packet, such as 50 us; none is the default again.", type: str}
  jitter: {description: How far the latency varies., type: str}
  bandwidth: {description: "Such as 1 Gbit/s.", type: str}
  loss: {description: "Packets that are lost, such as 0.1 %.", type: str}
  rack: {description: Rack file; without it racks/default.yml., type: str}
"""


def main() -> None:
    """Run the module."""
    options: dict[str, Any] = {name: {"type": "str"} for name in ("latency", "jitter", "bandwidth", "loss", "rack")}
    options["name"] = {"type": "str", "required": True}
    module = AnsibleModule(argument_spec=options, supports_check_mode=True)
    from orchestrator import tasks, topology

    def change(settings: Any) -> dict[str, Any]:
        fields = tasks.given(module, "latency", "jitter", "bandwidth", "loss")
        name, dry = module.params["name"], module.check_mode
        return tasks.of_change(topology.set_link(settings, tasks.edited_file(module), name, fields, dry))

    tasks.run(module, change)


if __name__ == "__main__":
    main()
