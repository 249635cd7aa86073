"""YAML text to plain data that remembers the line of everything in it.

Stricter and simpler than YAML: a mapping's keys are strings and appear once, there is one document, no tags,
and the only scalars with a type are whole numbers and null. So `no` is the name "no", and 1:30 is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

Path = tuple[str, ...]

_MOST_VALUES = 100_000
"""More than any rack has; aliases of aliases can multiply without end."""
_MOST_DEPTH = 50
_NULL_TAG = "tag:yaml.org,2002:null"
_STANDARD_TAGS = re.compile(r"tag:yaml\.org,2002:(?!binary|set|omap|pairs|python)")
_WHOLE_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")


@dataclass
class Document:
    """A YAML document: its data, where each part of it is, and what is wrong with the text."""

    data: object = None
    lines: dict[Path, int] = field(default_factory=dict)
    """Line (from 1) of each key or list item by its path; the whole is at ()."""
    problems: list[tuple[int, Path, str]] = field(default_factory=list)
    """Line, path and message of each problem."""
    unread: set[Path] = field(default_factory=set)
    """What the data lacks, although the text has it, because of a problem."""

    def line(self, path: Path) -> int:
        """The line of a path, or of the nearest thing around it that the text has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _StopError(Exception):
    """The rest of the text is not worth reading; the problem is already in the document."""


def read(text: str) -> Document:
    """Read YAML text. Never raises: what is wrong is in `problems`, and `data` has what could be read."""
    document = Document()
    try:
        node = yaml.SafeLoader(text).get_single_node()
        if node is not None:
            document.lines[()] = node.start_mark.line + 1
            document.data = _Reader(document).value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.problems.append((mark.line + 1 if mark else 1, (), _advice(error)))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        bad = text[error.position : error.position + 1]
        document.problems.append((line, (), f"the character {bad!a} cannot be in a YAML file; remove it"))
    except (ValueError, OverflowError) as error:
        # PyYAML lets these through for escapes such as "\\UFFFFFFFF".
        document.problems.append((1, (), f"not YAML: {error}"))
    except RecursionError:
        document.problems.append((1, (), "it is nested too deeply to be a rack"))
    except _StopError:
        pass
    return document


class _Reader:
    """Turns YAML nodes into data, noting lines and problems in a document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0

    def value(self, node: yaml.Node, path: Path) -> object:
        self.values += 1
        line = node.start_mark.line + 1
        if self.values > _MOST_VALUES or len(path) > _MOST_DEPTH:
            self._problem(line, path, "it is nested too deeply, or its aliases repeat too much")
            raise _StopError
        if not _STANDARD_TAGS.match(node.tag):
            self._problem(line, path, f'the tag "{node.tag}" has no meaning here; remove it')
            self.document.unread.add(path)
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.document.lines[(*path, str(index))] = item.start_mark.line + 1
            return [self.value(item, (*path, str(index))) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        if not _is_text(node.value):
            self._problem(line, path, "an escape makes half a character; write the character itself")
            self.document.unread.add(path)
            return None
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        mapping: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not _is_text(key_node.value):
                self._problem(line, path, "this key is not a word; write a word before the colon")
                continue
            key = str(key_node.value)
            if key == "<<":
                self._problem(
                    line, path, 'merge keys are not read; repeat the whole entry, as in "mb1: *mb0"'
                )
                self.document.unread.add(path)
                continue
            if key in mapping:
                first = self.document.lines[(*path, key)]
                self._problem(line, (*path, key), f"it is already on line {first}; remove one of the two")
                continue
            self.document.lines[(*path, key)] = line
            mapping[key] = self.value(value_node, (*path, key))
        return mapping

    def _problem(self, line: int, path: Path, message: str) -> None:
        self.document.problems.append((line, path, message))


def _is_text(value: str) -> bool:
    """Whether a string can be encoded: YAML's "\\ud800" is half of a UTF-16 pair and cannot."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _scalar(node: yaml.ScalarNode) -> object:
    if node.tag == _NULL_TAG and node.style is None:
        return None
    # Quoted digits are text on purpose; more than 18 digits are no number a rack has.
    if node.style is None and _WHOLE_NUMBER.fullmatch(node.value):
        return int(node.value)
    return str(node.value)


def _advice(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's complaint in the reader's terms, for the mistakes people make."""
    problem = error.problem or "this cannot be read"
    mark = error.problem_mark
    if "'\\t'" in problem:
        return "a tab is in the indentation; write spaces"
    if "single document" in (error.context or "") or "another document" in problem:
        return 'there is a second document; write one rack per file, without "---" between'
    if "mapping values are not allowed" in problem:
        return 'a ":" is where none can be; check the indentation, or quote the value'
    if "expected ',' or '}'" in problem or "expected ',' or ']'" in problem:
        opened = f" (opened on line {error.context_mark.line + 1})" if error.context_mark else ""
        return f'a "," or a closing bracket is missing{opened}'
    if "expected <block end>" in problem:
        return "this line is not indented like its neighbours"
    if "undefined alias" in problem:
        return f"{problem.removeprefix('found ')}: no value before it is marked with & and that name"
    if "could not find expected ':'" in problem:
        return 'a ":" is missing after a key, or the line is not indented like its neighbours'
    column = f" (column {mark.column + 1})" if mark else ""
    return f"not YAML: {problem}{column}"
