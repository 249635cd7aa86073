"""Reading rack files: a YAML file to a Rack, or every problem of the file at once, each with its line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from orchestrator import yamltext
from orchestrator.errors import RacklessError
from orchestrator.fields import KINDS, Subnet, did_you_mean
from orchestrator.model import (
    Blade,
    Disk,
    Fabric,
    Host,
    Link,
    Management,
    Problem,
    ProblemsError,
    Rack,
    host_problems,
    rack_problems,
)
from orchestrator.units import shown

_LARGEST_FILE_BYTES = 1024 * 1024
_LONGEST_KEY = 40


class RackFileError(RacklessError):
    """A rack file that cannot be used. `problems` has one line for each thing that is wrong with it."""

    def __init__(self, problems: list[str], *, hint: str | None = None) -> None:
        super().__init__("\n".join(problems), hint=hint)
        self.problems = tuple(problems)


def load(path: Path) -> Rack:
    """Read a rack file. Raises RackFileError: `racks/x.yml:12: blades.mb0.memory: "512" has no unit; ...`."""
    return parse(_text(path), os.fspath(path))


def parse(text: str, source: str = "rack") -> Rack:
    """Read the text of a rack file; `source` is its name in errors. Raises RackFileError."""
    document = yamltext.read(text)
    found = list(document.problems)
    if document.data is not None or not found:
        try:
            rack = validate(document.data)
        except ProblemsError as error:
            # What could not be read is already explained: that it is missing from the data is no news.
            for path, message in error.problems:
                if not any(path[: len(unread)] == unread for unread in document.unread):
                    found.append((document.line(path), path, message))
        else:
            if not found:
                return rack
    lines = []
    for line, path, message in sorted(found, key=lambda problem: problem[0]):
        where = ".".join(part[:_LONGEST_KEY] for part in path) + ": " if path else ""
        lines.append(_one_line(f"{source}:{line}: {where}{message}"))
    raise RackFileError(lines, hint="docs/rackfile.md describes every key")


def validate(data: object) -> Rack:
    """Make a Rack of plain data, such as a rack file's. Raises ProblemsError with every problem in it."""
    if data is None:
        raise ProblemsError([Problem((), "there is nothing in it; write at least name: and blades:")])
    if not isinstance(data, dict):
        raise ProblemsError([Problem((), f"{shown(data)} is not a rack; write at least name: and blades:")])
    try:
        return Rack.model_validate(data)
    except ValidationError as error:
        problems = [problem for details in error.errors() for problem in _explained(details)]
    if not any(problem.path in ((), ("blades",)) for problem in problems):
        problems += _between_parts(data, {problem.path for problem in problems})
    raise ProblemsError(problems)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a rack file, for editors."""
    schema: dict[str, Any] = _tidy(Rack.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise RackFileError([f"{path}: a file of more than 1 MiB is not a rack file"])
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RackFileError([f"{path}: there is no such file"], hint=_rack_files(path)) from None
    except IsADirectoryError:
        raise RackFileError([f"{path}: this is a folder"], hint=_rack_files(path / "x")) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RackFileError([f"{path}:{line}: this is not UTF-8 text"]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RackFileError([f"{path}: {reason}"]) from None


def _rack_files(missing: Path) -> str:
    """The rack files the user may have meant: those beside the missing one, else those of racks/."""
    for folder in (missing.parent, Path("racks")):
        try:
            names = sorted(os.fspath(file) for file in folder.glob("*.yml"))
        except OSError:
            continue
        if names:
            return f"rack files here: {', '.join(names)}"
    return "a rack file is YAML, for example racks/default.yml"


def _explained(details: Mapping[str, Any]) -> list[Problem]:
    """One of pydantic's errors as problems that say what to write."""
    path = tuple(str(part) for part in details["loc"] if part != "[key]")
    error = details.get("ctx", {}).get("error")
    if isinstance(error, ProblemsError):
        return [Problem((*path, *problem.path), problem.message) for problem in error.problems]
    if error is not None:
        return [Problem(path, str(error))]
    match details["type"]:
        case "missing":
            return [Problem(path, f"it is missing; write for example {_example(path)}")]
        case "extra_forbidden":
            known = list(_model_at(path[:-1]).model_fields)
            return [Problem(path, f"unknown key; {did_you_mean(path[-1], known)}")]
        case "model_type" | "dict_type" | "model_attributes_type":
            given = details["input"]
            fault = "it is empty" if given is None else f"{shown(given)} is not a mapping"
            return [Problem(path, f"{fault}; {_mapping_advice(path)}")]
        case _:
            return [Problem(path, f"{shown(details['input'])}: {details['msg']}")]


def _model_at(path: tuple[str, ...]) -> type[BaseModel]:
    """The model that describes the part of a rack file at `path`."""
    match path:
        case ("fabric",):
            return Fabric
        case ("management",):
            return Management
        case ("blades", _):
            return Blade
        case ("blades", _, "disk"):
            return Disk
        case ("links", _):
            return Link
        case ("hosts", _):
            return Host
    return Rack


def _example(path: tuple[str, ...]) -> str:
    field = _model_at(path[:-1]).model_fields[path[-1]]
    if path == ("blades",):
        return "blades: {gm0: {kind: manager, memory: 256 MiB}}"
    return f"{path[-1]}: {field.examples[0] if field.examples else field.default}"


def _mapping_advice(path: tuple[str, ...]) -> str:
    match path:
        case ("blades",):
            return "write one line per blade, for example gm0: {kind: manager, memory: 256 MiB}"
        case ("links",):
            return "write one line per blade, for example mb1: {latency: 50 us}"
        case ("hosts",):
            return "write one line per host, for example here: {address: 192.168.1.4}"
    fields = _model_at(path).model_fields
    names = [name for name, field in fields.items() if field.is_required()] or list(fields)[:1]
    return f"write for example {path[-1]}: {{{', '.join(_example((*path, name)) for name in names)}}}"


def _between_parts(data: dict[str, Any], known: set[tuple[str, ...]]) -> list[Problem]:
    """What model.rack_problems says of a rack whose parts have problems, so that no error hides another."""
    blades = data.get("blades")
    if not isinstance(blades, dict):
        return []
    kinds = {
        name: str(blade.get("kind")) if isinstance(blade, dict) else "" for name, blade in blades.items()
    }
    links = data.get("links")
    subnets = [_subnet_of(data, part) for part in ("fabric", "management")]
    found = rack_problems(kinds, links if isinstance(links, dict) else (), *subnets)
    hosts = data.get("hosts", {})
    if isinstance(hosts, dict):
        # One that is no mapping has a problem of its own: it is not this machine.
        uris = {name: host.get("uri") if isinstance(host, dict) else name for name, host in hosts.items()}
        pins = {name: blade["host"] for name, blade in blades.items()
                if isinstance(blade, dict) and isinstance(blade.get("host"), str)}  # fmt: skip
        found += host_problems(uris, pins)
    if not all(kind in KINDS for kind in kinds.values()):
        # One of the unknown kinds may be meant to be the manager.
        known = {*known, ("blades",)}
    return [problem for problem in found if problem.path not in known]


def _subnet_of(data: dict[str, Any], part: str) -> IPv4Network | None:
    given = data.get(part, {})
    if not isinstance(given, dict):
        return None
    default = (Fabric() if part == "fabric" else Management()).subnet
    try:
        return TypeAdapter(Subnet).validate_python(given.get("subnet", default))
    except ValidationError:
        return None


def _tidy(schema: Any) -> Any:
    """A schema as people read it: what is optional is left out rather than null, and nothing has a title."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    choices = schema.get("anyOf", [])
    if {"type": "null"} in choices:
        [given] = [choice for choice in choices if choice != {"type": "null"}]
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        schema = {**given, **rest}
    return {key: _tidy(value) for key, value in schema.items() if key != "title"}


def _one_line(text: str) -> str:
    """Text from a file made safe to print: line ends and terminal escapes become visible."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
