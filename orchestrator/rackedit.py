"""Edits of a rack file's text that touch nothing else: comments, order and columns of other lines stay as they are.

PyYAML tells where each value is; only that piece of the text is replaced. (ruamel.yaml writes flow mappings such as
`{kind: memory,  cpus: 1}` anew, and their columns are gone.) Every edit is read back and compared with what it should
have done: where it did something else, as with YAML's aliases, it is refused.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from orchestrator import yamltext
from orchestrator.errors import RacklessError

_PLAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ./%_-]*[A-Za-z0-9%])?")
_WORDS_OF_YAML = {"null", "true", "false", "yes", "no", "on", "off", "~"}

Keys = tuple[str, ...]


def put(text: str, path: Keys, value: Any) -> str:
    """The text with `value` (text, a whole number, or a mapping of them) at a path such as ("blades", "mb0", "cpus").

    What is missing on the way is made. Raises RacklessError when the text cannot be edited so.
    """
    data = _data(text)
    expected = copy.deepcopy(data)
    inner = expected
    for key in path[:-1]:
        inner[key] = inner.get(key) or {}
        inner = inner[key]
    inner[path[-1]] = value
    return _checked(_put(text, path, value), expected, path) if expected != data else text


def drop(text: str, path: Keys) -> str:
    """The text without what is at `path`, and without mappings that become empty; the same text if it has no such."""
    data = _data(text)
    expected = copy.deepcopy(data)
    while True:
        inner = expected
        for key in path[:-1]:
            inner = inner.get(key) or {}
        if path[-1] not in inner:
            return text
        if len(inner) > 1 or len(path) == 1:
            break
        path = path[:-1]  # it would leave an empty mapping
    del inner[path[-1]]
    return _checked(_drop(text, path), expected, path)


def _checked(text: str, expected: Any, path: Keys) -> str:
    """The text, if it says what is expected. Raises RacklessError otherwise."""
    read = yamltext.read(text)
    if read.problems or read.data != expected:
        raise RacklessError(f"{'.'.join(path)} cannot be edited in place: it is written in an unusual way",
                            hint="edit the rack file by hand, then `rackless up`")  # fmt: skip
    return text


def write(path: Path, text: str) -> None:
    """Replace a file's contents at once; its mode and a symbolic link to it stay."""
    path = path.resolve()
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.chmod(path.stat().st_mode & 0o7777)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def diff(before: str, after: str, name: str) -> str:
    """What an edit changes, as `diff -u` shows it."""
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), name, name, n=1)
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def _data(text: str) -> Any:
    read = yamltext.read(text)
    if read.problems or not isinstance(read.data, dict):
        raise RacklessError("this is no rack file that can be edited", hint="see `rackless plan`")
    return read.data


def _whole(text: str) -> yaml.Node:
    node = yaml.SafeLoader(text).get_single_node()
    assert node is not None
    return node


def _put(text: str, path: Keys, value: Any) -> str:
    node = _whole(text)
    for depth, key in enumerate(path):
        if not isinstance(node, yaml.MappingNode):  # nothing, or the null that `links:` is
            for outer in reversed(path[depth:]):
                value = {outer: value}
            break
        found = _entry(node, key)
        if found is None:
            for outer in reversed(path[depth + 1 :]):
                value = {outer: value}
            return _insert(text, node, key, value)
        node = found[1]
    start, end = node.start_mark.index, _end(node)
    space = " " if text[start - 1] == ":" else ""
    return text[:start] + space + _written(value) + text[end:]


def _insert(text: str, mapping: yaml.MappingNode, key: str, value: Any) -> str:
    entry = f"{key}: {_written(value)}"
    if not mapping.value:
        at = mapping.start_mark.index + 1
        return text[:at] + entry + text[at:]
    at = _end(mapping.value[-1][1])
    if mapping.flow_style:
        return f"{text[:at]}, {entry}{text[at:]}"
    line_end = text.find("\n", at)
    at = len(text) if line_end < 0 else line_end
    indent = " " * mapping.value[0][0].start_mark.column
    if not indent and isinstance(value, dict):  # a whole part of the file: a line for each entry
        entry = f"{key}:" + "".join(f"\n  {name}: {_written(inner)}" for name, inner in value.items())
    return f"{text[:at]}\n{indent}{entry}{text[at:]}"


def _drop(text: str, path: Keys) -> str:
    node = _whole(text)
    for key in path[:-1]:
        found = _entry(node, key)
        assert found is not None
        node = found[1]
    assert isinstance(node, yaml.MappingNode)
    names = [key.value for key, _ in node.value]
    place = names.index(path[-1])
    key, value = node.value[place]
    if node.flow_style:
        if place + 1 < len(names):
            return text[: key.start_mark.index] + text[node.value[place + 1][0].start_mark.index :]
        return text[: _end(node.value[place - 1][1])] + text[_end(value) :]
    begin = text.rfind("\n", 0, key.start_mark.index) + 1
    end = text.find("\n", _end(value))
    return text[:begin] + ("" if end < 0 else text[end + 1 :])


def _entry(node: yaml.Node, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next(((k, v) for k, v in node.value if k.value == key), None)


def _end(node: yaml.Node) -> int:
    """Where a value's last character is. The mark of a block's end is behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return int(node.end_mark.index)


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, int):
        return str(value)
    plain = _PLAIN.fullmatch(value) and not value.isdigit() and value.lower() not in _WORDS_OF_YAML
    return str(value) if plain else json.dumps(value)
