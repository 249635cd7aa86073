"""Ansible module: a blade of a rack, in its file and while it runs."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rackless_blade
short_description: A blade of a Rackless rack
description:
  - Adds, removes, resizes or replaces one blade, in the rack file and, if it is up, in the rack.
  - Runs on the host of the rack. Programs that run on other blades go on.
  - Refused, with nothing touched, when memory, files or programs would be lost, unless C(force) is given.
options:
  state:
    description: >-
      C(present) adds it, C(absent) removes it, C(resized) changes one that is there, C(replaced) makes it anew if it
      died, hangs or is not as the file says.
    choices: [present, absent, resized, replaced]
    default: present
    type: str
  name: {description: Name of the blade; a new one may do without., type: str}
  kind: {description: Kind of a new blade., type: str, choices: [manager, processor, memory, storage]}
  memory: {description: "Such as 512 MiB.", type: str}
  cpus: {description: Virtual CPUs., type: int}
  cpu_quota: {description: "Share of each CPU, such as 50 %; none lifts it.", type: str}
  excache: {description: Processor blades - local memory for pages of memory blades., type: str}
  pmem: {description: Memory blades - persistent memory; none takes it away., type: str}
  disk: {description: "Storage blades - C(size), C(iops), C(bandwidth).", type: dict}
  anew: {description: Replace it also if it is well., type: bool, default: false}
  force: {description: Even if what it holds is lost., type: bool, default: false}
  rack: {description: Rack file; without it racks/default.yml., type: str}
"""

FIELDS = ("memory", "cpus", "cpu_quota", "excache", "pmem", "disk")


def main() -> None:
    """Run the module."""
    text = {"type": "str"}
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "default": "present", "choices": ["present", "absent", "resized", "replaced"]},
            "kind": {"type": "str", "choices": ["manager", "processor", "memory", "storage"]},
            **dict.fromkeys(("name", "memory", "cpu_quota", "excache", "pmem", "rack"), text),
            "cpus": {"type": "int"},
            "disk": {"type": "dict", "options": {"size": text, "iops": text, "bandwidth": text}},
            "anew": {"type": "bool", "default": False},
            "force": {"type": "bool", "default": False},
        },
        required_if=[("state", "present", ("kind",)),
                     *(("state", state, ("name",)) for state in ("absent", "resized", "replaced"))],
        supports_check_mode=True,
    )  # fmt: skip
    from orchestrator import tasks, topology

    def change(settings: Any) -> dict[str, Any]:
        file, name, dry = tasks.edited_file(module), module.params["name"], module.check_mode
        fields, force = tasks.given(module, *FIELDS), module.params["force"]
        if isinstance(fields.get("disk"), dict) and str(fields["disk"].get("iops") or "").isdigit():
            fields["disk"]["iops"] = int(fields["disk"]["iops"])
        match module.params["state"]:
            case "present":
                done = topology.add(settings, file, module.params["kind"], name, fields, dry)
            case "absent":
                done = topology.remove(settings, file, name, force, dry, missing_ok=True)
            case "resized":
                done = topology.resize(settings, file, name, fields, force, dry)
            case _:
                done = topology.replace_blade(settings, file, name, module.params["anew"], force, dry)
        return tasks.of_change(done)

    tasks.run(module, change)


if __name__ == "__main__":
    main()
