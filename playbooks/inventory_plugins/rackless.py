"""Ansible inventory of the blades that run in a rack, from the orchestrator's own functions."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Constructable
from ansible.utils.display import Display

DOCUMENTATION = """
name: rackless
short_description: Blades of a Rackless rack
description:
  - Gives the running blades of a rack, in a group for each kind (processor, memory, storage, manager).
  - Every host has the variables rackless_rack, rackless_kind, rackless_cpus, rackless_memory_bytes,
    rackless_mgmt_address and rackless_fabric_address.
extends_documentation_fragment:
  - constructed
options:
  plugin:
    description: Says that the file is for this plugin.
    required: true
    choices: [rackless, rackless.rack.rackless]
  rack:
    description: Rack file or name of a rack; without it racks/default.yml.
    type: str
    env:
      - name: RACKLESS_RACK
"""


class InventoryModule(BaseInventoryPlugin, Constructable):  # type: ignore[misc]  # Ansible has no types
    """The plugin, under the name Ansible looks for."""

    NAME = "rackless"

    def verify_file(self, path: str) -> bool:
        """Take files named rackless.yml, or anything that ends so."""
        return bool(super().verify_file(path)) and path.endswith(("rackless.yml", "rackless.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Fill the inventory. A rack that is not up has no hosts: playbooks that bring one up need none."""
        from orchestrator.cli.common import current_rack
        from orchestrator.errors import RacklessError

        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        try:
            current = current_rack(self.get_option("rack"))
            ssh_config = current.ssh_config() if current.blades else None
        except RacklessError as error:
            raise AnsibleParserError(f"{error}" + (f" ({error.hint})" if error.hint else "")) from error
        if ssh_config is None:
            Display().warning(f"rack {current.name} is not up: it has no hosts")
        for name, blade in current.running().items():
            variables = {
                "ansible_host": blade.mgmt_address,
                "ansible_user": "root",
                "ansible_ssh_common_args": f"-F '{ssh_config}'",
                "ansible_python_interpreter": "/usr/bin/python3",
                "rackless_rack": current.name,
                "rackless_kind": blade.kind,
                "rackless_cpus": blade.cpus,
                "rackless_memory_bytes": blade.memory,
                "rackless_mgmt_address": blade.mgmt_address,
                "rackless_fabric_address": blade.fabric_address,
            }
            self._add(name, blade.kind, variables)

    def _add(self, name: str, kind: str, variables: dict[str, Any]) -> None:
        self.inventory.add_group(kind)
        self.inventory.add_host(name, group=kind)
        for key, value in variables.items():
            self.inventory.set_variable(name, key, value)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict=strict)
