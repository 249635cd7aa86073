"""Ansible module: everything that tells how a rack is, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rackless_collect
short_description: Collect status, counters and logs of a Rackless rack
options:
  dest: {description: Folder; one in which all was collected before is left alone., type: path, required: true}
  force: {description: Collect anew., type: bool, default: false}
  rack: {description: Rack file or name of a rack; without it racks/default.yml., type: str}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            "force": {"type": "bool", "default": False},
            "rack": {"type": "str"},
        },
        supports_check_mode=True,
    )
    from orchestrator import collect, tasks

    def change(settings: Any) -> dict[str, Any]:
        folder = Path(module.params["dest"])
        if (folder / collect.DONE).exists() and not module.params["force"]:
            return {"changed": False, "dest": str(folder)}
        name = tasks.name(module)
        files = [] if module.check_mode else collect.collect(settings, name, folder)
        return {"changed": True, "dest": str(folder), "files": files, "diff": {"prepared": f"collect into {folder}\n"}}

    tasks.run(module, change)


if __name__ == "__main__":
    main()
