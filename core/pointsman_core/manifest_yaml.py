"""YAML as the API server reads it, with the line of every field.

PyYAML alone would read dates and ``12:30`` as something other than text, miss ``1e3`` as
a number, and let the last of two equal keys win. Here values are JSON's and no others.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

Path = tuple[str | int, ...]
"""Where a value stands: keys and list indices from the document's root."""

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

MAX_NODES = 100_000
"""Values in one document with all aliases followed; ours, far above any real manifest."""

MAX_DEPTH = 64
"""Levels of nesting; ours as well."""

_Base: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc, valid-type]
    """Resolves the scalars that the API server's YAML library resolves."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


def _resolve(kind: str, pattern: str, first: str) -> None:
    tag = f"tag:yaml.org,2002:{kind}"
    _Loader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$"), [*first, ""])


_resolve("null", r"~|null|Null|NULL|", "~nN")
_resolve(
    "bool",
    r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
    "tTfFyYnNoO",
)
_resolve("int", r"[-+]?(?:0b[01]+|0x[0-9a-fA-F]+|0o?[0-7]+|0|[1-9][0-9]*)", "-+0123456789")
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+.0123456789",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that JSON has no place for, or that would silently be lost."""

    path: Path
    line: int
    message: str


@dataclass(slots=True)
class Document:
    """One document of a YAML stream."""

    index: int
    """0 for the first."""
    value: Json
    lines: dict[Path, int]
    """Line of each key or list item, from 1."""
    problems: list[Problem]

    def line_of(self, path: Path) -> int:
        """The line of the path or, where it is absent, of what is nearest above."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]


class YamlSyntaxError(ValueError):
    """The rest of the stream is not YAML."""

    def __init__(self, message: str, *, index: int, line: int | None) -> None:
        super().__init__(message)
        self.index = index
        """Of the document that could not be read."""
        self.line = line


def read_documents(text: str) -> Iterator[Document]:
    """Read one document after the other, leaving out empty ones.

    Raises `YamlSyntaxError` where the text ceases to be YAML; what comes before has been
    yielded by then.
    """
    _refuse_depth(text)
    index = 0
    try:
        loader = _Loader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                document = _Reader(loader).read(node, index)
                if document.value is not None:
                    yield document
                index += 1
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part)
        # Past the end of the text libyaml counts lines that are not there.
        line = min(mark.line, text.rstrip("\n").count("\n")) + 1 if mark else None
        raise YamlSyntaxError(f"not YAML: {message}", index=index, line=line) from error
    except yaml.YAMLError as error:
        message = str(error).splitlines()[0]
        raise YamlSyntaxError(f"not YAML: {message}", index=index, line=None) from error


def _refuse_depth(text: str) -> None:
    """Look at the nesting before nodes are made: PyYAML's C code recurses without limit."""
    depth = index = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            index += isinstance(event, yaml.DocumentEndEvent)
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else None
                raise YamlSyntaxError("nested too deeply", index=index, line=line)
    except yaml.YAMLError:
        return  # told by what follows, after the documents before it


@dataclass(slots=True)
class _Reader:
    """Turns one document's nodes into values."""

    loader: _Loader
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    nodes: int = 0

    def read(self, root: yaml.Node, index: int) -> Document:
        value = self._value(root, ())
        # A mapping starts at its first key, which is where people look for it.
        self.lines[()] = root.start_mark.line + 1
        return Document(index, value, self.lines, self.problems)

    def _value(self, node: yaml.Node, path: Path) -> Json:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, "too many or too deeply nested values", node.start_mark
            )
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, at)) for at, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Json]:
        result: dict[str, Json] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            at = (*path, key or "?")
            line = key_node.start_mark.line + 1
            if key is None:
                self._report(path, line, "a key must be text")
            elif key == "<<":
                self._report(path, line, "merge keys (<<) are not supported: write the fields out")
            elif key in result:
                first = self.lines[at]
                self._report(at, line, f"stands here twice, first in line {first}")
            else:
                self.lines[at] = line
                result[key] = self._value(value_node, at)
        return result

    def _scalar(self, node: yaml.Node, path: Path) -> Json:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        line = node.start_mark.line + 1
        if kind not in ("null", "bool", "int", "float", "str"):
            self._report(path, line, f"the YAML tag {node.tag} is not supported")
            return None
        try:
            value: Json = self.loader.construct_object(node)
        except (ValueError, KeyError):  # as in `!!int abc`
            self._report(path, line, f"is not a valid {kind}")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._report(path, line, "must be a finite number")
            return None
        return value

    def _report(self, path: Path, line: int, message: str) -> None:
        self.problems.append(Problem(path, line, message))
