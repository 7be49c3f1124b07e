"""YAML as this package reads it, in files and in flags: mappings, lists and words, bounded in size, depth and aliases.

A word is the text that stands there: what it means, the declaration of its key says, as on the command line. So
`baseline: off` is the arm called off, `compile: off` the choice off and `coordconv: off` a truth; 0123 is no octal number,
1:3 no count of seconds, and no date is ever made.
"""

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from stn_pipeline.errors import ConfigError
from stn_pipeline.texts import quoted

MOST_BYTES = 64_000  # of a file: three seconds to read at worst, and 50 times what the largest of ours has
MOST_DEPTH = 20
MOST_NODES = 100_000  # once aliases are written out
_NULLS = ("", "~", "null", "Null", "NULL")
_OWN = "tag:yaml.org,2002:"
_TAGS = (None, "!", f"{_OWN}str", f"{_OWN}seq", f"{_OWN}map")  # that change no type


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """A composer that stops at a depth: PyYAML's own calls itself until Python's stack ends."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if self.depth == MOST_DEPTH:
            raise _slip(f"nests deeper than {MOST_DEPTH}", event)
        if (tag := getattr(event, "tag", None)) not in _TAGS:  # an alias has none
            raise _slip(f"the tag {tag.removeprefix(_OWN)} is not read here: leave it out", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _slip(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class _Builder:
    """Makes values of nodes: a str, None for nothing, a list, or a dict with keys of text."""

    def __init__(self) -> None:
        self.n_nodes = 0

    def build(self, node: yaml.Node, depth: int = 0) -> Any:
        self.n_nodes += 1
        if self.n_nodes > MOST_NODES:
            raise _slip(f"holds more than {MOST_NODES:,} values once aliases are written out", node)
        if depth > MOST_DEPTH:
            raise _slip(f"nests deeper than {MOST_DEPTH} once aliases are written out", node)
        if isinstance(node, yaml.ScalarNode):
            return None if node.value == "" and node.style is None else _word(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, depth + 1) for item in node.value]
        return self._mapping(node, depth)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] | None = None
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _slip("a key must be a word", key_node)
            key = _word(key_node)
            is_merge = key == "<<" and key_node.style is None
            if key in own or (is_merge and merged is not None):
                raise _slip(f"key {quoted(key)} stands twice", key_node)
            value = self.build(value_node, depth + 1)
            if is_merge:
                merged = _merged(value, key_node)
            else:
                own[key] = value
        return (merged or {}) | own


def _merged(value: Any, at: yaml.Node) -> dict[str, Any]:
    """Return what << brings in: a mapping, or a list of them, of which the first that has a key gives it."""
    merged: dict[str, Any] = {}
    for one in reversed(value if isinstance(value, list) else [value]):
        if not isinstance(one, dict):
            raise _slip("<< takes a mapping or a list of mappings, such as *name", at)
        merged |= one
    return merged


def _word(node: yaml.ScalarNode) -> str:
    word = str(node.value)
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise _slip("holds half a character (a surrogate)", node) from error
    return word


def parse(text: str) -> Any:
    """Return the value of YAML: a str for every scalar, None where nothing stands, lists, and dicts with keys of text.

    Merge keys (<<) and aliases are written out; a key that stands twice, a tag that would change a type, and what is too deep
    or too long are refused.
    Raises: ConfigError, one line with the place.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"is longer than {MOST_BYTES:,} characters")
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Builder().build(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}") from error


def is_nothing(value: Any) -> bool:
    """Say whether a value is YAML's null, where a name cannot stand: absent, empty, ~ or null."""
    return value is None or (isinstance(value, str) and value in _NULLS)


def read(path: str, example: str) -> dict[str, Any]:
    """Return the keys of a file.

    Raises: ConfigError, one line, where there is none, or it is not YAML of keys and values.
    """
    way_out = f"name a file such as {example}"
    try:
        found = Path(path).expanduser()
        mode = os.stat(found).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would be waited for, a device never ends
            raise ConfigError(f"{path}: is a pipe or a device, no file: {way_out}")
        with open(found, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}: {way_out}") from error
    except (RuntimeError, ValueError) as error:  # ~nobody; a zero byte
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {error}: {way_out}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: is larger than {MOST_BYTES // 1000} kB: {way_out}")
    try:
        keys = parse(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text: {way_out}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as name: mnist")
    return keys
