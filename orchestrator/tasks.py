"""What the Ansible modules in playbooks/library share: they only translate between Ansible and the functions here.

A module runs on the host, with the Python that Rackless is installed for, so it calls what the commands call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.cli.common import own_rack_file, rack_file, rack_name
from orchestrator.errors import RacklessError
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.faults.inject import Outcome
    from orchestrator.topology import Change


class Module(Protocol):
    """As much of ansible.module_utils.basic.AnsibleModule as is used here."""

    params: dict[str, Any]
    check_mode: bool

    def exit_json(self, **result: Any) -> None: ...

    def fail_json(self, msg: str, **result: Any) -> None: ...


def given(module: Module, *names: str) -> dict[str, Any]:
    """The options of these names that were given, "none" as None; those of a mapping among them likewise."""

    def meant(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: meant(inner) for key, inner in value.items() if inner is not None}
        return None if value == "none" else value

    return {name: meant(module.params[name]) for name in names if module.params.get(name) is not None}


def run(module: Module, action: Callable[[Settings], dict[str, Any]]) -> None:
    """Call `action`, and give Ansible what it returns; an error is one line with its hint."""
    try:
        result = action(Settings.from_environment())
    except RacklessError as error:
        hint = f" ({error.hint})" if error.hint else ""
        module.fail_json(msg=f"{error.message}{hint}", hint=error.hint, log=str(error.log or ""))
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}" if error.filename else str(error))
    else:
        module.exit_json(**result)


def edited_file(module: Module) -> Path:
    """The rack file to edit."""
    return own_rack_file(module.params["rack"])


def read_file(module: Module) -> Path:
    """The rack file to read."""
    return rack_file(module.params["rack"])


def name(module: Module) -> str:
    """The name of the rack."""
    return rack_name(module.params["rack"])


def of_change(change: Change) -> dict[str, Any]:
    """Ansible's result of a change of topology."""
    told = change.to_json()
    del told["diff"]
    header = str(change.file)
    diff = {"before": change.before, "after": change.after, "before_header": header, "after_header": header}
    return {**told, "msg": "; ".join(change.lines()), "diff": diff}


def of_faults(outcome: Outcome) -> dict[str, Any]:
    """Ansible's result of a change of faults."""

    def listed(faults: dict[str, Any]) -> str:
        return "".join(f"{blade}: {', '.join(found.shown())}\n" for blade, found in faults.items() if found)

    diff = {"before": listed(outcome.before), "after": listed(outcome.after),
            "before_header": "faults", "after_header": "faults"}  # fmt: skip
    told = outcome.to_json()
    return {**told, "changed": bool(outcome.changed), "blades": told["changed"], "diff": diff}
