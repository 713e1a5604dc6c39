"""The values of a YAML document with the paths of their keys, so that every error says which key it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hsa.errors import RequestError, shown
from hsa.system.strict_yaml import Value

RUN_MERGEKIT = "run mergekit itself on the file: hsa mergekit CONFIG.yml OUT"
"""The advice for what this package's engine does not do."""


@dataclass(frozen=True)
class Node:
    """A value of a document. `where` is what messages call the file, `path` the keys that lead to the value, such as
    `models[1].parameters.density`; it is empty for the document itself.

    Example:
        >>> Node("c.yml", "dtype", Value(3, 16)).error("is a number")
        RequestError('c.yml:3: dtype is a number')
    """

    where: str
    path: str
    value: Value

    @property
    def is_null(self) -> bool:
        return self.value.content is None

    @property
    def is_empty(self) -> bool:
        """Whether it is null, or an empty string, list or mapping, which mergekit treats as null."""
        content = self.value.content
        return content is None or (isinstance(content, (str, tuple, Mapping)) and not content)

    @property
    def place(self) -> str:
        """The line and the keys, with which messages begin."""
        return f"{self.where}:{self.value.line}: {self.path or 'the document'}"

    def error(self, text: str) -> RequestError:
        """An error about this value; `text` continues the sentence after the value's name."""
        return RequestError(f"{self.place} {text}")

    def shown(self) -> str:
        """The value in a message."""
        content = self.value.content
        if isinstance(content, Mapping):
            return "a mapping"
        return "a list" if isinstance(content, tuple) else shown(content)

    def mapping(self, of: str = "keys to values") -> dict[str, Node]:
        """The entries of a mapping by their keys. Raises RequestError if the value is not a mapping."""
        if not isinstance(self.value.content, Mapping):
            raise self.error(f"must be a mapping of {of}, got {self.shown()}")
        return {key: self._child(key, value) for key, value in self.value.content.items()}

    def items(self, of: str) -> Iterator[Node]:
        """The entries of a list. Raises RequestError if the value is not a list."""
        if not isinstance(self.value.content, tuple):
            raise self.error(f"must be a list of {of}, got {self.shown()}")
        for number, value in enumerate(self.value.content):
            yield Node(self.where, f"{self.path}[{number}]", value)

    def text(self, what: str) -> str:
        """The value as a string that is not blank. Raises RequestError for other values."""
        content = self.value.content
        if not isinstance(content, str) or not content.strip():
            hint = "; put it in quotes" if isinstance(content, (bool, int, float)) else ""
            raise self.error(f"must be {what}, got {self.shown()}{hint}")
        return content

    def _child(self, key: str, value: Value) -> Node:
        return Node(self.where, f"{self.path}.{key}" if self.path else key, value)


def given(mapping: Mapping[str, Node], key: str) -> Node | None:
    """The value of a key, None where it is missing or null."""
    node = mapping.get(key)
    return None if node is None or node.is_null else node
