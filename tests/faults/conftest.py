"""The table that the fault suite ends with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_harness import FULL, TABLE, table


@pytest.fixture(autouse=True)
def verified_outputs() -> Iterator[None]:
    """Every operation of this suite has a check of its own, and further calls would be further points of failure."""
    yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE:
        return
    form = "in full" if FULL else "a sample; make test-faults tries them in full"
    terminalreporter.section(f"faults ({form})")
    for line in table():
        terminalreporter.write_line(line)
