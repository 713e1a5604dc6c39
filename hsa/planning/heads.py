"""Refuse models whose attention heads are not known to methods that merge heads."""

from __future__ import annotations

from typing import Any

from hsa.architectures.registry import not_with_heads
from hsa.errors import SourceError, listed
from hsa.methods.base import Method
from hsa.methods.registry import methods
from hsa.option_names import option
from hsa.sources.checkpoint import Checkpoint

MAX_NAMED = 3
"""The number of methods that a message names."""


def require_heads(method: Method[Any, Any], checkpoint: Checkpoint) -> None:
    """Raise SourceError, which names the families with heads, if a method that merges heads gets another model."""
    if not method.needs_heads or checkpoint.architecture.has_heads:
        return
    error = not_with_heads(checkpoint.config, f"{checkpoint.role} {checkpoint.path}")
    others = [other for other in methods().values() if not other.needs_heads]
    named = [other.name for other in sorted(others, key=lambda other: (other.contract.base != "none", other.name))]
    such_as = listed(named[:MAX_NAMED], "or")
    remedy = f"; a {option('method')} that needs no heads merges it, such as {such_as}" if named else ""
    raise SourceError(
        f"{error}; method {method.name} merges attention heads, which are known of such a checkpoint alone{remedy}"
    )
